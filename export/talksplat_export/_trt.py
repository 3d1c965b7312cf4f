"""An ONNX file through TensorRT's parser and builder: what the gate without a GPU and the builder of plans share.

TensorRT and TensorRT-RTX have the same Python API up to there, so each is handed in as the module ``trt``.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from .registry import BATCH, Graph, Tensor


class MissingTensorRTError(RuntimeError):
    """There is no such TensorRT here, or it can't be loaded."""


class BuildError(RuntimeError):
    """TensorRT does not take the graph, or not as the registry has it; the message names the node."""


def load(*names: str, otherwise: str) -> ModuleType:
    """The first of these modules that is installed.

    Args:
        names: import names.
        otherwise: what to do where there is none.

    Raises:
        MissingTensorRTError: none is, or its libraries are not.
    """
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except ImportError as error:
            raise MissingTensorRTError(f"{name} can't be loaded ({error}): {otherwise}") from error
    raise MissingTensorRTError(f"{' or '.join(names)} is not installed: {otherwise}")


def check_libraries(trt: ModuleType) -> None:
    """TensorRT's bindings come from PyPI, its libraries with the container.

    Raises:
        MissingTensorRTError: they are of different versions.
    """
    wanted = [int(part) for part in trt.__version__.split(".")[:3]]
    number = int(ctypes.CDLL(f"libnvinfer.so.{wanted[0]}").getInferLibVersion())
    found = [number // 10_000, number // 100 % 100, number % 100]
    if found != wanted:
        versions = (".".join(map(str, each)) for each in (wanted, found))
        raise MissingTensorRTError("TensorRT's bindings are of {}, its libraries of {}.".format(*versions))


class Network:
    """A graph that was parsed, with the tensors that the registry promises.

    Precision is the file's: the network is strongly typed.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        path: the ONNX file.
        graph: what the registry says about it.

    Raises:
        BuildError: it does not parse, or its tensors have other names, types or dims.
    """

    def __init__(self, trt: ModuleType, path: Path, graph: Graph) -> None:
        self._graph, self._logger = graph, logger(trt.ILogger)
        self._builder = trt.Builder(self._logger)
        self._network = self._builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self._parser = trt.OnnxParser(self._network, self._logger)  # kept, since it owns the weights
        if not self._parser.parse_from_file(str(path)):
            errors = (self._parser.get_error(index) for index in range(self._parser.num_errors))
            raise BuildError("; ".join(dict.fromkeys(map(_parser_error, errors))) or f"{path} can't be read.")
        if problems := [*_names(self._network, graph), *_tensors(trt, self._network, graph)]:
            raise BuildError("; ".join(problems))

    @property
    def layers(self) -> int:
        """How many TensorRT makes of the nodes, before it fuses them."""
        return int(self._network.num_layers)

    def build(self, configure: Callable[[Any], None]) -> Any:
        """The serialised engine (an `IHostMemory`) for the registry's profile.

        Args:
            configure: is handed the `IBuilderConfig`, once the profile is in it.

        Raises:
            BuildError: it does not build.
        """
        config = self._builder.create_builder_config()
        profile = self._builder.create_optimization_profile()
        for name, shapes in self._graph.profile().items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
        configure(config)
        self._logger.errors.clear()
        engine = self._builder.build_serialized_network(self._network, config)
        if engine is None:
            raise BuildError("; ".join(dict.fromkeys(map(_tidy, self._logger.errors))) or "No engine, and no reason.")
        return engine


@functools.cache
def logger(interface: Any) -> Any:
    """A ``trt.ILogger`` with a list ``errors``; one a process, since TensorRT goes on with the first that it meets."""

    def log(self: Any, severity: Any, message: str) -> None:
        if severity in (interface.ERROR, interface.INTERNAL_ERROR):
            self.errors.append(message)

    return type("Log", (interface,), {"log": log, "errors": []})()


def _parser_error(error: Any) -> str:
    """``node 'det' (Det): unsupported node``, and why where the parser says so."""
    why = str(error.code().name).replace("_", " ").lower()
    said = str(error.desc()).removeprefix("Assertion failed: ").strip()
    where = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_operator() else ""
    return where + (why if said in ("", "false") else f"{why}: {said}")


def _tidy(message: str) -> str:
    """Without what only NVIDIA can use: places in its sources."""
    message = re.sub(r"^\w+::\w+: Error Code \d+: ", "", message)
    return re.sub(r"\[\w+\.cpp:\d+: \w+\] |\.? In \w+ at /[^\s)]+", "", message)


def _ends(network: Any) -> tuple[tuple[str, list[Any]], tuple[str, list[Any]]]:
    return (
        ("inputs", [network.get_input(index) for index in range(network.num_inputs)]),
        ("outputs", [network.get_output(index) for index in range(network.num_outputs)]),
    )


def _names(network: Any, graph: Graph) -> Iterator[str]:
    for (kind, tensors), wanted in zip(_ends(network), (graph.inputs, graph.outputs), strict=True):
        found, expected = [tensor.name for tensor in tensors], [tensor.name for tensor in wanted]
        if found != expected:
            yield f"the {kind} are {', '.join(found)}: expected {', '.join(expected)}"


def _tensors(trt: ModuleType, network: Any, graph: Graph) -> Iterator[str]:
    wanted = {tensor.name: tensor for tensor in (*graph.inputs, *graph.outputs)}
    for kind, tensors in _ends(network):
        for tensor in tensors:
            if tensor.name in wanted:
                for problem in _tensor(trt, tensor, wanted[tensor.name], unknown=kind == "outputs"):
                    node = _node(network, tensor.name)
                    yield f"{problem}, by node {node!r}" if node else problem


def _tensor(trt: ModuleType, tensor: Any, wanted: Tensor, unknown: bool) -> Iterator[str]:
    """What is wrong about it; of an output, TensorRT may not know a fixed dim ahead of time."""
    dims, shape = (BATCH, *wanted.dims), tuple(tensor.shape)
    if tensor.dtype != getattr(trt, wanted.dtype):
        yield f"{wanted.name} is {tensor.dtype.name.lower()}: expected {wanted.dtype}"
    if len(shape) != len(dims):
        yield f"{wanted.name} has {len(shape)} dims: expected {len(dims)}"
        return
    for index, (dim, size) in enumerate(zip(dims, shape, strict=True)):
        if isinstance(dim, str) and size != -1:
            yield f"dim {index} of {wanted.name} ({dim}) is fixed at {size}"
        if isinstance(dim, int) and size not in ((dim, -1) if unknown else (dim,)):
            yield f"dim {index} of {wanted.name} is {size if size != -1 else 'free'}: expected {dim}"


def _node(network: Any, name: str) -> str | None:
    """That makes the tensor ``name`` what it is: the nearest one before it that still had a size that may change."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    outputs = ((layer, layer.get_output(index)) for layer in layers for index in range(layer.num_outputs))
    makers = {tensor.name: layer for layer, tensor in outputs if tensor is not None}
    if name not in makers:
        return None
    waiting, seen = [makers[name]], {name}
    while waiting:
        layer = waiting.pop(0)
        tensors = [tensor for tensor in map(layer.get_input, range(layer.num_inputs)) if tensor is not None]
        if any(-1 in tuple(tensor.shape) for tensor in tensors):
            break
        waiting += [makers[tensor.name] for tensor in tensors if tensor.name in makers and tensor.name not in seen]
        seen.update(tensor.name for tensor in tensors)
    else:
        layer = makers[name]
    named = re.match(r"\[ONNX Layer: ([^|\]]+)", layer.metadata)  # a layer that only helps has another name
    return named[1].strip() if named else str(layer.name)
