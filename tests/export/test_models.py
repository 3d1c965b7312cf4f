"""What is exported anew, and what is left alone."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from talksplat_export import models
from talksplat_export._wheels import WeightsError
from talksplat_export.models import Model

QUIET = Console(quiet=True)


class Exporter:
    """Stands in for a module of the package."""

    def __init__(self) -> None:
        self.runs = 0
        self.fails = False

    def export(self, repository: Path, size: str = "base") -> None:
        self.runs += 1
        path = repository / "echo" / "1" / "model.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(size)
        if self.fails:
            raise KeyboardInterrupt


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Exporter:
    exporter = Exporter()
    fake = SimpleNamespace(import_module=lambda name, package: exporter)
    monkeypatch.setattr(models, "importlib", fake)
    return exporter


@pytest.fixture
def model(tmp_path: Path) -> Model:
    weights = tmp_path / "weights"
    weights.write_text("first")
    return Model("echo", ["echo/1/model.onnx"], [weights], {"size": "tiny"})


def test_the_second_time_nothing_is_done(exporter: Exporter, model: Model, tmp_path: Path) -> None:
    for _ in range(2):
        models.export(tmp_path, [model], QUIET)
    assert exporter.runs == 1
    assert (tmp_path / "echo" / "1" / "model.onnx").read_text() == "tiny"


def test_other_weights_other_options_and_a_missing_file_are_exported_anew(
    exporter: Exporter, model: Model, tmp_path: Path
) -> None:
    models.export(tmp_path, [model], QUIET)
    (tmp_path / "weights").write_text("second")
    models.export(tmp_path, [model], QUIET)
    assert exporter.runs == 2
    models.export(tmp_path, [Model("echo", model.files, model.inputs, {"size": "base"})], QUIET)
    assert exporter.runs == 3
    (tmp_path / "echo" / "1" / "model.onnx").unlink()
    models.export(tmp_path, [model], QUIET)
    assert exporter.runs == 4


def test_an_interrupted_export_is_done_anew(exporter: Exporter, model: Model, tmp_path: Path) -> None:
    models.export(tmp_path, [model], QUIET)
    (tmp_path / "weights").write_text("second")
    exporter.fails = True
    with pytest.raises(KeyboardInterrupt):
        models.export(tmp_path, [model], QUIET)
    (tmp_path / "weights").write_text("first")  # even where the old stamp would fit again
    exporter.fails = False
    models.export(tmp_path, [model], QUIET)
    assert exporter.runs == 3


def test_what_is_up_to_date_costs_no_import_of_torch(repository: Path) -> None:
    code = f"""if True:
        import sys
        from pathlib import Path
        from rich.console import Console
        from talksplat_export import models
        models.export(Path({str(repository)!r}), models.models(), Console())
        assert "torch" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "up to date" in done.stdout


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no model\.safetensors"):
        models.models(asr_weights=tmp_path)
