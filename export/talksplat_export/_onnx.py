"""From a torch module to a checked ONNX file that ONNX Runtime and TensorRT both take.

Used for every graph of `registry.GRAPHS`, so that all have the same opset and IR version, are written whole or not at
all, and have exactly the tensors that the registry and the model repository's configs promise.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, ValueInfoProto
from torch import nn

from . import registry
from .feeds import Feed, session
from .registry import BATCH, Graph, Precision, Tolerance

OPSET = 18  # the newest that TensorRT takes without casts; 23 fails there
IR_VERSION = 10  # onnx 1.23 writes newer ones than ONNX Runtime 1.31 reads
CONTROL_FLOW = {"If", "Loop", "Scan"}  # TensorRT refuses them or builds slow plans

_ELEMENTS = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


class ExportError(RuntimeError):
    """The graph is not what was asked for, or does not compute what the module computes."""


def export(graph: Graph, module: nn.Module) -> onnx.ModelProto:
    """Trace ``module``.

    Args:
        graph: its tensors, and the dims that may change.
        module: takes the graph's inputs in their order, returns its outputs in theirs: a tensor or a tuple.

    Raises:
        ExportError: see `check`; the exporter may fix or free a dim without a word.
    """
    module = module.eval()
    examples = tuple(_example(graph, tensor) for tensor in graph.inputs)
    # AUTO, since named ones cost a second attempt where a size has a minimum; what comes out is checked below.
    free = ([0, *(at for at, dim in enumerate(tensor.dims, 1) if isinstance(dim, str))] for tensor in graph.inputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module,
            examples,
            dynamo=True,
            dynamic_shapes=tuple(dict.fromkeys(dims, torch.export.Dim.AUTO) for dims in free),
            input_names=[tensor.name for tensor in graph.inputs],
            output_names=[tensor.name for tensor in graph.outputs],
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    assert program is not None  # with dynamo=True it is a program, whatever the annotation says
    model = program.model_proto
    model.ir_version = IR_VERSION
    check(model, graph)
    _strip(model)
    return model


def _example(graph: Graph, tensor: registry.Tensor) -> torch.Tensor:
    """Zeros of usual sizes, 2 at least: the exporter takes a size of 1 for one that never changes."""
    sizes = (dim if isinstance(dim, int) else max(2, graph.ranges[dim].usual) for dim in (BATCH, *tensor.dims))
    return torch.zeros(tuple(sizes), dtype=getattr(torch, tensor.dtype))


def check(model: onnx.ModelProto, graph: Graph) -> None:
    """Give the dims that may change their names in ``graph``.

    Raises:
        ExportError: names, types or dims are not those of ``graph``, the opset or IR version is another, or there is
            control flow or an operator outside the standard ONNX domain; the message names it.
    """
    _check_tensors(model.graph.input, graph.inputs)
    _check_tensors(model.graph.output, graph.outputs)
    _check_operators(model)


@dataclass(frozen=True)
class Deviation:
    """How far an output is from what it should be."""

    output: str
    difference: float  # the largest, as a share of the output's largest magnitude
    correlation: float  # Pearson's, over all values

    def is_within(self, tolerance: Tolerance) -> bool:
        """NaN never is."""
        exact = tolerance.correlation == 0 or self.correlation >= tolerance.correlation
        return exact and self.difference <= tolerance.difference


def parity(
    graph: Graph, module: nn.Module, path: Path, batches: Sequence[Feed], precision: Precision = "fp32"
) -> list[Deviation]:
    """Compare an ONNX file with ``module``, output by output, over ``batches`` of other sizes than those traced.

    Raises:
        ExportError: a shape differs, a value is not finite, or a deviation is above ``graph``'s tolerance.
    """
    running = session(path, precision)
    names = [tensor.name for tensor in graph.outputs]

    def compute(feed: Feed) -> list[npt.NDArray[Any]]:
        with torch.inference_mode():
            results = module(*(torch.from_numpy(feed[tensor.name]) for tensor in graph.inputs))
        return [each.numpy() for each in ([results] if isinstance(results, torch.Tensor) else results)]

    try:
        return compare(graph, precision, batches, lambda feed: running.run(names, feed), compute, "the module")
    except ExportError as error:
        raise ExportError(f"{path}: {error}") from None


def compare(
    graph: Graph,
    precision: Precision,
    batches: Sequence[Feed],
    run: Callable[[Feed], Sequence[npt.NDArray[Any]]],  # the outputs in ``graph``'s order
    reference: Callable[[Feed], Sequence[npt.NDArray[Any]]],  # as they should be
    who: str,  # the reference is, in messages
) -> list[Deviation]:
    """How far each output of ``run`` is from that of ``reference``, over all ``batches``.

    Raises:
        ExportError: a shape differs, a value is not finite, or a deviation is above ``graph``'s tolerance.
    """
    pairs: dict[str, list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]] = {tensor.name: [] for tensor in graph.outputs}
    for feed in batches:
        for name, mine, theirs in zip(pairs, run(feed), reference(feed), strict=True):
            if mine.shape != theirs.shape:
                raise ExportError(f"{name} is {mine.shape} where {who} gives {theirs.shape}.")
            pairs[name].append((mine.reshape(-1), theirs.reshape(-1)))
    found, tolerance = [_deviation(name, each) for name, each in pairs.items()], graph.tolerances[precision]
    for each in found:
        if not each.is_within(tolerance):
            raise ExportError(
                f"{each.output} differs from {who} by {each.difference:.1e} of its largest magnitude and "
                f"correlates by {each.correlation:.4f}; allowed: {tolerance.difference:.1e}, {tolerance.correlation}."
            )
    return found


def _deviation(name: str, pairs: Sequence[tuple[npt.NDArray[Any], npt.NDArray[Any]]]) -> Deviation:
    mine, theirs = (np.concatenate(each).astype(np.float64) for each in zip(*pairs, strict=True))
    scale = np.abs(theirs).max(initial=np.finfo(np.float32).tiny)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        difference = np.abs(mine - theirs).max(initial=0.0) / scale  # NaN stays
        correlation = np.corrcoef(mine, theirs)[0, 1] if difference > 0 else 1.0
    return Deviation(name, float(difference), float(correlation))


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_tensors(found: Sequence[ValueInfoProto], wanted: Sequence[registry.Tensor]) -> None:
    names = [tensor.name for tensor in wanted]
    if [value.name for value in found] != names:
        raise ExportError(f"The graph has {[value.name for value in found]} where {names} were asked for.")
    for value, tensor in zip(found, wanted, strict=True):
        dims, kind = (BATCH, *tensor.dims), value.type.tensor_type
        if kind.elem_type != _ELEMENTS[tensor.dtype]:
            raise ExportError(f"{value.name} has element type {kind.elem_type}, not {tensor.dtype}.")
        if len(kind.shape.dim) != len(dims):
            raise ExportError(f"{value.name} has {len(kind.shape.dim)} dims, not {len(dims)}.")
        for index, (dim, size) in enumerate(zip(kind.shape.dim, dims, strict=True)):
            fixed = dim.HasField("dim_value")
            if isinstance(size, str) and fixed:
                raise ExportError(f"Dim {index} of {value.name} ({size}) was fixed at {dim.dim_value}.")
            if isinstance(size, str):
                dim.dim_param = size
            elif not fixed or dim.dim_value != size:
                raise ExportError(f"Dim {index} of {value.name} is {dim.dim_value or dim.dim_param}, not {size}.")


def _check_operators(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if (versions, model.ir_version) != ([OPSET], IR_VERSION):
        raise ExportError(f"The graph has opset {versions} and IR {model.ir_version}, not {OPSET} and {IR_VERSION}.")
    if model.functions:
        raise ExportError("The graph has functions that were not inlined.")
    unwanted = [
        f"{node.op_type} ({node.name})"
        for node in model.graph.node
        if node.op_type in CONTROL_FLOW or node.domain not in ("", "ai.onnx")
    ]
    if unwanted:
        raise ExportError(f"The graph has operators that TensorRT does not take: {', '.join(unwanted)}.")


def _strip(model: onnx.ModelProto) -> None:
    """Drop the exporter's notes: they hold this machine's paths and make equal graphs differ."""
    for part in (model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    for value in (*model.graph.value_info, *model.graph.initializer):
        value.ClearField("metadata_props")
