"""Python-based Triton backend that answers to ``backend: "onnxruntime"``, on PyPI's onnxruntime.

A config.pbtxt written for Triton's native ONNX Runtime backend works unchanged: the same file name, and the same
settings ``intra_op_thread_count``, ``inter_op_thread_count`` and ``optimization.graph.level``. What Triton leaves
unchecked for a Python model is checked here: at load, that the config promises what the graph computes; at each run,
that the outputs are what the config promises.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import triton_python_backend_utils as pb_utils

TYPES = {  # of a graph's tensor -> in a config
    "tensor(bool)": "TYPE_BOOL",
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(uint16)": "TYPE_UINT16",
    "tensor(uint32)": "TYPE_UINT32",
    "tensor(uint64)": "TYPE_UINT64",
    "tensor(int8)": "TYPE_INT8",
    "tensor(int16)": "TYPE_INT16",
    "tensor(int32)": "TYPE_INT32",
    "tensor(int64)": "TYPE_INT64",
    "tensor(float16)": "TYPE_FP16",
    "tensor(float)": "TYPE_FP32",
    "tensor(double)": "TYPE_FP64",
}
GRAPH_LEVELS = {  # optimization.graph.level, as the native backend reads it
    -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    0: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
}
ANY = -1  # a dim of free size in a config
LARGE = 16  # a request of more rows, such as an utterance's windows, runs in a thread beside the small ones

Tensors = dict[str, npt.NDArray[Any]]


class TritonPythonModel:
    """One ONNX graph; all requests that Triton hands over together run as one batch."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the graph and compare it with the config.

        Raises:
            TritonModelException: the file is missing or broken, or the config does not fit the graph.
        """
        config = json.loads(args["model_config"])
        self.name = config["name"]
        self.batching = config["max_batch_size"] > 0
        self.session = _open(Path(args["model_repository"], args["model_version"]), config)
        self.beside = ThreadPoolExecutor(1, thread_name_prefix="large")
        self.inputs = [node.name for node in self.session.get_inputs()]
        problems = _differences("input", config["input"], self.session.get_inputs(), self.batching)
        problems += _differences("output", config["output"], self.session.get_outputs(), self.batching)
        problems += [f"input {name} is missing" for name in self.inputs if name not in _names(config["input"])]
        if problems:
            raise pb_utils.TritonModelException(f"{self.name}: config.pbtxt and graph differ: {'; '.join(problems)}.")
        self.promised = {
            tensor["name"]: (pb_utils.triton_string_to_numpy(tensor["data_type"]), _dims(tensor))
            for tensor in config["output"]
        }

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request; None for a large one, which is answered later and holds up nobody meanwhile."""
        large = [request for request in requests if self.batching and self._rows(request) > LARGE]
        for request in large:
            self._run_beside(request)
        answers = iter(self._run_small([request for request in requests if request not in large]))
        return [None if request in large else next(answers) for request in requests]

    def finalize(self) -> None:
        """Answer what still runs."""
        self.beside.shutdown()

    def _rows(self, request: Any) -> int:
        return len(pb_utils.get_input_tensor_by_name(request, self.inputs[0]).as_numpy())

    def _run_beside(self, request: Any) -> None:
        sender, wanted = request.get_response_sender(), request.requested_output_names()
        feeds = {name: array.copy() for name, array in self._read(request).items()}  # Triton uses its memory again
        self.beside.submit(self._answer, sender, feeds, wanted)

    def _answer(self, sender: Any, feeds: Tensors, wanted: Sequence[str]) -> None:
        final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        try:
            sender.send(self._outcome(feeds, wanted), flags=final)
        except Exception as error:  # as where there is no shared memory for so much
            sender.send(self._failure(error), flags=final)

    def _run_small(self, requests: Sequence[Any]) -> list[Any]:
        """When the batch fails, each runs alone, so that only the bad one gets the error."""
        if self.batching and len(requests) > 1:
            try:
                return self._run_together(requests)
            except Exception as error:
                pb_utils.Logger.log_warn(f"{self.name}: running {len(requests)} requests one by one, since {error}")
        return [self._run_alone(request) for request in requests]

    def _run_together(self, requests: Sequence[Any]) -> list[Any]:
        batches = [self._read(request) for request in requests]
        wanted = [request.requested_output_names() for request in requests]
        ends = np.cumsum([len(batch[self.inputs[0]]) for batch in batches])
        feeds = {name: np.concatenate([batch[name] for batch in batches]) for name in self.inputs}
        results = self._run(feeds, sorted(set().union(*wanted)))
        return [
            _response({name: results[name][start:end] for name in names})
            for names, start, end in zip(wanted, [0, *ends[:-1]], ends, strict=True)
        ]

    def _run_alone(self, request: Any) -> Any:
        try:
            feeds = self._read(request)
        except Exception as error:
            return self._failure(error)
        return self._outcome(feeds, request.requested_output_names())

    def _outcome(self, feeds: Tensors, wanted: Sequence[str]) -> Any:
        try:
            return _response(self._run(feeds, wanted))
        except Exception as error:
            return self._failure(error)

    def _failure(self, error: Exception) -> Any:
        message = f"{self.name} could not be run: {error}"
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INTERNAL))

    def _read(self, request: Any) -> Tensors:
        return {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}

    def _run(self, feeds: Tensors, names: Sequence[str]) -> Tensors:
        """Run the graph; raise ValueError for an output that is not what the config promises."""
        results = dict(zip(names, self.session.run(list(names), feeds), strict=True))
        for name, array in results.items():
            dtype, dims = self.promised[name]
            expected = [len(feeds[self.inputs[0]]), *dims] if self.batching else dims
            if array.dtype != dtype or not _fits(expected, array.shape):
                found = f"{array.dtype} {list(array.shape)}"
                raise ValueError(f"output {name} is {found}, the config promises {np.dtype(dtype)} {expected}")
        return results


def _open(folder: Path, config: dict[str, Any]) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = int(_parameter(config, "intra_op_thread_count", "1"))
    options.inter_op_num_threads = int(_parameter(config, "inter_op_thread_count", "1"))
    # threads that spin while they wait would take the cores from the other models
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    level = config.get("optimization", {}).get("graph", {}).get("level", 0)
    options.graph_optimization_level = GRAPH_LEVELS[level]
    path = folder / (config.get("default_model_filename") or "model.onnx")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise pb_utils.TritonModelException(f"{config['name']}: {path} can't be opened: {error}") from error


def _parameter(config: dict[str, Any], name: str, default: str) -> str:
    parameter = config.get("parameters", {}).get(name)
    return str(parameter["string_value"]) if parameter else default


def _differences(kind: str, tensors: Sequence[dict[str, Any]], nodes: Sequence[Any], batching: bool) -> list[str]:
    """What the config says about its inputs or outputs and the graph does not, in words."""
    graph = {node.name: node for node in nodes}
    problems = []
    for tensor in tensors:
        name, kind_name = tensor["name"], f"{kind} {tensor['name']}"
        if name not in graph:
            problems.append(f"{kind_name} is not among the graph's {', '.join(graph)}")
            continue
        type_, shape = TYPES.get(graph[name].type, graph[name].type), _shape(graph[name])
        if tensor["data_type"] != type_:
            problems.append(f"{kind_name} is {tensor['data_type']}, the graph's is {type_}")
        if batching and shape[:1] != [ANY]:
            problems.append(f"{kind_name} can't be batched: the graph's dims are {shape}")
            continue
        expected = shape[batching:]
        if not _fits(expected, _dims(tensor)):
            problems.append(f"{kind_name} has dims {_dims(tensor)}, the graph's are {expected}")
    return problems


def _fits(expected: Sequence[int], dims: Sequence[int]) -> bool:
    return len(expected) == len(dims) and all(a in (b, ANY) for a, b in zip(expected, dims, strict=True))


def _shape(node: Any) -> list[int]:
    return [size if isinstance(size, int) else ANY for size in node.shape]


def _dims(tensor: dict[str, Any]) -> list[int]:
    return [int(size) for size in tensor["dims"]]  # the config comes as JSON, where int64 may be a string


def _names(tensors: Sequence[dict[str, Any]]) -> list[str]:
    return [tensor["name"] for tensor in tensors]


def _response(tensors: Tensors) -> Any:
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in tensors.items()])
