"""`talksplat-export models`: put every ONNX file that Triton serves into the model repository.

What is there and was made from the same weights by the same code is left alone, and costs no import of torch.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

import talksplat

from ._wheels import WeightsError

_HERE, _RUNTIME = Path(__file__).parent, Path(talksplat.__file__).parent
_TOOLS = ("torch", "onnx", "onnxscript")  # other versions of them write other graphs


@dataclass(frozen=True)
class Model:
    """What one exporter writes, and from what."""

    name: str
    files: Sequence[str]  # in the model repository
    inputs: Sequence[Path]  # code and weights; the hashes of weights from wheels are in the code
    options: dict[str, object] = field(default_factory=dict)  # of the exporter, besides the repository
    module: str = ""  # in this package, with a function `export(repository, **options)`; default: the name

    def stamp(self) -> str:
        """A digest of all that the files depend on."""
        digest = hashlib.sha256()
        for path in (_HERE / "_onnx.py", _HERE / "_wheels.py", _RUNTIME / "clock.py", *self.inputs):
            digest.update(path.read_bytes())
        digest.update(repr((self.options, [version(tool) for tool in _TOOLS])).encode())
        return digest.hexdigest()

    def is_fresh(self, repository: Path) -> bool:
        """Whether all files are there and the stamp beside them is today's."""
        stamp = self._stamp_file(repository)
        complete = all((repository / file).is_file() for file in self.files)
        return complete and stamp.is_file() and stamp.read_text().strip() == self.stamp()

    def export(self, repository: Path) -> None:
        """Write the files, then the stamp; one that is interrupted between is stale and made anew."""
        self._stamp_file(repository).unlink(missing_ok=True)
        exporter = importlib.import_module(f".{self.module or self.name}", __package__)
        exporter.export(repository, **self.options)
        self._stamp_file(repository).write_text(self.stamp() + "\n")

    def _stamp_file(self, repository: Path) -> Path:
        path = repository / self.files[0]
        return path.with_name(f"{path.name}.stamp")


def models(asr: str = "base", asr_weights: Path | None = None) -> list[Model]:
    """All models, small ones first.

    Args:
        asr: which Moonshine, "base" or "tiny".
        asr_weights: a downloaded Hugging Face repository of Moonshine to take instead of a wheel.

    Raises:
        WeightsError: there are no weights in ``asr_weights``.
    """
    folder = [asr_weights / name for name in ("model.safetensors", "tokenizer.json")] if asr_weights else []
    if missing := [path for path in folder if not path.is_file()]:
        raise WeightsError(f"{missing[0].parent} has no {missing[0].name}.")
    return [
        Model("deformation", ["deformation/1/model.onnx"], [_HERE / "deformation.py", _RUNTIME / "avatar.py"]),
        Model(
            "audio_encoder",
            ["audio_encoder/1/model.onnx"],
            [_HERE / "audio_encoder.py", _HERE / "weights" / "audio_encoder.safetensors"],
        ),
        Model(
            "huma1",
            ["deformation_huma1/1/model.onnx"],
            [_HERE / "huma1.py", _RUNTIME / "avatar.py", _RUNTIME / "triplanes.py"],
        ),
        Model("vad", ["vad/1/model.onnx"], [_HERE / "vad.py"]),
        Model(
            "asr",
            ["asr_encoder/1/model.onnx", "asr_decoder/1/model.onnx", "asr/1/tokenizer.bin"],
            [_HERE / "moonshine.py", *folder],
            {"size": asr, "weights": asr_weights},
            module="moonshine",
        ),
    ]


def export(repository: Path, wanted: Sequence[Model], console: Console) -> None:
    """Export those of ``wanted`` that are missing or stale, with a line for each.

    Raises:
        WeightsError: pretrained weights are not where they should be, or are others.
        ExportError: a graph does not compute what its module computes.
    """
    stale = [model for model in wanted if not model.is_fresh(repository)]
    for number, model in enumerate(stale, 1):
        began = time.monotonic()
        label = f"exporting {model.name} ({number} of {len(stale)})"
        if not console.is_terminal:
            console.print(f"{label} ...")
        with console.status(label):
            model.export(repository)
        sizes = sum((repository / file).stat().st_size for file in model.files) / 1e6
        console.print(f"{model.name}: {sizes:.1f} MB in {time.monotonic() - began:.1f} s")
    if not stale:
        console.print(f"{repository} is up to date.")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    names = [model.name for model in models()]
    parser = subparsers.add_parser("models", help="export every model that is missing or stale", description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--asr", choices=("base", "tiny"), default="base", help="Moonshine's size (default: base)")
    parser.add_argument(
        "--asr-weights",
        type=Path,
        metavar="FOLDER",
        help="a download of UsefulSensors/moonshine-base or -tiny (model.safetensors, tokenizer.json), not a wheel",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    try:
        every = models(args.asr, args.asr_weights)
        wanted = [model for model in every if not args.only or model.name in args.only]
        export(args.repository, wanted, Console(highlight=False))
    except WeightsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed, exporting needs it: run `make models`.", file=sys.stderr)
        return 1
    return 0
