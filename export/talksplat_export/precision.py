"""From an fp32 graph to fp16 or int8, strongly typed: the types stand in the file, as TensorRT wants them.

fp16 comes from modelopt's autocast (https://github.com/NVIDIA/TensorRT-Model-Optimizer), int8 from ONNX Runtime's
static quantiser: symmetric, by pairs of nodes that quantise and dequantise (QDQ), weights by channel, biases as they
are. Inputs and outputs stay float32, so that every precision serves under one config.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from ._onnx import IR_VERSION, ExportError, check
from .feeds import Feed
from .registry import Graph, Precision

QUANTISED = ("Conv", "Gemm", "MatMul")  # what computes in int8
PRODUCTS = (*QUANTISED, "LSTM")  # what takes the time


class PrecisionError(ExportError):
    """A graph can't be made in a precision; the message says why, or what to install."""


def reduced(graph: Graph, precision: Precision, source: Path, batches: Sequence[Feed]) -> onnx.ModelProto:
    """The graph in fp16 or int8.

    Args:
        graph: what it promises, and what it keeps in fp32.
        precision: "fp16" or "int8".
        source: its fp32 file.
        batches: to calibrate on.

    Raises:
        PrecisionError: modelopt is missing, or a name in ``graph.keep`` fits no node.
        ExportError: what comes out is not as ``graph`` promises, see `_onnx.check`.
    """
    keep = kept(onnx.load(source), graph.keep.get(precision, ()))
    model = _fp16(source, keep, batches) if precision == "fp16" else _int8(source, keep, batches)
    model.ir_version = IR_VERSION
    model.graph.ClearField("value_info")  # what modelopt leaves there is wrong where dims share a name
    check(model, graph)
    return model


def _fp16(source: Path, keep: set[str], batches: Sequence[Feed]) -> onnx.ModelProto:
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        try:
            from modelopt.onnx.autocast import convert_to_mixed_precision  # takes seconds
        except ImportError as error:
            raise PrecisionError(
                f"{error.name or 'nvidia-modelopt'} is not installed, fp16 needs it: pip install -c constraints.txt "
                "-e './export[precision]'"
            ) from error
        for number, feed in enumerate(batches):
            np.savez(Path(folder) / f"{number:03}.npz", **feed)
        model: onnx.ModelProto = convert_to_mixed_precision(
            onnx_path=str(source),
            low_precision_type="fp16",
            keep_io_types=True,
            calibration_data=folder,
            nodes_to_exclude=[f"^{re.escape(name)}$" for name in sorted(keep)],
        )
    return model


def _int8(source: Path, keep: set[str], batches: Sequence[Feed]) -> onnx.ModelProto:
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        folded, quantised = Path(folder) / "folded.onnx", Path(folder) / "quantised.onnx"
        quant_pre_process(source, folded, skip_symbolic_shape=True)
        nodes = onnx.load(folded).graph.node
        quantize_static(
            folded,
            quantised,
            _Reader(batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTISED),
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            # A fused node has the first one's name, a slash and what was done to it.
            nodes_to_exclude=[node.name for node in nodes if node.name.split("/")[0] in keep],
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "MatMulConstBOnly": True,  # attention, a product of activations, stays as it is
            },
        )
        return onnx.load(quantised)


def kept(model: onnx.ModelProto, weights: Sequence[str]) -> set[str]:
    """The nodes that stay in fp32.

    Those that use weights whose names begin so, what leads there from the graph's inputs, and what follows up to the
    next weights; and what passes an input on as it is.

    Raises:
        PrecisionError: no weights have a name that begins so.
    """
    for prefix in weights:
        if not any(tensor.name.startswith(prefix) for tensor in model.graph.initializer):
            raise PrecisionError(f"The graph has no weights whose names begin with {prefix!r}.")
    # The weights that a constant tensor is made from; single numbers are none.
    origins = {
        tensor.name: {tensor.name} if np.prod(tensor.dims) > 1 and tensor.data_type == TensorProto.FLOAT else set()
        for tensor in model.graph.initializer
    }
    moved = {tensor.name for tensor in model.graph.input}  # what has met no weights yet
    follow: set[str] = set()  # what kept nodes make
    found: set[str] = set()
    makers: dict[str, onnx.NodeProto] = {}
    for node in model.graph.node:  # in the order in which they run
        makers |= dict.fromkeys(node.output, node)
        data = {name for name in node.input if name and name not in origins}
        used = set().union(*(origins[name] for name in node.input if name in origins))
        mine = any(name.startswith(tuple(weights)) for name in used)
        if not data:
            origins |= dict.fromkeys(node.output, used)
        elif mine or (not used and data & follow and data <= follow | moved):
            follow.update(node.output)
        elif not used and data <= moved:
            moved.update(node.output)
            continue
        if mine or not follow.isdisjoint(node.output):
            found.add(node.name)
    found |= {node.name for node in model.graph.node if node.op_type == "Identity" and moved.issuperset(node.input)}
    leading = [name for node in model.graph.node if node.name in found for name in node.input]
    while leading:
        maker = makers.get(leading.pop())
        if maker is not None and maker.name not in found and moved.issuperset(maker.output):
            found.add(maker.name)
            leading += maker.input
    return found


def fp32_nodes(model: onnx.ModelProto) -> str:
    """Nodes that compute in fp32 nonetheless, by type: "LSTM 1, MatMul 2"; of those in `PRODUCTS`."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in [*inferred.value_info, *inferred.output]}
    dequantised = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    found = Counter(
        node.op_type
        for node in model.graph.node
        if node.op_type in PRODUCTS
        and types.get(node.output[0]) == TensorProto.FLOAT
        and node.input[0] not in dequantised
    )
    return ", ".join(f"{kind} {count}" for kind, count in sorted(found.items()))


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, batches: Sequence[Feed]) -> None:
        self._left = iter(batches)

    def get_next(self) -> Feed | None:
        return next(self._left, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Both tools tell their life's story, and modelopt's import sets up the logging of the whole process."""
    root, level = logging.getLogger(), logging.root.manager.disable
    handlers = list(root.handlers)
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)
        root.handlers[:] = handlers
