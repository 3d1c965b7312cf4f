"""The gate without a GPU: real TensorRT-RTX compiles every graph, and names the node of one that it should not take."""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from talksplat_export import _onnx, _trt, aot, cli, models
from talksplat_export._trt import BuildError, MissingTensorRTError
from talksplat_export.aot import TARGETS, TURING, Job
from talksplat_export.registry import BATCH, GRAPHS, PRECISIONS, Graph, Range, Tensor, Tolerance

DIMS: tuple[int | str, ...] = ("batch", 4)
LARGE = ("asr_encoder", "asr_decoder")  # `make aot` compiles these, too, in other precisions than fp32


def toy(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, npt.NDArray[Any] | np.generic] | None = None,
    y_dims: Sequence[int | str] = DIMS,
    y_type: int = TensorProto.FLOAT,
) -> Job:
    """A graph from X [batch, 4] to Y, which the registry would have as float32 [batch, 4]."""
    x = helper.make_tensor_value_info("X", TensorProto.FLOAT, DIMS)
    y = helper.make_tensor_value_info("Y", y_type, y_dims)
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()]
    proto = helper.make_graph(nodes, "toy", [x], [y], weights)
    opset = [helper.make_opsetid("", _onnx.OPSET)]
    path.write_bytes(helper.make_model(proto, opset_imports=opset, ir_version=_onnx.IR_VERSION).SerializeToString())
    graph = Graph(
        "toy", (Tensor("X", (4,)),), (Tensor("Y", (4,)),), {BATCH: Range(1, 2, 8)}, {"fp32": Tolerance(difference=0)}
    )
    return Job(graph, "fp32", path)


def node(kind: str, inputs: str, outputs: str, name: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), outputs.split(), name=name, **attributes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "toy.onnx"


@pytest.mark.timeout(600)  # the first time precisions are exported
def test_every_graph_compiles_for_every_gpu_and_the_small_ones_in_every_precision(
    exported: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = [graph.name for graph in GRAPHS if graph.name not in LARGE]
    repository = exported([model for model in models.models() if model.name in small], *PRECISIONS)
    wanted = aot.jobs(PRECISIONS, small, repository) + aot.jobs(["fp32"], LARGE, repository)
    monkeypatch.setattr(aot, "jobs", lambda *_: wanted)
    table = tmp_path / "aot.json"
    status = cli.main(["aot", "--json", str(table)])
    said = capsys.readouterr().out
    rows = json.loads(table.read_text())["rows"]
    assert [row["problem"] for row in rows if "problem" in row] == []
    assert status == 0
    compiled = {(row["graph"], row["precision"]): row["targets"].split() for row in rows}
    assert list(compiled) == [(job.graph.name, job.precision) for job in wanted]
    assert {name for name, _ in compiled} == {graph.name for graph in GRAPHS}
    for job, targets in compiled.items():
        assert targets == [each for each in TARGETS if each != TURING or job not in aot.TURING_REFUSES]
    refused = {(row["graph"], row["precision"]): row["refused"] for row in rows if "refused" in row}  # was tried
    assert refused == {job: f"{TURING}: {why}" for job, why in aot.TURING_REFUSES.items() if job in compiled}
    assert all(row["mb"] > 0 and row["layers"] > 0 for row in rows)
    assert "SM90" in said


def test_control_flow_is_named_even_where_tensorrt_takes_it(path: Path) -> None:
    y = helper.make_tensor_value_info("Y", TensorProto.FLOAT, DIMS)
    branch = helper.make_graph([node("Identity", "X", "Y", "inner")], "branch", [], [y])
    job = toy(
        path,
        [node("If", "always", "Y", "choice", then_branch=branch, else_branch=branch)],
        {"always": np.array(True)},
    )
    assert "'choice' (If)" in str(aot.check(job)["problem"])
    times, go, value = (
        helper.make_tensor_value_info(name, kind, dims)
        for name, kind, dims in (
            ("i", TensorProto.INT64, []),
            ("go", TensorProto.BOOL, []),
            ("v", TensorProto.FLOAT, DIMS),
        )
    )
    out = helper.make_tensor_value_info("w", TensorProto.FLOAT, DIMS)
    body = helper.make_graph([node("Add", "v v", "w", "inner")], "body", [times, go, value], [go, out])
    job = toy(path, [node("Loop", "times go X", "Y", "again", body=body)], {"times": np.int64(3), "go": np.array(True)})
    assert "'again' (Loop)" in str(aot.check(job)["problem"])


def test_an_operator_that_tensorrt_lacks_is_named(path: Path) -> None:
    nodes = [node("Det", "square", "d", "volume"), node("Add", "X d", "Y", "sum")]
    problem = aot.check(toy(path, nodes, {"square": np.eye(4, dtype=np.float32)}))["problem"]
    assert problem == "node 'volume' (Det): unsupported node"


def test_quantisation_that_is_not_symmetric_is_named(path: Path) -> None:
    nodes = [node("QuantizeLinear", "X s z", "q", "quantise"), node("DequantizeLinear", "q s z", "Y", "dequantise")]
    problem = aot.check(toy(path, nodes, {"s": np.float32(0.1), "z": np.uint8(128)}))["problem"]
    assert "'quantise' (QuantizeLinear)" in str(problem)
    assert "zero point" in str(problem)


def test_a_dim_that_was_fixed_is_named_with_the_node_that_did_it(path: Path) -> None:
    nodes = [node("Reshape", "X shape", "r", "squeeze"), node("Neg", "r", "Y", "negate")]
    problem = aot.check(toy(path, nodes, {"shape": np.array([2, 4])}, y_dims=(2, 4)))["problem"]
    assert problem == "dim 0 of Y (batch) is fixed at 2, by node 'squeeze'"


def test_another_size_rank_or_name_is_named(path: Path) -> None:
    problem = aot.check(toy(path, [node("Concat", "X X", "Y", "twice", axis=1)], y_dims=("batch", 8)))["problem"]
    assert problem == "dim 1 of Y is 8: expected 4, by node 'twice'"
    nodes = [node("Unsqueeze", "X axis", "Y", "deepen")]
    problem = aot.check(toy(path, nodes, {"axis": np.array([2])}, y_dims=("batch", 4, 1)))["problem"]
    assert problem == "Y has 3 dims: expected 2, by node 'deepen'"
    job = toy(path, [node("Neg", "X", "Y", "negate")])
    graph = Graph("toy", job.graph.inputs, (Tensor("Z", (4,)),), job.graph.ranges, job.graph.tolerances)
    assert aot.check(Job(graph, "fp32", path))["problem"] == "the outputs are Y: expected Z"


@given(
    dims=st.lists(st.one_of(st.integers(1, 9), st.sampled_from(["frames", "past"])), max_size=4),
    at=st.integers(0, 4),
    size=st.integers(-1, 9),
    is_output=st.booleans(),
)
def test_a_dim_is_as_the_registry_has_it_or_is_named(
    dims: list[int | str], at: int, size: int, is_output: bool
) -> None:
    trt: Any = SimpleNamespace(float32="FLOAT")
    wanted = [BATCH, *dims]
    shape = [-1 if isinstance(dim, str) else dim for dim in wanted]
    at %= len(shape)
    shape[at], right = size, shape[at]
    tensor = SimpleNamespace(dtype="FLOAT", shape=tuple(shape))
    problems = list(_trt._tensor(trt, tensor, Tensor("T", tuple(dims)), unknown=is_output))
    # of an output, TensorRT may not know ahead of time what is fixed
    if size == right or (is_output and size == -1):
        assert problems == []
    else:
        assert len(problems) == 1
        assert problems[0].startswith(f"dim {at} of T")


def test_another_type_is_named(path: Path) -> None:
    nodes = [node("Cast", "X", "Y", "narrow", to=TensorProto.FLOAT16)]
    problem = aot.check(toy(path, nodes, y_type=TensorProto.FLOAT16))["problem"]
    assert problem == "Y is half: expected float32, by node 'narrow'"


def test_types_that_do_not_fit_each_other_are_named(path: Path) -> None:
    nodes = [node("Cast", "X", "h", "narrow", to=TensorProto.FLOAT16), node("Add", "X h", "Y", "mixed")]
    assert "'mixed' (Add)" in str(aot.check(toy(path, nodes))["problem"])


def test_a_target_that_fails_alone_is_named_with_the_node(path: Path) -> None:
    job = toy(path, [node("MatMul", "X w", "Y", "product")], {"w": np.ones((4, 4), np.float32)})
    problem = str(aot.check(job)["problem"])
    assert problem.startswith(f"{TURING}: ")
    assert "'product'" in problem
    assert problem.endswith("FP32 GEMM is not supported)")
    assert "problem" not in aot.check(job, TARGETS[1:])


def test_a_refusal_that_is_none_any_more_is_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = toy(path, [node("Neg", "X", "Y", "negate")])
    assert aot.check(job)["targets"] == " ".join(TARGETS)
    monkeypatch.setattr(aot, "TURING_REFUSES", {("toy", "fp32"): "for no reason"})
    assert "refused no more" in str(aot.check(job)["problem"])


def test_a_refusal_for_another_reason_is_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "TURING_REFUSES", {("toy", "fp32"): "its matrix products are in fp32"})
    monkeypatch.setattr(aot, "_NO_PRODUCT", "something else")
    job = toy(path, [node("MatMul", "X w", "Y", "product")], {"w": np.ones((4, 4), np.float32)})
    assert str(aot.check(job)["problem"]).startswith(f"{TURING}: ")


def test_a_file_that_is_no_graph_is_said(path: Path) -> None:
    job = toy(path, [node("Neg", "X", "Y", "negate")])
    path.write_bytes(path.read_bytes()[:-7])
    assert "problem" in aot.check(job)


def test_a_failure_is_the_exit_status(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = toy(path, [node("Det", "square", "d", "volume"), node("Add", "X d", "Y", "sum")], {"square": np.eye(4)})
    good = toy(tmp_path / "good.onnx", [node("Neg", "X", "Y", "negate")])
    monkeypatch.setattr(aot, "jobs", lambda *_: [bad, good])
    assert cli.main(["aot", "--json", str(tmp_path / "aot.json")]) == 1
    assert "toy fp32: node 'volume' (Det)" in capsys.readouterr().out
    first, second = json.loads((tmp_path / "aot.json").read_text())["rows"]
    assert "problem" in first
    assert "problem" not in second


def die(job: Job) -> None:
    """What TensorRT does to a process at its worst."""
    os._exit(11)


def test_a_process_that_dies_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "check", die)
    with pytest.raises(BuildError, match="process"):
        aot.gate([toy(path, [node("Neg", "X", "Y", "negate")])], Console(quiet=True))


def test_models_that_were_not_exported_are_an_error_with_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["aot", "--repository", str(tmp_path / "model_repository"), "--precision", "fp32", "int8"]) == 1
    assert "talksplat-export models --precision fp32 int8" in capsys.readouterr().err


def test_without_tensorrt_rtx_it_is_said_how_to_get_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingTensorRTError, match=r"pip install .*tensorrt-rtx-cu13"):
        aot.gate([toy(path, [node("Neg", "X", "Y", "negate")])], Console(quiet=True))
