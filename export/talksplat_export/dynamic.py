"""Graphs in 8 bits for ONNX Runtime on a CPU: weights by their column's scale, activations when they are known.

Nothing is calibrated and only ONNX Runtime runs them: TensorRT wants `precision`'s. Made for the recogniser, which
reads all weights for every token: a clip takes 0.4 of the time (LJ: 5.0 % of words wrong, 4.9 % in float32).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from ._onnx import ExportError, write

_DOMAIN = "com.microsoft"  # of ONNX Runtime's own operators


def quantise(
    source: Path,
    target: Path,
    opened: str = "",
) -> None:
    """Write ``source`` with its matrices and embeddings in 8 bits, symmetric.

    Its products are ONNX Runtime's `DynamicQuantizeMatMul`: unsigned activations by signed weights is what AVX512-VNNI
    multiplies. `onnxruntime.quantization.quantize_dynamic` comes to the same in a twentieth of the speed.

    Args:
        source: a graph in float32.
        target: the file; its folder is made.
        opened: an input [B, P, L, ...] to be replaced by ``P * L`` inputs [B, ...], ``opened.0.0``, ``opened.0.1``
            and so on. ONNX Runtime copies each part out of the whole at every run; the caller has views of them.

    Raises:
        ExportError: the graph does not pick its parts from ``opened``.
    """
    model = onnx.load(source)
    graph = model.graph
    if opened:
        _open(graph, opened)
    weights = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    matrices = {name: array for name, array in weights.items() if array.ndim == 2 and array.dtype == np.float32}
    nodes, constants = [], dict[str, npt.NDArray[np.generic]]()
    for node in graph.node:
        name = node.input[node.op_type != "Gather"] if len(node.input) == 2 else ""
        product = node.op_type == "MatMul" or (node.op_type == "Gemm" and _attribute(node, "transB"))
        if name in matrices and product:
            matrix = matrices[name].T if node.op_type == "Gemm" else matrices[name]
            scale = _scale(np.abs(matrix).max(axis=0))
            name = f"{name}.columns"
            constants[name], constants[f"{name}.scale"] = _rounded(matrix / scale), scale
            inputs = [node.input[0], name, f"{name}.scale"]
            nodes.append(helper.make_node("DynamicQuantizeMatMul", inputs, node.output, node.name, domain=_DOMAIN))
        elif name in matrices and node.op_type == "Gather":
            rows = matrices[name]
            scale = _scale(np.abs(rows).max(axis=1, keepdims=True))
            name = f"{name}.rows"
            constants[name], constants[f"{name}.scale"] = _rounded(rows / scale), scale
            (picked,), index = node.output, node.input[1]
            nodes += [
                helper.make_node("Gather", [name, index], [f"{picked}.int8"]),
                helper.make_node("Gather", [f"{name}.scale", index], [f"{picked}.scale"]),
                helper.make_node("Cast", [f"{picked}.int8"], [f"{picked}.float"], to=TensorProto.FLOAT),
                helper.make_node("Mul", [f"{picked}.float", f"{picked}.scale"], [picked]),
            ]
        else:
            nodes.append(node)
    used = {name for node in nodes for name in node.input}
    kept = [each for each in graph.initializer if each.name in used and each.name not in constants]
    kept += [numpy_helper.from_array(array, name) for name, array in constants.items()]
    changed = onnx.GraphProto(node=nodes, initializer=kept)  # copies: what is in the graph goes with it
    graph.ClearField("node")
    graph.ClearField("initializer")
    graph.MergeFrom(changed)
    model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    write(target, model.SerializeToString())


def _scale(largest: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.asarray(np.maximum(largest, np.finfo(np.float32).tiny * 127) / 127, np.float32)


def _rounded(x: npt.NDArray[np.float32]) -> npt.NDArray[np.int8]:
    return np.ascontiguousarray(x.round(), np.int8)


def _open(graph: GraphProto, name: str) -> None:
    whole = next(value for value in graph.input if value.name == name)
    batch, parts, layers, *rest = (dim.dim_value or dim.dim_param for dim in whole.type.tensor_type.shape.dim)
    names = {}
    for part, index in _picked(graph, name):
        for layer, at in _picked(graph, part.output[0]):
            names[layer.output[0]] = f"{name}.{index}.{at}"
            graph.node.remove(layer)
        graph.node.remove(part)
    expected = [f"{name}.{part}.{layer}" for part in range(int(parts)) for layer in range(int(layers))]
    if sorted(names.values()) != sorted(expected):
        raise ExportError(f"{graph.name} does not pick each of {parts} x {layers} parts from {name}, once.")
    for node in graph.node:
        node.input[:] = [names.get(each, each) for each in node.input]
    graph.input.remove(whole)
    graph.input.extend(helper.make_tensor_value_info(each, TensorProto.FLOAT, [batch, *rest]) for each in expected)


def _picked(graph: GraphProto, tensor: str) -> list[tuple[NodeProto, int]]:
    """The nodes that pick one index from dim 1 of ``tensor``, with it."""
    constants = {each.name: each for each in graph.initializer}
    return [
        (node, int(numpy_helper.to_array(constants[node.input[1]])))
        for node in graph.node
        if node.op_type == "Gather" and node.input[0] == tensor and _attribute(node, "axis") == 1
    ]


def _attribute(node: NodeProto, name: str) -> int:
    return next((each.i for each in node.attribute if each.name == name), 0)
