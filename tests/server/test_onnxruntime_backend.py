"""The backend without Triton: a fake `triton_python_backend_utils` in place of the real one."""

import importlib.util
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from talksplat.server import ROOT

VECTOR = [{"name": "X", "data_type": "TYPE_FP32", "dims": ["2"]}]  # int64 comes as a string in the config's JSON
DOUBLED = [{"name": "Y", "data_type": "TYPE_FP32", "dims": ["2"]}]


@dataclass
class Tensor:
    name: str
    array: Any

    def as_numpy(self) -> Any:
        return self.array


class TritonError(Exception):
    INTERNAL = 1

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class TritonModelException(Exception):  # noqa: N818 (its name in pb_utils)
    pass


@dataclass
class InferenceResponse:
    output_tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None

    def array(self, name: str = "Y") -> Any:
        assert self.error is None, self.error
        return next(tensor.array for tensor in self.output_tensors if tensor.name == name)


FINAL = 1


class Request:
    def __init__(self, *wanted: str, **arrays: Any) -> None:
        self.arrays = {name: np.asarray(array) for name, array in arrays.items()}
        self.wanted = list(wanted or ("Y",))
        self.sent: list[tuple[InferenceResponse, int]] = []

    def get_response_sender(self) -> Any:
        return SimpleNamespace(send=lambda response, flags: self.sent.append((response, flags)))

    def requested_output_names(self) -> list[str]:
        return self.wanted


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    fake: Any = ModuleType("triton_python_backend_utils")
    fake.Tensor, fake.InferenceResponse = Tensor, InferenceResponse
    fake.TritonError, fake.TritonModelException = TritonError, TritonModelException
    fake.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
    fake.Logger = SimpleNamespace(log_warn=lambda _: None)
    fake.get_input_tensor_by_name = lambda request, name: Tensor(name, request.arrays[name])
    fake.triton_string_to_numpy = {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64}.__getitem__
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    spec = importlib.util.spec_from_file_location("onnxruntime_backend", ROOT / "backends/onnxruntime/model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_graph(folder: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], **constants: Any) -> None:
    initializers = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (folder / "1").mkdir(exist_ok=True)
    onnx.save(model, folder / "1" / "model.onnx")


def value(name: str, dims: list[Any], kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, dims)


def write_doubling(folder: Path, first_dim: int | str = "batch") -> None:
    doubling = [helper.make_node("Add", ["X", "X"], ["Y"])]
    write_graph(folder, doubling, [value("X", [first_dim, 2])], [value("Y", [first_dim, 2])])


def load(
    backend: ModuleType, folder: Path, inputs: list[Any] = VECTOR, outputs: list[Any] = DOUBLED, batch: int = 8
) -> Any:
    config = {"name": "graph", "max_batch_size": batch, "input": inputs, "output": outputs, "parameters": {}}
    model = backend.TritonPythonModel()
    model.initialize({"model_config": json.dumps(config), "model_repository": str(folder), "model_version": "1"})
    return model


def test_requests_run_as_one_batch_and_each_gets_its_own_rows(backend: ModuleType, tmp_path: Path) -> None:
    write_doubling(tmp_path)
    model = load(backend, tmp_path)
    runs, run = [], model.session.run

    def counted(names: list[str], feeds: dict[str, Any]) -> Any:
        runs.append(len(feeds["X"]))
        return run(names, feeds)

    model.session = SimpleNamespace(run=counted)
    arrays = [np.random.default_rng(rows).random((rows, 2), np.float32) for rows in (1, 3, 2)]
    responses = model.execute([Request(X=array) for array in arrays])
    for response, array in zip(responses, arrays, strict=True):
        np.testing.assert_array_equal(response.array(), 2 * array)
    assert runs == [6]


def test_a_large_request_is_answered_once_beside_small_ones_that_do_not_wait_for_it(
    backend: ModuleType, tmp_path: Path
) -> None:
    write_doubling(tmp_path)
    model = load(backend, tmp_path, batch=64)
    gate, run = threading.Event(), model.session.run

    def slow(names: list[str], feeds: dict[str, Any]) -> Any:
        assert len(feeds["X"]) <= backend.LARGE or gate.wait(30)
        return run(names, feeds)

    model.session = SimpleNamespace(run=slow)
    small, large = np.ones((2, 2), np.float32), np.ones((backend.LARGE + 1, 2), np.float32)
    requests = [Request(X=small), Request(X=large), Request(X=3 * small), Request("nothing", X=large)]
    answers = model.execute(requests)
    assert [answer is None for answer in answers] == [False, True, False, True]
    np.testing.assert_array_equal(answers[2].array(), 6 * small)
    assert requests[1].sent == []
    large[:] = 7  # the memory is Triton's again
    gate.set()
    model.finalize()
    ((response, flags),), ((failed, _),) = requests[1].sent, requests[3].sent
    assert flags == FINAL
    np.testing.assert_array_equal(response.array(), np.full_like(large, 2))
    assert failed.error is not None


def test_a_request_gets_the_outputs_that_it_asks_for(backend: ModuleType, tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["X", "X"], ["Y"]), helper.make_node("Neg", ["X"], ["Z"])]
    write_graph(tmp_path, nodes, [value("X", ["b", 2])], [value("Y", ["b", 2]), value("Z", ["b", 2])])
    model = load(backend, tmp_path, outputs=[*DOUBLED, {**DOUBLED[0], "name": "Z"}])
    one = np.ones((1, 2), np.float32)
    first, second = model.execute([Request("Z", X=one), Request("Y", "Z", X=3 * one)])
    assert [tensor.name for tensor in first.output_tensors] == ["Z"]
    np.testing.assert_array_equal(first.array("Z"), -one)
    np.testing.assert_array_equal(second.array("Y"), 6 * one)
    np.testing.assert_array_equal(second.array("Z"), -3 * one)


def test_one_bad_request_does_not_fail_its_neighbours(backend: ModuleType, tmp_path: Path) -> None:
    table = np.arange(4, dtype=np.float32)
    nodes = [helper.make_node("Gather", ["table", "X"], ["Y"])]
    integers = [{"name": "X", "data_type": "TYPE_INT64", "dims": ["1"]}]
    outputs = [{"name": "Y", "data_type": "TYPE_FP32", "dims": ["1"]}]
    inside = [value("X", ["b", 1], TensorProto.INT64)]
    write_graph(tmp_path, nodes, inside, [value("Y", ["b", 1])], table=table)
    model = load(backend, tmp_path, integers, outputs)
    good, bad, other = model.execute([Request(X=np.array([[index]])) for index in (2, 99, 3)])
    assert good.array().item() == 2
    assert other.array().item() == 3
    assert bad.error.code == TritonError.INTERNAL
    assert "graph could not be run" in str(bad.error)


def test_an_output_of_another_shape_than_promised_is_an_error(backend: ModuleType, tmp_path: Path) -> None:
    # the graph's dims are free, so only the run shows that two columns become three
    nodes = [helper.make_node("Concat", ["X", "X"], ["Y"], axis=1)]
    write_graph(tmp_path, nodes, [value("X", ["b", "n"])], [value("Y", ["b", "m"])])
    model = load(backend, tmp_path)
    for response in model.execute([Request(X=np.zeros((1, 2), np.float32))] * 2):
        assert response.error.code == TritonError.INTERNAL
        assert "output Y is float32 [1, 4], the config promises float32 [1, 2]" in str(response.error)


def test_without_batching_dims_are_taken_as_they_are(backend: ModuleType, tmp_path: Path) -> None:
    write_doubling(tmp_path, first_dim=3)
    tensors = [{"name": name, "data_type": "TYPE_FP32", "dims": ["3", "2"]} for name in "XY"]
    model = load(backend, tmp_path, tensors[:1], tensors[1:], batch=0)
    responses = model.execute([Request(X=np.full((3, 2), n, np.float32)) for n in (1, 2)])
    assert [response.array().sum() for response in responses] == [12, 24]


@pytest.mark.parametrize(
    ("inputs", "outputs", "reason"),
    [
        ([{**VECTOR[0], "name": "A"}], DOUBLED, "input A is not among the graph's X"),
        (VECTOR, [{**DOUBLED[0], "name": "B"}], "output B is not among the graph's Y"),
        ([{**VECTOR[0], "data_type": "TYPE_INT64"}], DOUBLED, "input X is TYPE_INT64, the graph's is TYPE_FP32"),
        ([{**VECTOR[0], "dims": ["3"]}], DOUBLED, r"input X has dims \[3\], the graph's are \[2\]"),
        (VECTOR, [{**DOUBLED[0], "dims": ["2", "1"]}], r"output Y has dims \[2, 1\], the graph's are \[2\]"),
        ([], DOUBLED, "input X is missing"),
    ],
)
def test_a_config_that_does_not_fit_the_graph_is_refused_at_load(
    backend: ModuleType, tmp_path: Path, inputs: list[Any], outputs: list[Any], reason: str
) -> None:
    write_doubling(tmp_path)
    with pytest.raises(TritonModelException, match=reason):
        load(backend, tmp_path, inputs, outputs)


def test_a_graph_of_fixed_batch_is_refused_for_batching(backend: ModuleType, tmp_path: Path) -> None:
    write_doubling(tmp_path, first_dim=1)
    with pytest.raises(TritonModelException, match="can't be batched"):
        load(backend, tmp_path)


def test_a_missing_or_broken_file_is_named(backend: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    with pytest.raises(TritonModelException, match=r"model\.onnx can't be opened"):
        load(backend, tmp_path)
    (tmp_path / "1" / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(TritonModelException, match=r"model\.onnx can't be opened"):
        load(backend, tmp_path)
