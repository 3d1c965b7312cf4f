"""Graphs that are traced, what is refused, and how a file is compared with its module."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from talksplat_export import _onnx, feeds
from talksplat_export._onnx import ExportError
from talksplat_export.registry import BATCH, Graph, Range, Tensor, Tolerance

X, Y = Tensor("X", (3,)), Tensor("Y", (3,))


def described(
    inputs: tuple[Tensor, ...] = (X,), outputs: tuple[Tensor, ...] = (Y,), tolerance: float = 1e-4, **ranges: Range
) -> Graph:
    ranges = {BATCH: Range(1, 2, 4), **ranges}
    return Graph("scale", inputs, outputs, ranges, {"fp32": Tolerance(tolerance), "int8": Tolerance(correlation=0.99)})


class Scale(nn.Module):
    def __init__(self, factor: float = 2) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class Computes(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


@pytest.fixture(scope="module")
def doubled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("doubled") / "model.onnx"
    _onnx.write(path, _onnx.export(described(), Scale()).SerializeToString())
    return path


def test_the_file_has_the_names_and_dims_asked_for_and_no_traces_of_this_machine(doubled: Path) -> None:
    (found,) = feeds.session(doubled).get_inputs()
    assert (found.name, found.shape) == ("X", [BATCH, 3])
    (found,) = feeds.session(doubled).get_outputs()
    assert (found.name, found.shape) == ("Y", [BATCH, 3])
    assert onnx.load(doubled).ir_version == 10
    assert str(Path(__file__).parent).encode() not in doubled.read_bytes()


def test_every_dim_that_has_a_name_may_change() -> None:
    graph = described((Tensor("X", ("samples",)),), (Tensor("Y", ("samples",)),), samples=Range(1, 5, 9))
    model = _onnx.export(graph, Scale())
    for value in (*model.graph.input, *model.graph.output):
        assert [dim.dim_param for dim in value.type.tensor_type.shape.dim] == [BATCH, "samples"]


@pytest.mark.parametrize(
    ("function", "outputs", "message"),
    [
        (lambda x: x.reshape(2, -1), (Y,), r"Dim 0 of Y \(batch\) was fixed at 2"),
        (lambda x: x.sum(0, keepdim=True).expand(7, 3), (Y,), r"Dim 0 of Y \(batch\) was fixed at 7"),
        (lambda x: x[:, :2].contiguous(), (Y,), "Dim 1 of Y is 2, not 3"),
        (lambda x: x.long(), (Y,), "element type 7, not float32"),
        (lambda x: x[..., None] * 1, (Y,), "3 dims, not 2"),
        (lambda x: (x + 1, x + 2), (Y,), r"\['Y', '.*'\] where \['Y'\] were asked for"),
        (lambda x: x.t() @ x, (Tensor("Y", (3,)),), "Dim 0 of Y"),
        (
            lambda x: torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)),
            (Y,),
            r"If \(node_\w+\)",
        ),
    ],
    ids=["reshaped", "expanded", "cut", "whole numbers", "a dim more", "an output more", "no batch", "control flow"],
)
def test_what_is_not_as_described_is_an_error(
    function: Callable[..., Any], outputs: tuple[Tensor, ...], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        _onnx.export(described(outputs=outputs), Computes(function))


def model_of(nodes: list[onnx.NodeProto], outputs: tuple[str, ...] = ("Y",), **kwargs: Any) -> onnx.ModelProto:
    def value(name: str) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [kwargs.get("batch", BATCH), 3])

    graph = onnx.helper.make_graph(nodes, "graph", [value("X")], [value(name) for name in outputs])
    opset = onnx.helper.make_opsetid("", kwargs.get("opset", _onnx.OPSET))
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=kwargs.get("ir_version", 10))


def node(kind: str = "Relu", output: str = "Y", domain: str = "") -> onnx.NodeProto:
    return onnx.helper.make_node(kind, ["X"], [output], name="mine", domain=domain)


def test_what_another_tool_made_is_checked_by_the_same_rules() -> None:
    _onnx.check(model_of([node()]), described())
    foreign = model_of([node("Gelu", domain="com.microsoft")])
    foreign.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    for broken, message in (
        (model_of([node()], batch=2), r"Dim 0 of X \(batch\) was fixed at 2"),
        (model_of([node()], opset=20), r"opset \[20\]"),
        (model_of([node()], ir_version=9), "IR 9"),
        (model_of([node(output="Z")], ("Z",)), r"\['Z'\] where \['Y'\]"),
        (foreign, r"Gelu \(mine\)"),
    ):
        with pytest.raises(ExportError, match=message):
            _onnx.check(broken, described())


def batch(*values: float) -> list[feeds.Feed]:
    return [{"X": np.array([[value, 1, 2]], np.float32)} for value in values]


def test_parity_measures_and_refuses_a_difference(doubled: Path) -> None:
    (found,) = _onnx.parity(described(), Scale(2), doubled, batch(10, 3))
    assert (found.output, found.difference, found.correlation) == ("Y", 0, 1)
    (found,) = _onnx.parity(described(tolerance=0.3), Scale(2.5), doubled, batch(10, 3))
    assert found.difference == pytest.approx(0.2)  # 5 of 25
    with pytest.raises(ExportError, match=r"Y differs from the module by 2\.0e-01"):
        _onnx.parity(described(tolerance=0.1), Scale(2.5), doubled, batch(10, 3))


def test_parity_refuses_other_shapes(doubled: Path) -> None:
    with pytest.raises(ExportError, match=r"Y is \(1, 3\) where the module gives \(1, 6\)"):
        _onnx.parity(described(), Computes(lambda x: torch.cat([x, x], 1)), doubled, batch(1))


def test_in_int8_the_correlation_counts(doubled: Path) -> None:
    _onnx.parity(described(), Scale(2.5), doubled, batch(10, 3), "int8")
    with pytest.raises(ExportError, match="correlates by -1"):
        _onnx.parity(described(), Scale(-2), doubled, batch(10, 3), "int8")


numbers = st.lists(st.floats(width=32), min_size=3, max_size=9).map(
    lambda values: np.array(values[: len(values) // 3 * 3], np.float32).reshape(-1, 3)
)


@settings(max_examples=60)
@given(numbers, st.sampled_from([2.0, 2.001, -2.0, float("nan"), float("inf")]), st.sampled_from(["fp32", "int8"]))
def test_parity_lets_nothing_through_that_is_not_finite_or_differs(
    doubled: Path, x: npt.NDArray[np.float32], factor: float, precision: Any
) -> None:
    """NaN, infinities and what overflows are refused; what is finite passes exactly if it is within the tolerance."""
    with np.errstate(over="ignore", invalid="ignore"):
        expected, actual = x * np.float32(factor), x * np.float32(2)
    whole = bool(np.isfinite(expected).all() and np.isfinite(actual).all())
    try:
        (found,) = _onnx.parity(described(), Scale(factor), doubled, [{"X": x}], precision)
    except ExportError:
        assert not whole or factor != 2
    else:
        assert whole
        assert precision == "int8" or np.abs(expected - actual).max() <= 1e-4 * np.abs(expected).max()
        assert np.isfinite([found.difference, found.correlation]).all()


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    _onnx.write(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        _onnx.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
