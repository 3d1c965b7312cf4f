"""`talksplat-export models`: every ONNX file that Triton serves, in the precisions that are asked for.

fp32 files go into the model repository, those of other precisions to `build/models/<precision>/` beside it. Each is
compared with its PyTorch module on real speech before it is accepted; `build/models/<precision>.json` has the figures.
What is there and was made from the same weights by the same code is left alone, and costs no import of torch.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console

import talksplat
from talksplat.bench._report import Row, report

from . import feeds, registry
from ._wheels import WeightsError
from .feeds import REPOSITORY
from .registry import PRECISIONS, Graph, Precision

_HERE, _RUNTIME = Path(__file__).parent, Path(talksplat.__file__).parent
_TOOLS = ("torch", "onnx", "onnxscript")  # other versions of them write other graphs
_REDUCERS = ("onnxruntime", "nvidia-modelopt")  # and of these, in other precisions


class ModelsError(RuntimeError):
    """Some graphs could not be exported; the message names them, one a line, and why."""


def path(name: str, precision: Precision = "fp32", repository: Path = REPOSITORY) -> Path:
    """Where a graph's file lies."""
    if precision == "fp32":
        return repository / name / "1" / "model.onnx"
    return _built(repository) / precision / f"{name}.onnx"


def report_path(precision: Precision, repository: Path = REPOSITORY) -> Path:
    """Where the figures of a precision lie."""
    return _built(repository) / f"{precision}.json"


def _built(repository: Path) -> Path:
    return repository.resolve().parent / "build" / "models"


@dataclass(frozen=True)
class Model:
    """A graph of the registry, and what it is exported from."""

    name: str
    module: str  # in this package, with a function `graphs(**options)`
    inputs: Sequence[Path]  # code and weights; the hashes of weights from wheels are in the code
    options: Mapping[str, Any] = field(default_factory=dict)  # of `graphs`
    fed_by: Sequence[Model] = ()  # that its feeds come out of
    beside: Sequence[str] = ()  # files that the module's `accompany(repository, **options)` writes

    def stamp(self, precision: Precision) -> str:
        """A digest of all that the file depends on."""
        graph = registry.graph(self.name)
        digest = hashlib.sha256()
        code = [_HERE / "_onnx.py", _HERE / "_wheels.py", _RUNTIME / "clock.py", *self.inputs]
        facts: list[object] = [graph.inputs, graph.outputs, graph.tolerances[precision], dict(self.options)]
        if precision != "fp32":
            code += [_HERE / "precision.py", _HERE / "feeds.py"]
            facts += [graph.keep.get(precision), [_version(tool) for tool in _REDUCERS]]
            facts += [each.stamp("fp32") for each in self.fed_by]
        for file in code:
            digest.update(file.read_bytes())
        digest.update(repr((facts, [_version(tool) for tool in _TOOLS])).encode())
        return digest.hexdigest()

    def rows(self, precision: Precision, repository: Path) -> list[Row] | None:
        """The figures of the file that is there; None where it is missing or stale."""
        file = path(self.name, precision, repository)
        beside = self.beside if precision == "fp32" else ()
        with contextlib.suppress(OSError, ValueError):  # a stamp that was never written, or by another version
            stamp = json.loads(_stamp_file(file).read_text())
            if stamp["stamp"] == self.stamp(precision) and all(
                each.is_file() for each in (file, *(repository / name for name in beside))
            ):
                return list(stamp["rows"])
        return None


def models(asr: str = "base", asr_weights: Path | None = None) -> list[Model]:
    """All models, each after those that feed it.

    Args:
        asr: which Moonshine, "base" or "tiny".
        asr_weights: a downloaded Hugging Face repository of Moonshine to take instead of a wheel.

    Raises:
        WeightsError: there are no weights in ``asr_weights``.
    """
    folder = [asr_weights / name for name in ("model.safetensors", "tokenizer.json")] if asr_weights else []
    if missing := [path for path in folder if not path.is_file()]:
        raise WeightsError(f"{missing[0].parent} has no {missing[0].name}.")
    avatar, moonshine = _RUNTIME / "avatar.py", [_HERE / "moonshine.py", _HERE / "dynamic.py", *folder]
    options = {"size": asr, "weights": asr_weights}
    in_process = [f"asr/1/{name}" for name in ("tokenizer.bin", "encoder.onnx", "decoder.onnx")]
    weights, triplanes = _HERE / "weights" / "audio_encoder.safetensors", _RUNTIME / "triplanes.py"
    audio_encoder = Model("audio_encoder", "audio_encoder", [_HERE / "audio_encoder.py", weights])
    asr_encoder = Model("asr_encoder", "moonshine", moonshine, options)
    voice = [_HERE / "voice.py"]  # what it has of `talksplat.speaking` are sizes, which the registry has too
    tts_encoder = Model("tts_encoder", "voice", voice)
    tts_flow = Model("tts_flow", "voice", voice, fed_by=[tts_encoder])
    return [
        Model("vad", "vad", [_HERE / "vad.py"]),
        audio_encoder,
        Model("deformation", "deformation", [_HERE / "deformation.py", avatar], fed_by=[audio_encoder]),
        asr_encoder,
        Model("asr_decoder", "moonshine", moonshine, options, [asr_encoder], beside=in_process),
        tts_encoder,
        tts_flow,
        Model("tts_decoder", "voice", voice, fed_by=[tts_encoder, tts_flow]),
        Model("deformation_huma1", "huma1", [_HERE / "huma1.py", avatar, triplanes], fed_by=[asr_encoder]),
    ]


def export(
    repository: Path, wanted: Sequence[Model], console: Console, precisions: Sequence[Precision] = ("fp32",)
) -> None:
    """Export those of ``wanted`` that are missing or stale, with a line for each.

    A precision is made from the fp32 file, which is exported first where it is stale. Precisions that the registry
    does not offer for a graph are passed over. A graph that fails is named, and the others go on.

    Raises:
        ModelsError: some failed; their old files are left as they were, and count as stale.
    """
    feeders = [each for model in wanted for each in model.fed_by]
    needed: list[tuple[Model, Precision]] = [
        *((model, "fp32") for model in {each.name: each for each in [*feeders, *wanted]}.values()),
        *((model, each) for each in precisions if each != "fp32" for model in wanted if _offers(model, each)),
    ]
    stale = [(model, precision) for model, precision in needed if model.rows(precision, repository) is None]
    failures: dict[str, str] = {}
    modules: dict[str, list[tuple[Graph, Any]]] = {}  # both graphs of one from one reading of its weights
    for number, (model, precision) in enumerate(stale, 1):
        began = time.monotonic()
        name = model.name if precision == "fp32" else f"{model.name} in {precision}"
        label = f"exporting {name} ({number} of {len(stale)})"
        if not console.is_terminal:
            console.print(f"{label} ...")
        try:
            with console.status(label):
                _export(model, precision, repository, modules)
        except ModuleNotFoundError as error:
            failures[name] = f"{error.name} is not installed, exporting needs it: run `make models`."
        except Exception as error:  # whatever an exporter thinks of, the other graphs can be had
            failures[name] = str(error) or type(error).__name__
        else:
            size = path(model.name, precision, repository).stat().st_size / 1e6
            console.print(f"{name}: {size:.1f} MB in {time.monotonic() - began:.1f} s")
    if failures:
        raise ModelsError("\n".join(f"{name}: {reason}" for name, reason in failures.items()))
    if not stale:
        console.print(f"{repository} is up to date.")


def _offers(model: Model, precision: Precision) -> bool:
    return precision in registry.graph(model.name).tolerances


def _export(model: Model, precision: Precision, repository: Path, modules: dict[str, list[tuple[Graph, Any]]]) -> None:
    """Write the file, compare it with its module, then write the stamp: without it, it is made anew.

    The file takes its place only then: a server may be started meanwhile.
    """
    from . import _onnx, precision as precisions  # noqa: I001  # these import torch

    began = time.monotonic()
    file = path(model.name, precision, repository)
    _stamp_file(file).unlink(missing_ok=True)
    exporter = importlib.import_module(f".{model.module}", __package__)
    if model.module not in modules:
        modules[model.module] = exporter.graphs(**model.options)
    graph, module = next(pair for pair in modules[model.module] if pair[0].name == model.name)
    heard, unheard = feeds.halves()
    unchecked = file.with_name(f".unchecked-{os.getpid()}-{file.name}")
    try:
        if precision == "fp32":
            proto = _onnx.export(graph, module)
        else:
            source = path(model.name, "fp32", repository)
            proto = precisions.reduced(graph, precision, source, feeds.feeds(model.name, repository, heard))
        _onnx.write(unchecked, proto.SerializeToString())
        own = unchecked if precision == "fp32" else None
        deviations = _onnx.parity(
            graph, module, unchecked, feeds.feeds(model.name, repository, unheard, own=own), precision
        )
        unchecked.replace(file)
        if model.beside and precision == "fp32":
            exporter.accompany(repository, **model.options)
    finally:
        unchecked.unlink(missing_ok=True)
    tolerance, seconds = graph.tolerances[precision], time.monotonic() - began
    rows: list[Row] = [
        {
            "graph": graph.name,
            "output": each.output,
            "difference": each.difference,
            "allowed": tolerance.difference if math.isfinite(tolerance.difference) else None,
            "correlation": each.correlation,
            "least": tolerance.correlation or None,
            "size_mb": file.stat().st_size / 1e6,
            "seconds": seconds,
            "fp32_nodes": precisions.fp32_nodes(proto) if precision != "fp32" else None,
        }
        for each in deviations
    ]
    stamp = json.dumps({"stamp": model.stamp(precision), "rows": rows}, indent=1)
    _onnx.write(_stamp_file(file), stamp.encode())


def _stamp_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.stamp")


def _version(tool: str) -> str | None:
    try:
        return version(tool)
    except PackageNotFoundError:
        return None


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    names = [model.name for model in models()]
    parser = subparsers.add_parser("models", help="export every model that is missing or stale", description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp32"], help="default: fp32")
    parser.add_argument("--check", action="store_true", help="only say which are missing or stale; 1 if some are")
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
    except WeightsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    wanted = [model for model in every if not args.only or model.name in args.only]
    if args.check:
        stale = [
            f"{model.name} ({precision})"
            for precision in args.precision
            for model in wanted
            if _offers(model, precision) and model.rows(precision, args.repository) is None
        ]
        print(f"Missing or stale: {', '.join(stale)}. Run `make models`." if stale else "All are there and fresh.")
        return int(bool(stale))
    status = 0
    try:
        export(args.repository, wanted, Console(highlight=False, soft_wrap=True), args.precision)
    except ModelsError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        status = 1
    for precision in args.precision:
        rows, file = _rows(every, precision, args.repository), report_path(precision, args.repository)
        reported = None
        with contextlib.suppress(OSError, ValueError):  # there is none yet
            reported = json.loads(file.read_text())["rows"]
        if rows != reported:
            report(f"models, {precision}", rows, file, _outcome(every, precision, args.repository))
    return status


def _outcome(every: Sequence[Model], precision: Precision, repository: Path) -> dict[str, list[Row]]:
    """What people see and hear of it, once all graphs are there."""
    missing = [
        model
        for model in every
        if any(model.rows(each, repository) is None for each in (PRECISIONS[0], precision) if _offers(model, each))
    ]
    if precision == "fp32" or missing:
        return {}
    from . import outcome  # draws frames

    return {"frames": [outcome.frames(precision, repository)], "words": [outcome.words(precision, repository)]}


def _rows(every: Sequence[Model], precision: Precision, repository: Path) -> list[Row]:
    offered = (model for model in every if _offers(model, precision))
    return [row for model in offered for row in model.rows(precision, repository) or []]
