"""`talksplat-export aot`: does every graph compile for every GPU? Without a GPU, by TensorRT-RTX, ahead of time.

That proves that a graph parses, is typed soundly, has the dims of the registry and compiles for its whole profile; not
that it computes the right thing (`talksplat-export models` does), nor how fast. Its engines are thrown away: the plans
that Triton serves are built by `talksplat-export tensorrt`, in the container. SM90 (H100, H200) is none of
TensorRT-RTX's targets, so that only those plans tell about it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from rich.console import Console

from talksplat.bench._report import Row, report

from . import models
from ._trt import BuildError, MissingTensorRTError, Network, load
from .registry import GRAPHS, PRECISIONS, Graph, Precision

TURING = "SM75"
TARGETS = (TURING, "SM80", "SM86", "SM89", "SM120")

# What TensorRT-RTX can't compile for Turing: it has no matrix product in fp32 there, unlike TensorRT itself. The gate
# checks that this is still so.
_NO_PRODUCT = "FP32 GEMM is not supported"
_FP32: Precision = "fp32"
_CONVOLUTIONAL = ("tts_flow", "tts_decoder")
TURING_REFUSES: Mapping[tuple[str, Precision], str] = {
    **{(graph.name, _FP32): "its matrix products are in fp32" for graph in GRAPHS if graph.name not in _CONVOLUTIONAL},
    ("audio_encoder", "fp16"): "its log-mel stays in fp32",
    ("audio_encoder", "int8"): "its log-mel stays in fp32",
    ("asr_encoder", "fp16"): "a product stays in fp32, as its values leave fp16's range",
    ("asr_decoder", "int8"): "attention stays in fp32",
    ("vad", "int8"): "its spectrum and LSTM stay in fp32",
}


@dataclass(frozen=True)
class Job:
    """A file to compile."""

    graph: Graph
    precision: Precision
    path: Path

    @property
    def refused(self) -> bool:
        """Whether Turing is known not to have it."""
        return (self.graph.name, self.precision) in TURING_REFUSES


def jobs(precisions: Sequence[Precision], names: Sequence[str], repository: Path) -> list[Job]:
    """Every graph of ``names`` in each of ``precisions`` that it is offered in.

    Raises:
        FileNotFoundError: one was not exported.
    """
    found = [
        Job(graph, precision, models.path(graph.name, precision, repository))
        for graph in GRAPHS
        for precision in precisions
        if graph.name in names and precision in graph.tolerances
    ]
    if missing := sorted({job.precision for job in found if not job.path.is_file()}, key=PRECISIONS.index):
        first = next(job.path for job in found if not job.path.is_file())
        command = f"talksplat-export models --precision {' '.join(missing)}"
        raise FileNotFoundError(f"{first} is missing: run `{command}`.")
    return found


def check(job: Job, targets: Sequence[str] = TARGETS) -> Row:
    """Compile a file; what is wrong is the row's ``problem``, with the node's name and the targets'.

    All targets are one build, which costs little more than one target alone. A build that fails is done again target
    by target, to tell which of them it was.

    Raises:
        MissingTensorRTError: TensorRT-RTX is not installed.
    """
    trt = _tensorrt_rtx()
    wanted = [target for target in targets if not (job.refused and target == TURING)]
    row: Row = {"graph": job.graph.name, "precision": job.precision, "targets": " ".join(wanted)}
    began = time.perf_counter()
    try:
        _check_control_flow(job.path)
        network = Network(trt, job.path, job.graph)
        try:
            size = network.build(_aimed(trt, wanted)).nbytes
        except BuildError:
            raise BuildError(_each(network, wanted)) from None
        row |= {"seconds": time.perf_counter() - began, "layers": network.layers, "mb": size / 1e6}
        if job.refused and TURING in targets:
            _check_refusal(network)
            row["refused"] = f"{TURING}: {TURING_REFUSES[job.graph.name, job.precision]}"
    except BuildError as error:
        row |= {"seconds": time.perf_counter() - began, "problem": str(error)}
    return row


def gate(wanted: Sequence[Job], console: Console) -> list[Row]:
    """`check` every file, in as many processes as there are cores, large ones first.

    Raises:
        MissingTensorRTError: TensorRT-RTX is not installed.
        BuildError: a process died.
    """
    _tensorrt_rtx()
    rows: dict[Path, Row] = {}
    workers = max(1, min(len(wanted), len(os.sched_getaffinity(0))))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        large_first = sorted(wanted, key=lambda job: job.path.stat().st_size, reverse=True)
        waiting = {pool.submit(check, job): job for job in large_first}
        try:
            for number, done in enumerate(as_completed(waiting), 1):
                job = waiting[done]
                rows[job.path] = row = done.result()
                outcome = row.get("problem") or f"{row['seconds']:.1f} s"
                console.print(f"{job.path} ({number} of {len(wanted)}): {outcome}", soft_wrap=True)
        except BrokenProcessPool as error:
            raise BuildError("TensorRT-RTX took its process down: too little memory, or a graph too much.") from error
        finally:
            pool.shutdown(cancel_futures=True)
    return [rows[job.path] for job in wanted]


def _tensorrt_rtx() -> Any:
    return load("tensorrt_rtx", otherwise="pip install -c constraints.txt tensorrt-rtx-cu13")


def _check_control_flow(path: Path) -> None:
    """Nodes with graphs inside them, like If and Loop: TensorRT takes some, and then builds slow plans."""
    graphs = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
    try:
        nodes = onnx.load(path).graph.node
    except DecodeError as error:
        raise BuildError(f"{path} is no ONNX file, or only a part of one") from error
    found = [
        f"node {node.name or node.output[0]!r} ({node.op_type}): control flow"
        for node in nodes
        if any(attribute.type in graphs for attribute in node.attribute)
    ]
    if found:
        raise BuildError("; ".join(found))


def _aimed(trt: Any, targets: Sequence[str]) -> Callable[[Any], None]:
    def configure(config: Any) -> None:
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target), index)

    return configure


def _each(network: Network, targets: Sequence[str]) -> str:
    """What every target that fails on its own says."""
    said: dict[str, list[str]] = {}
    for target in targets:
        try:
            network.build(_aimed(_tensorrt_rtx(), [target]))
        except BuildError as error:
            said.setdefault(str(error), []).append(target)
    return "; ".join(f"{', '.join(those)}: {why}" for why, those in said.items()) or "only the joint build fails"


def _check_refusal(network: Network) -> None:
    """A BuildError where Turing is not refused, or for another reason."""
    try:
        network.build(_aimed(_tensorrt_rtx(), [TURING]))
    except BuildError as error:
        if _NO_PRODUCT not in str(error):
            raise BuildError(f"{TURING}: {error}") from error
    else:
        raise BuildError(f"{TURING} is refused no more: take it out of TURING_REFUSES")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    names = [graph.name for graph in GRAPHS]
    parser = subparsers.add_parser("aot", help="compile every graph for every GPU, without one", description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), help="default: %(default)s")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="default: all")
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there, too")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    began = time.perf_counter()
    try:
        rows = gate(jobs(args.precision, args.only, args.repository), Console(highlight=False))
    except (MissingTensorRTError, BuildError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report("aot", rows, args.json)
    bad = list(_problems(rows))
    print(f"{len(rows)} files in {time.perf_counter() - began:.0f} s, {len(bad)} of them failed.", *bad, sep="\n")
    print("SM90 (H100, H200) is no target of TensorRT-RTX: its plans are checked where they are built.")
    return 1 if bad else 0


def _problems(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if problem := row.get("problem"):
            yield f"{row['graph']} {row['precision']}: {problem}"
