import os
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from talksplat_export import _onnx
from talksplat_export._onnx import ExportError

BATCH = {0: "batch"}


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_the_file_has_the_names_and_dims_asked_for_and_no_traces_of_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "scale" / "1" / "model.onnx"
    _onnx.export(Scale(2), path, {"X": torch.ones(2, 3)}, ["Y"], {"X": BATCH, "Y": BATCH})
    (found,) = _onnx.session(path).get_inputs()
    assert (found.name, found.shape) == ("X", ["batch", 3])
    (found,) = _onnx.session(path).get_outputs()
    assert (found.name, found.shape) == ("Y", ["batch", 3])
    assert onnx.load(path).ir_version == 10
    assert str(Path(__file__).parent).encode() not in path.read_bytes()
    assert list(path.parent.iterdir()) == [path]


def test_a_dim_that_the_exporter_fixes_is_an_error(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, -1)

    with pytest.raises(ExportError, match="fixed"):
        _onnx.export(Fixed(), tmp_path / "model.onnx", {"X": torch.ones(2, 3)}, ["Y"], {"X": BATCH, "Y": BATCH})
    assert not list(tmp_path.iterdir())


def test_a_dim_that_is_free_without_being_asked_for_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Dim 0 of Y"):
        _onnx.export(Scale(2), tmp_path / "model.onnx", {"X": torch.ones(2, 3)}, ["Y"], {"X": BATCH})
    assert not list(tmp_path.iterdir())


def test_control_flow_is_an_error(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))
            return y

    with pytest.raises(ExportError, match="If"):
        _onnx.export(Branch(), tmp_path / "model.onnx", {"X": torch.ones(2, 3)}, ["Y"], {"X": BATCH, "Y": BATCH})
    assert not list(tmp_path.iterdir())


def test_too_few_output_names_are_an_error(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1, x + 2

    with pytest.raises(ExportError, match="returns 2 tensors"):
        _onnx.export(Two(), tmp_path / "model.onnx", {"X": torch.ones(2, 3)}, ["Y"], {})


def test_parity_measures_and_refuses_a_difference(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    _onnx.export(Scale(2), path, {"X": torch.ones(2, 3)}, ["Y"], {"X": BATCH, "Y": BATCH})
    inputs = {"X": torch.full((4, 3), 10.0)}
    assert _onnx.parity(Scale(2), path, inputs, 0) == 0
    assert _onnx.parity(Scale(2.5), path, inputs, 0.3) == pytest.approx(0.2)  # 5 of 25
    with pytest.raises(ExportError, match=r"2\.0e-01"):
        _onnx.parity(Scale(2.5), path, inputs, 0.1)
    with pytest.raises(ExportError, match="nan"):
        _onnx.parity(Scale(2), path, {"X": torch.full((4, 3), torch.nan)}, 0.1)


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
