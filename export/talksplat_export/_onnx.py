"""From a torch module to a checked ONNX file that ONNX Runtime and TensorRT both take.

Used by every exporter of this package, so that all graphs have the same opset and IR version, are written
whole or not at all, and have exactly the tensors that the model repository's configs promise.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, ValueInfoProto
from torch import Tensor, nn

OPSET = 18  # the newest that TensorRT takes without casts; 23 fails there
IR_VERSION = 10  # onnx 1.23 writes newer ones than ONNX Runtime 1.31 reads
CONTROL_FLOW = {"If", "Loop", "Scan"}  # TensorRT refuses them or builds slow plans

_DTYPES = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64}


class ExportError(RuntimeError):
    """The exported graph is not what was asked for, or does not compute what the module computes."""


def export(
    module: nn.Module,
    path: Path,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]],
) -> None:
    """Trace ``module`` and write it to ``path``.

    Args:
        module: takes the tensors of ``inputs`` in their order, returns a tensor or a tuple of tensors,
            float32 or int64.
        path: the ONNX file; its folder is made. It appears only once all checks have passed.
        inputs: an example of every input under its name in the graph; dynamic dims should be 2 or more.
        outputs: the outputs' names in the graph.
        dynamic: for inputs *and* outputs, the dims that may change, with their names:
            ``{"AUDIO": {0: "batch"}}``. Every other dim is fixed at its size in the example.

    Raises:
        ExportError: names, types or dims are not as asked (the exporter may fix or free a dim without a
            word), or the graph has control flow or operators outside the standard ONNX domain.
    """
    module = module.eval()
    with torch.inference_mode():
        results = module(*inputs.values())
    results = [results] if isinstance(results, Tensor) else list(results)
    if len(results) != len(outputs):
        raise ExportError(f"The module returns {len(results)} tensors, {len(outputs)} names were given.")
    # AUTO, since named ones cost a second attempt where a size has a minimum; what comes out is checked below.
    shapes = tuple(dict.fromkeys(dynamic.get(name, {}), torch.export.Dim.AUTO) for name in inputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    assert program is not None  # with dynamo=True it is a program, whatever the annotation says
    model = program.model_proto
    model.ir_version = IR_VERSION
    examples = {**inputs, **dict(zip(outputs, results, strict=True))}
    _check_tensors(model.graph.input, list(inputs), examples, dynamic)
    _check_tensors(model.graph.output, list(outputs), examples, dynamic)
    _check_operators(model)
    _strip(model)
    write(path, model.SerializeToString())


def parity(module: nn.Module, path: Path, inputs: Mapping[str, Tensor], tolerance: float) -> float:
    """Largest difference between the ONNX file and ``module``, as a share of each output's largest magnitude.

    Call it with other sizes of the dynamic dims than those traced.

    Raises:
        ExportError: the difference is above ``tolerance``.
    """
    with torch.inference_mode():
        expected = module(*inputs.values())
    expected = [expected] if isinstance(expected, Tensor) else list(expected)
    actual = session(path).run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    worst = 0.0
    for mine, theirs in zip(actual, (tensor.numpy() for tensor in expected), strict=True):
        if mine.shape != theirs.shape:
            raise ExportError(f"{path} gives {mine.shape} where the module gives {theirs.shape}.")
        scale = max(1.0, float(np.abs(theirs).max(initial=0.0)))
        worst = float(np.maximum(worst, np.abs(mine - theirs).max(initial=0.0) / scale))  # NaN stays
    if not worst <= tolerance:
        raise ExportError(f"{path} differs from the module by {worst:.1e}; {tolerance:.1e} is allowed.")
    return worst


def session(path: Path, threads: int = 1) -> ort.InferenceSession:
    """The file in ONNX Runtime on the CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_tensors(
    found: Sequence[ValueInfoProto],
    names: list[str],
    examples: Mapping[str, Tensor],
    dynamic: Mapping[str, Mapping[int, str]],
) -> None:
    """Compare names, types and dims with what was asked; give the dynamic dims their names."""
    if [value.name for value in found] != names:
        raise ExportError(f"The graph has {[value.name for value in found]} where {names} were asked for.")
    for value in found:
        example, free = examples[value.name], dynamic.get(value.name, {})
        tensor = value.type.tensor_type
        if tensor.elem_type != _DTYPES[example.dtype]:
            raise ExportError(f"{value.name} has element type {tensor.elem_type}, not {example.dtype}.")
        if len(tensor.shape.dim) != example.ndim:
            raise ExportError(f"{value.name} has {len(tensor.shape.dim)} dims, not {example.ndim}.")
        for index, dim in enumerate(tensor.shape.dim):
            fixed = dim.HasField("dim_value")
            if index in free and fixed:
                raise ExportError(f"Dim {index} of {value.name} was fixed at {dim.dim_value} by the exporter.")
            if index in free:
                dim.dim_param = free[index]
            elif not fixed or dim.dim_value != example.shape[index]:
                raise ExportError(f"Dim {index} of {value.name} is {dim}, not {example.shape[index]}.")


def _check_operators(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    if model.functions:
        raise ExportError("The graph has functions that were not inlined.")
    foreign = {node.op_type for node in model.graph.node if node.domain not in ("", "ai.onnx")}
    unwanted = foreign | CONTROL_FLOW & {node.op_type for node in model.graph.node}
    if unwanted:
        raise ExportError(f"The graph has operators that TensorRT does not take: {sorted(unwanted)}.")


def _strip(model: onnx.ModelProto) -> None:
    """Drop the exporter's notes: they hold this machine's paths and make equal graphs differ."""
    for part in (model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    for value in (*model.graph.value_info, *model.graph.initializer):
        value.ClearField("metadata_props")
