"""`talksplat-export tensorrt`: TensorRT plans for this machine's GPU, inside the container that will serve them.

A plan is tied to TensorRT's version and to the GPU. It is built from the graph's file in the wanted precision, run on
real speech, and accepted only where it stays within the registry's tolerance of ONNX Runtime's results in fp32. Beside
each lies where it comes from:

    FOLDER/<name>/1/model.plan       written whole or not at all
    FOLDER/<name>/1/model.plan.json  versions, GPU, SHA-256 of both files, precision, profile, options, deviations
    FOLDER/timing.cache              what TensorRT measured; the next build for the same GPU is faster

Plans that are still right are left alone, so that an interrupted run goes on where it was. What runs on the GPU has
not been run where this was written: `tests/export/test_tensorrt.py` says what has.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from talksplat.bench._report import Row, report
from talksplat.files import sha256

from . import feeds, models
from ._onnx import Deviation, ExportError, compare, write
from ._trt import MissingTensorRTError, Network, check_libraries, load, logger
from .derive import PLAN
from .feeds import Feed
from .registry import GRAPHS, PRECISIONS, Graph, Precision

Hardware: TypeAlias = Literal["none", "ampere-plus", "same-compute-capability"]
Results: TypeAlias = list[npt.NDArray[Any]]  # a graph's outputs, in the registry's order
Run: TypeAlias = Callable[[Feed], Results]

CACHE = "timing.cache"

_MAY_CHANGE = ("cuda", "driver", "plan_sha256", "deviations")  # of a plan's provenance, while the plan stays right


class NoGpuError(RuntimeError):
    """There is no CUDA device, or it does not answer."""


class PlanError(RuntimeError):
    """A plan does not run, or computes something else than the graph."""


@dataclass(frozen=True)
class Options:
    """What a plan may be used with besides the TensorRT and the GPU that it was built with; it costs speed."""

    version_compatible: bool = False  # later ones: Triton wants --backend-config=tensorrt,version-compatible=true
    hardware: Hardware = "none"  # other GPUs


class Device(Protocol):
    """That plans are built for and run on: a `Gpu`."""

    trt: ModuleType

    def describe(self) -> dict[str, str]:
        """Its name and versions, as the provenance has them."""

    def load(self, plan: bytes, graph: Graph) -> Run:
        """A plan that is ready to run.

        Raises:
            PlanError: it does not load.
        """


class Gpu:
    """The current CUDA device.

    Raises:
        MissingTensorRTError: there is no TensorRT, or its bindings and libraries are of different versions.
        NoGpuError: PyTorch finds no CUDA device.
    """

    def __init__(self) -> None:
        self.trt = load("tensorrt", "tensorrt_bindings", otherwise="plans are built in the container, deploy/README.md")
        check_libraries(self.trt)
        if not torch.cuda.is_available():
            raise NoGpuError("PyTorch finds no CUDA device: plans are built on the GPU that they are for.")

    def describe(self) -> dict[str, str]:
        """Versions of TensorRT, of PyTorch's CUDA and of the driver; the GPU and its compute capability.

        Raises:
            NoGpuError: the driver does not answer.
        """
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            drivers = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        except (OSError, subprocess.CalledProcessError) as error:
            raise NoGpuError(f"nvidia-smi does not answer: {error}") from error
        return {
            "tensorrt": str(self.trt.__version__),
            "cuda": str(torch.version.cuda),
            "driver": drivers[0],
            "gpu": str(gpu.name),
            "compute_capability": f"{gpu.major}.{gpu.minor}",
        }

    def load(self, plan: bytes, graph: Graph) -> Run:
        """Deserialise a plan and make room for its run."""
        return _Plan(self.trt, plan, graph)


class _Plan:
    def __init__(self, trt: ModuleType, plan: bytes, graph: Graph) -> None:
        self._graph = graph
        self._runtime = trt.Runtime(logger(trt.ILogger))  # kept: the engine needs it, as the context needs the engine
        self._runtime.engine_host_code_allowed = True  # a version-compatible plan carries some
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise PlanError("TensorRT does not load the plan that it has built.")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise PlanError("There is no execution context: is the GPU's memory too small for the profile?")

    def __call__(self, feed: Feed) -> Results:
        stream, context = torch.cuda.Stream(), self._context  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            inputs = {name: _on_device(array) for name, array in feed.items()}
            for name, memory in inputs.items():
                shape = feed[name].shape
                if not (context.set_input_shape(name, shape) and context.set_tensor_address(name, memory.data_ptr())):
                    raise PlanError(f"The plan does not take {name} of {shape}.")
            results = [self._room(tensor.name, tensor.dtype) for tensor in self._graph.outputs]
            outputs = [_on_device(array) for array in results]
            for tensor, memory in zip(self._graph.outputs, outputs, strict=True):
                context.set_tensor_address(tensor.name, memory.data_ptr())
            if not context.execute_async_v3(stream.cuda_stream):
                raise PlanError("TensorRT does not run the plan.")
            stream.synchronize()
        for array, memory in zip(results, outputs, strict=True):
            _bytes(array)[:] = memory.cpu().numpy()[: array.nbytes]
        return results

    def _room(self, name: str, dtype: str) -> npt.NDArray[Any]:
        """For an output; its shape follows from those of the inputs."""
        shape = tuple(self._context.get_tensor_shape(name))
        if -1 in shape:
            raise PlanError(f"The shape of {name}, {shape}, does not follow from those of the inputs.")
        return np.zeros(shape, dtype)


def _bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return array.reshape(-1).view(np.uint8)


def _on_device(array: npt.NDArray[Any]) -> Any:
    """The bytes of a contiguous array; an empty one has an address, too."""
    return torch.from_numpy(_bytes(array) if array.size else np.zeros(1, np.uint8)).cuda()


class _Timings:
    """What TensorRT has measured on this GPU, kept from build to build."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def attach(self, config: Any) -> None:
        """Let a build use and extend what is known; of another GPU or version, it is forgotten."""
        with contextlib.suppress(FileNotFoundError):
            cache = config.create_timing_cache(self._path.read_bytes())
            if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
                self._config, self._cache = config, cache  # kept, as the config only refers to it
                return
        self._config, self._cache = config, config.create_timing_cache(b"")
        config.set_timing_cache(self._cache, ignore_mismatch=False)

    def save(self) -> None:
        """Keep what is known after the build."""
        write(self._path, bytes(self._config.get_timing_cache().serialize()))


def configure(trt: ModuleType, config: Any, options: Options) -> None:
    """Set up an `IBuilderConfig`: no TF32, which has only fp16's digits, and what ``options`` say."""
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    config.hardware_compatibility_level = {
        "none": trt.HardwareCompatibilityLevel.NONE,
        "ampere-plus": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
        "same-compute-capability": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
    }[options.hardware]


def build(
    graph: Graph,
    precision: Precision,
    folder: Path,
    device: Device,
    options: Options = Options(),
    repository: Path = feeds.REPOSITORY,
) -> Row:
    """Bring the plan of one graph up to date; a row for the table.

    Raises:
        BuildError: TensorRT does not take the graph.
        PlanError: the plan is not what it should be, and was not written.
        FeedsError: there is nothing to check it with.
        OSError: a file is missing, or can't be written.
    """
    began = time.perf_counter()
    source, target = models.path(graph.name, precision, repository), folder / graph.name / "1" / PLAN
    record = _provenance(graph, precision, source, device, options)
    row: Row = {"graph": graph.name, "precision": precision}
    if (old := _read(target)) and all(old.get(key) == value for key, value in record.items() if key not in _MAY_CHANGE):
        return row | {"state": "kept", "mb": target.stat().st_size / 1e6, **_worst(old["deviations"])}
    timings = _Timings(folder / CACHE)

    def prepare(config: Any) -> None:
        configure(device.trt, config, options)
        timings.attach(config)

    plan = bytes(Network(device.trt, source, graph).build(prepare))
    timings.save()
    found = check(device.load(plan, graph), graph, precision, repository)
    record |= {"plan_sha256": hashlib.sha256(plan).hexdigest(), "deviations": [asdict(each) for each in found]}
    write(target, plan)
    write(_beside(target), (json.dumps(record, indent=1) + "\n").encode())
    seconds = time.perf_counter() - began
    return row | {"state": "built", "seconds": seconds, "mb": len(plan) / 1e6, **_worst(record["deviations"])}


def check(run: Run, graph: Graph, precision: Precision, repository: Path = feeds.REPOSITORY) -> list[Deviation]:
    """Compare a plan with the fp32 graph in ONNX Runtime on the CPU, on speech that no precision was calibrated on.

    Raises:
        PlanError: an output has another shape, or is further away than the registry allows.
        FeedsError: the fp32 graph is missing, or one that feeds it.
    """
    names = [tensor.name for tensor in graph.outputs]
    reference = feeds.session(models.path(graph.name, "fp32", repository))
    _, unheard = feeds.halves()
    batches = feeds.feeds(graph.name, repository, unheard)
    try:
        return compare(graph, precision, batches, run, lambda feed: reference.run(names, feed), "ONNX Runtime")
    except ExportError as error:
        raise PlanError(str(error)) from error


def build_all(
    graphs: Sequence[Graph],
    precision: Precision,
    folder: Path,
    device: Device,
    console: Console,
    options: Options = Options(),
    repository: Path = feeds.REPOSITORY,
) -> list[Row]:
    """`build` each; in the next finer precision where it is not offered in ``precision``, or its plan is too far off.

    A failure is a row, too.
    """
    rows = []
    for number, graph in enumerate(graphs, 1):
        offered = [each for each in PRECISIONS[PRECISIONS.index(precision) :: -1] if each in graph.tolerances]
        label = f"{graph.name} in {offered[0]} ({number} of {len(graphs)})"
        if not console.is_terminal:
            console.print(f"{label} ...")
        try:
            with console.status(label):
                row = _first_close_enough(graph, offered, folder, device, options, repository)
        except (RuntimeError, OSError) as error:  # PyTorch's, when memory is short, is a RuntimeError as well
            row = {"graph": graph.name, "precision": offered[0], "state": "failed", "problem": str(error)}
        console.print(f"{graph.name}: {row.get('problem') or row['state']}", soft_wrap=True)
        rows.append(row)
    return rows


def _first_close_enough(
    graph: Graph, offered: Sequence[Precision], folder: Path, device: Device, options: Options, repository: Path
) -> Row:
    """In the first of these precisions whose plan is close enough; the row says what was wrong with those before."""
    refused: list[str] = []
    for precision in offered:
        try:
            row = build(graph, precision, folder, device, options, repository)
        except PlanError as error:
            refused.append(f"{precision}: {error}")
        else:
            return {**row, "refused": "; ".join(refused)} if refused else row
    raise PlanError("; ".join(refused))


def _provenance(graph: Graph, precision: Precision, source: Path, device: Device, options: Options) -> dict[str, Any]:
    if not source.is_file():
        raise FileNotFoundError(f"{source} is missing: run `talksplat-export models --precision {precision}`.")
    allowed = asdict(graph.tolerances[precision])
    return {
        **device.describe(),
        "graph": graph.name,
        "precision": precision,
        "onnx_sha256": sha256(source),
        "profile": {name: [list(shape) for shape in shapes] for name, shapes in graph.profile().items()},
        "options": asdict(options),
        "tolerance": {key: value for key, value in allowed.items() if math.isfinite(value)},
    }


def _beside(plan: Path) -> Path:
    return plan.with_name(f"{plan.name}.json")


def _read(plan: Path) -> dict[str, Any] | None:
    """The provenance of the plan that is there, if it is this plan's."""
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(_beside(plan).read_bytes())
        if record["plan_sha256"] == sha256(plan):
            return dict(record)
    return None


def _worst(deviations: Sequence[Mapping[str, Any]]) -> Row:
    return {
        "difference": max(each["difference"] for each in deviations),
        "correlation": min(each["correlation"] for each in deviations),
    }


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    names = [graph.name for graph in GRAPHS]
    parser = subparsers.add_parser("tensorrt", help="build and check plans, in the container", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--plans", type=Path, required=True, metavar="FOLDER", help="where they are kept")
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), help="default: %(default)s")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp16", help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--version-compatible", action="store_true", help="plans for later versions of TensorRT, too")
    parser.add_argument(
        "--hardware-compatible", choices=get_args(Hardware), default="none", help="plans for other GPUs, too"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    wanted = [graph for graph in GRAPHS if not args.only or graph.name in args.only]
    options = Options(args.version_compatible, args.hardware_compatible)
    console = Console(highlight=False)
    try:
        rows = build_all(wanted, args.precision, args.plans, Gpu(), console, options, args.repository)
    except (MissingTensorRTError, NoGpuError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report("plans", rows, None)
    return 1 if any(row["state"] == "failed" for row in rows) else 0
