"""What is exported anew, what is left alone, and what happens to the rest when one graph fails."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from rich.console import Console
from torch import nn

from talksplat_export import _onnx, cli, feeds, models, registry
from talksplat_export._wheels import WeightsError
from talksplat_export.models import Model, ModelsError
from talksplat_export.registry import BATCH, Graph, Range, Tensor, Tolerance

QUIET = Console(quiet=True)
ECHO, OTHER = (
    Graph(name, (Tensor("X", (3,)),), (Tensor("Y", (3,)),), {BATCH: Range(1, 2, 4)}, {"fp32": Tolerance(1e-4)})
    for name in ("echo", "other")
)


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Exporter:
    """Stands in for a module of the package."""

    def __init__(self) -> None:
        self.runs = 0
        self.error: BaseException | None = None
        self.module: nn.Module = Twice()

    def graphs(self, size: str = "base") -> list[tuple[Graph, nn.Module]]:
        self.runs += 1
        if self.error:
            raise self.error
        return [(ECHO, self.module), (OTHER, Twice())]

    def accompany(self, repository: Path, size: str) -> None:
        (repository / "beside").write_text(size)


@pytest.fixture(scope="module")
def traced() -> onnx.ModelProto:
    return _onnx.export(ECHO, Twice())


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch, traced: onnx.ModelProto) -> Exporter:
    exporter = Exporter()
    monkeypatch.setattr(_onnx, "export", lambda *_: traced)  # as ever: tracing takes a second
    monkeypatch.setattr(models, "importlib", SimpleNamespace(import_module=lambda name, package: exporter))
    monkeypatch.setattr(registry, "GRAPHS", (ECHO, OTHER))
    monkeypatch.setattr(feeds, "feeds", lambda *_, own: [{"X": np.ones((2, 3), np.float32)}])
    return exporter


@pytest.fixture
def model(tmp_path: Path) -> Model:
    weights = tmp_path / "weights"
    weights.write_text("first")
    return Model("echo", "echo", [weights], {"size": "tiny"}, beside=["beside"])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "repository"


def test_the_second_time_nothing_is_done(exporter: Exporter, model: Model, place: Path) -> None:
    for _ in range(2):
        models.export(place, [model], QUIET)
    assert exporter.runs == 1
    path = models.path("echo", repository=place)
    assert feeds.session(path).run(None, {"X": np.ones((1, 3), np.float32)})[0].tolist() == [[2, 2, 2]]
    assert (place / "beside").read_text() == "tiny"
    assert sorted(each.name for each in path.parent.iterdir()) == ["model.onnx", "model.onnx.stamp"]


def test_other_weights_other_options_and_a_missing_file_are_exported_anew(
    exporter: Exporter, model: Model, place: Path, tmp_path: Path
) -> None:
    models.export(place, [model], QUIET)
    (tmp_path / "weights").write_text("second")
    models.export(place, [model], QUIET)
    assert exporter.runs == 2
    models.export(place, [Model("echo", "echo", model.inputs, {"size": "base"})], QUIET)
    assert exporter.runs == 3
    models.export(place, [model], QUIET)
    for missing in (models.path("echo", repository=place), place / "beside"):
        missing.unlink()
        models.export(place, [model], QUIET)
    assert exporter.runs == 6


def test_an_interrupted_export_is_done_anew(exporter: Exporter, model: Model, place: Path, tmp_path: Path) -> None:
    models.export(place, [model], QUIET)
    (tmp_path / "weights").write_text("second")
    exporter.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        models.export(place, [model], QUIET)
    (tmp_path / "weights").write_text("first")  # even where the old stamp would fit again
    exporter.error = None
    models.export(place, [model], QUIET)
    assert exporter.runs == 3


def test_a_graph_that_computes_something_else_leaves_the_file_that_was_there_and_stops_no_other(
    exporter: Exporter, model: Model, place: Path
) -> None:
    class Drifts(nn.Module):
        """Gives something else each time, so that the file can't agree with it."""

        runs = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.runs += 1
            return x * self.runs

    models.export(place, [Model("echo", "echo", [])], QUIET)
    path = models.path("echo", repository=place)
    before = path.stat().st_ino
    exporter.module = Drifts()
    with pytest.raises(ModelsError, match=r"^echo: .*Y differs from the module") as caught:
        models.export(place, [model, Model("other", "other", [])], QUIET)
    assert "other" not in str(caught.value).split(":")[0]
    assert [each.name for each in path.parent.iterdir()] == ["model.onnx"]
    assert path.stat().st_ino == before
    assert models.path("other", repository=place).is_file()


def test_a_missing_package_is_named(exporter: Exporter, model: Model, place: Path) -> None:
    exporter.error = ModuleNotFoundError("No module named 'torch'", name="torch")
    with pytest.raises(ModelsError, match="torch is not installed, exporting needs it: run `make models`"):
        models.export(place, [model], QUIET)


def test_what_feeds_a_graph_is_exported_first(exporter: Exporter, model: Model, place: Path) -> None:
    fed = Model("other", "other", [], fed_by=[model])
    models.export(place, [fed], QUIET)
    assert models.path("echo", repository=place).is_file()


def test_the_command_writes_the_figures_names_what_failed_and_goes_on(
    exporter: Exporter,
    model: Model,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = Model("other", "other", [place / "no such weights"])
    monkeypatch.setattr(models, "models", lambda *_: [broken, model])
    assert cli.main(["models", "--repository", str(place)]) == 1
    assert "error: other: " in capsys.readouterr().err
    document = json.loads(models.report_path("fp32", place).read_text())
    (row,) = document["rows"]
    assert (row["graph"], row["output"], row["difference"], row["allowed"]) == ("echo", "Y", 0, 1e-4)
    assert row["size_mb"] > 0
    assert row["seconds"] > 0
    monkeypatch.setattr(models, "models", lambda *_: [model])
    assert cli.main(["models", "--repository", str(place)]) == 0
    assert "up to date" in capsys.readouterr().out


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


def test_every_graph_of_the_registry_has_an_exporter_that_makes_it() -> None:
    assert sorted(model.name for model in models.models()) == sorted(graph.name for graph in registry.GRAPHS)


def test_other_precisions_lie_beside_the_repository_that_they_are_made_from(tmp_path: Path) -> None:
    place = tmp_path / "model_repository"
    assert models.path("vad", repository=place) == place / "vad" / "1" / "model.onnx"
    assert models.path("vad", "int8", place) == tmp_path / "build" / "models" / "int8" / "vad.onnx"
    assert models.path("vad", "fp16") == feeds.REPOSITORY.parent / "build" / "models" / "fp16" / "vad.onnx"
