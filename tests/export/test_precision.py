"""fp16 and int8: what a graph becomes, what it keeps in fp32, and that it still computes what torch computes."""

import builtins
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from talksplat_export import _onnx, feeds, models, outcome, precision, registry, vad
from talksplat_export._onnx import ExportError
from talksplat_export.precision import PrecisionError
from talksplat_export.registry import BATCH, Graph, Precision, Range, Tensor, Tolerance

SMALL = [
    (graph.name, each)
    for graph in registry.GRAPHS
    for each in graph.tolerances
    if each != "fp32" and not graph.name.startswith("asr")  # those take half a minute each: `make aot`
]


@pytest.fixture(scope="module")
def made(exported: Callable[..., Path]) -> dict[tuple[str, Precision], Path]:
    """What `talksplat-export models` makes and has compared with torch on speech that was not calibrated on."""
    names = {name for name, _ in SMALL}
    repository = exported([model for model in models.models() if model.name in names], "fp16", "int8")
    return {(name, each): models.path(name, each, repository) for name, each in SMALL}


@pytest.mark.parametrize(("name", "each"), SMALL)
def test_it_has_the_same_tensors_and_computes_in_its_precision(
    made: dict[tuple[str, Precision], Path], name: str, each: Precision
) -> None:
    model = onnx.load(made[name, each])
    _onnx.check(model, registry.graph(name))
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    assert (TensorProto.FLOAT16 if each == "fp16" else TensorProto.INT8) in kinds or not registry.graph(name).keep
    operators = {node.op_type for node in model.graph.node}
    assert "Cast" in operators if each == "fp16" else {"QuantizeLinear", "DequantizeLinear"} <= operators


@pytest.mark.parametrize(("name", "each"), SMALL)
def test_the_figures_are_within_the_tolerance(
    made: dict[tuple[str, Precision], Path], repository: Path, name: str, each: Precision
) -> None:
    (model,) = (model for model in models.models() if model.name == name)
    tolerance = registry.graph(name).tolerances[each]
    rows = model.rows(each, repository)
    assert rows
    for row in rows:
        found = _onnx.Deviation(str(row["output"]), float(row["difference"] or 0), float(row["correlation"] or 0))
        assert found.is_within(tolerance)
    assert any(row["difference"] for row in rows)  # it is another precision, so not the same


@pytest.mark.parametrize(("each", "decibels"), [("fp16", 60), ("int8", 38)])
def test_people_see_next_to_nothing_of_it(
    made: dict[tuple[str, Precision], Path], repository: Path, each: Precision, decibels: float
) -> None:
    found = outcome.frames(each, repository)
    assert found["frames"] == 152
    assert decibels < float(found["worst_psnr_db"] or 0) < 100  # other frames than fp32's, but hardly
    assert float(found["coefficients_r"] or 0) > 0.99


def test_int8_is_as_tensorrt_wants_it(made: dict[tuple[str, Precision], Path]) -> None:
    """Signed and symmetric, biases in fp32."""
    for (_, each), path in made.items():
        if each == "int8":
            model = onnx.load(path)
            constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
            for node in model.graph.node:
                if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                    zero = constants[node.input[2]]
                    assert zero.dtype == np.int8
                    assert not zero.any()
            assert np.int32 not in {array.dtype.type for array in constants.values()}


def test_the_log_mel_stays_in_fp32(repository: Path) -> None:
    model = onnx.load(repository / "audio_encoder" / "1" / "model.onnx")
    kept = precision.kept(model, registry.graph("audio_encoder").keep["fp16"])
    assert {node.name for node in model.graph.node if node.op_type == "Log"} <= kept
    stem = [node for node in model.graph.node if any("encoder.stem" in name for name in node.input)]
    assert stem
    assert kept.isdisjoint(node.name for node in stem)  # it ends at the encoder's first layer


# What needs no real net


def toy(nodes: list[onnx.NodeProto], weights: dict[str, Any]) -> onnx.ModelProto:
    value = onnx.helper.make_tensor_value_info
    tensors = [onnx.numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in weights.items()]
    shape: list[str | int | None] = [BATCH, 4]
    inputs, outputs = ([value(name, TensorProto.FLOAT, shape)] for name in ("X", "Y"))
    graph = onnx.helper.make_graph(nodes, "toy", inputs, outputs, tensors)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)


def node(kind: str, name: str, *tensors: str) -> onnx.NodeProto:
    return onnx.helper.make_node(kind, tensors[:-1], [tensors[-1]], name=name)


CHAIN = toy(
    [
        node("Abs", "before", "X", "a"),
        node("Transpose", "turned", "first", "t"),
        node("MatMul", "one", "a", "t", "b"),
        node("Relu", "after", "b", "c"),
        node("Mul", "mixed", "c", "a", "d"),
        node("MatMul", "two", "d", "second", "e"),
        node("Add", "end", "e", "c", "Y"),
    ],
    {"first": np.eye(4), "second": np.eye(4) * 2},
)
TOY = Graph(
    "toy",
    (Tensor("X", (4,)),),
    (Tensor("Y", (4,)),),
    {BATCH: Range(1, 2, 4)},
    {"fp32": Tolerance(1e-4), "fp16": Tolerance(5e-3), "int8": Tolerance(correlation=0.99)},
)
BATCHES: list[feeds.Feed] = [{"X": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)}]


def test_kept_is_what_leads_to_the_weights_and_what_follows_up_to_the_next() -> None:
    assert precision.kept(CHAIN, ["first"]) == {"before", "turned", "one", "after", "mixed"}
    assert precision.kept(CHAIN, ["second"]) == {"two"}
    assert precision.kept(CHAIN, ["first", "second"]) == {node.name for node in CHAIN.graph.node}
    assert precision.kept(CHAIN, []) == set()
    with pytest.raises(PrecisionError, match="no weights whose names begin with 'third'"):
        precision.kept(CHAIN, ["first", "third"])


@pytest.mark.parametrize("each", ["fp16", "int8"])
def test_what_is_kept_is_computed_in_fp32(tmp_path: Path, each: Precision) -> None:
    path = tmp_path / "toy.onnx"
    onnx.save(CHAIN, path)
    every = precision.reduced(TOY, each, path, BATCHES)
    half = precision.reduced(replace(TOY, keep={each: ("first",)}), each, path, BATCHES)
    assert (precision.fp32_nodes(every), precision.fp32_nodes(half)) == ("", "MatMul 1")
    _onnx.write(path, half.SerializeToString())
    (found,) = feeds.session(path, each).run(None, BATCHES[0])
    expected = np.abs(BATCHES[0]["X"]) ** 2 * 2 + np.abs(BATCHES[0]["X"])
    np.testing.assert_allclose(
        found, expected, atol=0.005 * expected.max() if each == "fp16" else 0.02 * expected.max()
    )


@pytest.mark.parametrize("each", ["fp16", "int8"])
def test_what_comes_out_is_checked_like_what_went_in(tmp_path: Path, each: Precision) -> None:
    path = tmp_path / "toy.onnx"
    onnx.save(CHAIN, path)
    with pytest.raises(ExportError, match=r"\['Y'\] where \['Z'\] were asked for"):
        precision.reduced(replace(TOY, outputs=(Tensor("Z", (4,)),)), each, path, BATCHES)


def test_without_modelopt_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "toy.onnx"
    onnx.save(CHAIN, path)
    for name in [name for name in sys.modules if name.startswith("modelopt")]:
        monkeypatch.delitem(sys.modules, name)
    usual = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("modelopt"):
            raise ModuleNotFoundError(f"No module named {name!r}", name="modelopt")
        return usual(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PrecisionError, match=r"modelopt is not installed.*pip install .*\./export\[precision\]"):
        precision.reduced(TOY, "fp16", path, BATCHES)


def test_the_tools_are_quiet_and_leave_logging_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "toy.onnx"
    onnx.save(CHAIN, path)
    before = logging.root.level, list(logging.root.handlers), logging.root.manager.disable
    for each in ("fp16", "int8"):
        precision.reduced(TOY, each, path, BATCHES)
    assert (logging.root.level, logging.root.handlers, logging.root.manager.disable) == before
    assert capfd.readouterr() == ("", "")


def test_a_graph_whose_precision_differs_too_much_is_refused(repository: Path, tmp_path: Path) -> None:
    """The spectrum in int8: what the registry keeps out of it."""
    (graph, module), path = vad.graphs()[0], tmp_path / "vad.onnx"
    heard, unheard = feeds.halves()
    source, batches = models.path("vad", repository=repository), feeds.feeds("vad", repository, heard)
    _onnx.write(path, precision.reduced(replace(graph, keep={}), "int8", source, batches).SerializeToString())
    with pytest.raises(ExportError, match="SPEECH differs from the module"):
        _onnx.parity(graph, module, path, feeds.feeds("vad", repository, unheard), "int8")
