"""`talksplat-export derive`: another model repository out of the committed one, for GPUs and for experiments.

Configs are changed as protobuf messages, never as text. Files are hard links where the file system has them, else
copies: the folder stands by itself, wherever it is mounted. A net's fp32 file stays beside the one that is served
instead, since `asr` may run it in process.

Fields and parameters are those of Triton 2.62 (container 25.10), whose native backends serve the GPU targets. Those
have not been run where this was written: `tests/export/test_derive.py` says what was checked.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from talksplat.files import sha256
from talksplat.server import ROOT

from . import models, registry

Platform: TypeAlias = Literal["onnxruntime", "onnxruntime_tensorrt", "tensorrt_plan"]
Kind: TypeAlias = Literal["cpu", "gpu"]

CONFIG = "config.pbtxt"
PLAN = "model.plan"
CACHE = "/tmp/talksplat-tensorrt"  # of the engines that ONNX Runtime builds: in its container, where it may write
NAMED = ("tensorrt", "onnxruntime-tensorrt", "cpu-int8")

_MARK = "# Derived by talksplat-export from"
_EXTENDED = 1  # optimization.graph.level: at the default, all, ONNX Runtime 1.31 crashes on fp16 graphs
_COUNTS = ("intra_op_thread_count", "inter_op_thread_count")
_PARAMETERS: dict[Platform, tuple[str, ...]] = {  # of the backends, that a config need not have
    "onnxruntime": _COUNTS,
    "onnxruntime_tensorrt": _COUNTS,
    "tensorrt_plan": ("execution_context_allocation_strategy",),
}
_ACCELERATOR = (  # parameters of ONNX Runtime's TensorRT provider, but for those that follow from registry and change
    "max_workspace_size_bytes",
    "trt_auxiliary_streams",
    "trt_build_heuristics_enable",
    "trt_builder_optimization_level",
    "trt_context_memory_sharing_enable",
    "trt_cuda_graph_enable",
    "trt_engine_cache_path",
    "trt_layer_norm_fp32_fallback",
    "trt_min_subgraph_size",
    "trt_sparsity_enable",
    "trt_tactic_sources",
    "trt_timing_cache_path",
)


class DeriveError(ValueError):
    """No such repository can be derived; the message says why."""


@dataclass(frozen=True)
class ModelChange:
    """What is different about one model; None leaves it as it is.

    Raises:
        DeriveError: on construction, for what no model can have.
    """

    precision: registry.Precision | None = None  # of a plan: the one that it must have been built in
    platform: Platform | None = None
    kind: Kind | None = None  # where ONNX Runtime runs a net; None: on a GPU where Triton finds one
    instances: int | None = None  # on each GPU
    preferred_batch_sizes: tuple[int, ...] | None = None
    queue_delay_us: int | None = None
    cuda_graphs: bool | None = None  # of a plan: captured up to the profile's usual and the preferred batch sizes
    parameters: Mapping[str, str] = field(default_factory=dict)  # of the model, its backend or its accelerator

    def __post_init__(self) -> None:
        _require(self.precision, "precision", registry.PRECISIONS)
        _require(self.platform, "platform", get_args(Platform))
        _require(self.kind, "kind", get_args(Kind))
        if self.instances is not None and self.instances < 1:
            raise DeriveError(f"{self.instances} instances: expected 1 or more.")
        if self.queue_delay_us is not None and self.queue_delay_us < 0:
            raise DeriveError(f"A queue delay of {self.queue_delay_us} us: expected 0 or more.")
        if any(size < 1 for size in self.preferred_batch_sizes or ()):
            raise DeriveError(f"Preferred batch sizes {list(self.preferred_batch_sizes or ())}: expected 1 or more.")
        for name in _COUNTS:
            if not re.fullmatch(r"[0-9]+", count := self.parameters.get(name, "0")):
                raise DeriveError(f"{name} is {count!r}: expected a number, 0 or more.")
        if self.cuda_graphs and self.platform != "tensorrt_plan":
            raise DeriveError("CUDA graphs need the platform tensorrt_plan.")
        if self.kind == "cpu" and self.platform in ("onnxruntime_tensorrt", "tensorrt_plan"):
            raise DeriveError(f"{self.platform} runs on a GPU: expected no kind, or gpu.")


def _require(value: str | None, what: str, offered: tuple[str, ...]) -> None:
    if value is not None and value not in offered:
        raise DeriveError(f"No {what} is called {value!r}: expected {' or '.join(offered)}.")


def named(target: str) -> dict[str, ModelChange]:
    """The changes of one of `NAMED`.

    ``tensorrt``: all nets as plans, in the precisions that they were built in. ``onnxruntime-tensorrt``: all nets in
    ONNX Runtime with the TensorRT accelerator, which builds its engines when it starts. ``cpu-int8``: the nets that are
    offered in INT8, on the CPU.
    """
    if target == "cpu-int8":
        quantised = [graph.name for graph in registry.GRAPHS if "int8" in graph.tolerances]
        return {name: ModelChange(precision="int8", kind="cpu") for name in quantised}
    platform: Platform = "tensorrt_plan" if target == "tensorrt" else "onnxruntime_tensorrt"
    changes = {graph.name: ModelChange(platform=platform) for graph in registry.GRAPHS}
    changes["asr"] = changes["tts"] = ModelChange(parameters={"networks": "triton"})
    changes["rasterizer"] = ModelChange(parameters={"device": "cuda"})
    return changes


def derive(
    target: Path,
    changes: Mapping[str, ModelChange],
    *,
    source: Path = ROOT / "model_repository",
    plans: Path | None = None,
) -> None:
    """Write a complete model repository, or nothing; a repository that was derived there before is replaced.

    Args:
        target: the folder to write.
        changes: by model; the others stay as they are.
        source: the repository to start from, with the exported models in it.
        plans: where `talksplat-export tensorrt --plans` has put its plans.

    Raises:
        DeriveError: there can be no such repository, or the target is something else.
        OSError: it can't be written.
    """
    target, source = target.absolute(), source.resolve()
    configs = _read(source)
    _check_target(target, source)
    if unknown := sorted(set(changes) - set(configs)):
        raise DeriveError(f"{source} has no model {', '.join(unknown)}: it has {', '.join(configs)}.")
    files = {name: _served(name, change, source, plans) for name, change in changes.items()}
    derived = {name: _changed(name, configs[name], change, files[name]) for name, change in changes.items()}
    _check_delays({**configs, **derived})
    target.parent.mkdir(parents=True, exist_ok=True)
    build = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for name in configs:
            words = _in_words(changes.get(name, ModelChange()))
            _write(build / "new" / name, source / name, derived.get(name), words, files.get(name, {}))
        _put(build / "new", target, build / "old")
    finally:
        shutil.rmtree(build, ignore_errors=True)


def _read(source: Path) -> dict[str, Any]:
    configs = {}
    for path in sorted(source.glob(f"*/{CONFIG}")):
        try:
            configs[path.parent.name] = text_format.Parse(path.read_text(), ModelConfig())
        except text_format.ParseError as error:
            raise DeriveError(f"{path} can't be parsed: {error}.") from error
    if not configs:
        raise DeriveError(f"{source} is no model repository: it has no {CONFIG} in any folder.")
    return configs


def _check_target(target: Path, source: Path) -> None:
    resolved = target.resolve()
    if resolved == source or source in resolved.parents or resolved in source.parents:
        raise DeriveError(f"{target} would be written over {source}: expected a folder apart from it.")
    if not target.exists():
        return
    configs = list(target.glob(f"*/{CONFIG}")) if target.is_dir() else []
    empty = target.is_dir() and not any(target.iterdir())
    if not empty and not (configs and all(path.read_text().startswith(_MARK) for path in configs)):
        raise DeriveError(f"{target} is there and was not derived: expected a new folder, or one derived before.")


def _check_delays(configs: Mapping[str, Any]) -> None:
    """Delays add up along the chain: 10.6 ms instead of 2.5 ms were measured with 2 ms on each of four stages."""
    delays = [name for name, config in configs.items() if config.dynamic_batching.max_queue_delay_microseconds]
    if len(delays) > 1:
        raise DeriveError(f"{', '.join(delays)} would each wait for company: at most one model may have a queue delay.")


def _served(name: str, change: ModelChange, source: Path, plans: Path | None) -> dict[str, Path]:
    """The file that is served instead of the committed one: its name in the repository, and where it lies."""
    if change.precision is None and change.platform is None and change.kind is None:
        return {}
    graph = _graph(name)
    if change.precision is not None and change.precision not in graph.tolerances:
        raise DeriveError(f"{name} is not offered in {change.precision}, but in {', '.join(graph.tolerances)}.")
    if change.platform == "tensorrt_plan":
        return {PLAN: _plan(name, change, source, plans)}
    if change.precision in (None, "fp32"):
        return {}
    return {f"model.{change.precision}.onnx": _onnx(name, change.precision, source)}


def _graph(name: str) -> registry.Graph:
    try:
        return registry.graph(name)
    except KeyError:
        nets = ", ".join(graph.name for graph in registry.GRAPHS)
        raise DeriveError(f"{name} is no net: only {nets} have a precision, a platform and a kind.") from None


def _onnx(name: str, precision: registry.Precision, source: Path) -> Path:
    path = models.path(name, precision, source)
    if not path.is_file():
        raise DeriveError(f"{path} is missing: run `talksplat-export models --precision {precision}`.")
    return path


def _plan(name: str, change: ModelChange, source: Path, plans: Path | None) -> Path:
    """A plan is served only with its provenance, which names both files by their hashes."""
    if plans is None:
        raise DeriveError(f"{name} as a plan: expected the folder that `talksplat-export tensorrt --plans` has filled.")
    plan = plans / name / "1" / PLAN
    beside = plan.with_name(f"{plan.name}.json")
    try:
        record = json.loads(beside.read_bytes())
        precision, built, onnx = record["precision"], record["plan_sha256"], record["onnx_sha256"]
        found = sha256(plan)
    except OSError as error:
        raise DeriveError(f"{name}: no plan with provenance: {error.filename}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DeriveError(f"{beside} is no provenance of a plan: {error!r}.") from error
    if found != built:
        raise DeriveError(f"{plan} is not the plan of the provenance beside it: build it anew.")
    if precision not in tuple(_graph(name).tolerances) or change.precision not in (None, precision):
        raise DeriveError(f"{plan} was built in {precision}: expected {change.precision or 'a precision of the net'}.")
    if sha256(path := _onnx(name, precision, source)) != onnx:
        raise DeriveError(f"{plan} was built from another graph than {path}: build it anew.")
    return plan


def _changed(name: str, committed: Any, change: ModelChange, served: Mapping[str, Path]) -> Any:
    config = ModelConfig()
    config.CopyFrom(committed)
    config.default_model_filename = next(iter(served), config.default_model_filename)
    if change.instances is not None and not config.instance_group:
        raise DeriveError(f"{name} is an ensemble: only the models of its steps have instances.")
    for group in config.instance_group:
        group.count = change.instances or group.count
        if change.kind is not None:
            group.kind = ModelInstanceGroup.Kind.Value(f"KIND_{change.kind.upper()}")
    _change_batching(name, config, change)
    parameters = dict(change.parameters)
    if change.platform == "tensorrt_plan":
        _serve_plan(name, config, change)
    elif change.precision == "fp16":
        config.optimization.graph.level = _EXTENDED
    if change.platform == "onnxruntime_tensorrt":
        own = {key: parameters.pop(key) for key in _ACCELERATOR if key in parameters}
        _accelerate(registry.graph(name), config, own)
    platform = change.platform or ("onnxruntime" if config.backend == "onnxruntime" else None)
    known = {*config.parameters, *(_PARAMETERS[platform] if platform else ())}
    if unknown := sorted(set(parameters) - known):
        raise DeriveError(f"{name} has no parameter {', '.join(unknown)}: it has {', '.join(sorted(known)) or 'none'}.")
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    if parameters.get("networks") == "triton":
        del config.model_warmup[:]  # it would ask models that may not be loaded yet
    return config


def _change_batching(name: str, config: Any, change: ModelChange) -> None:
    sizes, delay = change.preferred_batch_sizes, change.queue_delay_us
    if sizes is None and delay is None:
        return
    if not config.HasField("dynamic_batching"):
        raise DeriveError(f"{name} gathers no batches: it has neither preferred sizes nor a queue delay.")
    if any(size > config.max_batch_size for size in sizes or ()):
        raise DeriveError(
            f"{name}: preferred batch sizes {list(sizes or ())}: expected {config.max_batch_size} at most."
        )
    if sizes is not None:
        config.dynamic_batching.preferred_batch_size[:] = sizes
    if delay is not None:
        config.dynamic_batching.max_queue_delay_microseconds = delay


def _serve_plan(name: str, config: Any, change: ModelChange) -> None:
    config.backend = "tensorrt"
    for key in _COUNTS:  # ONNX Runtime's
        config.parameters.pop(key, None)
    _run_on_gpu(config)
    if not change.cuda_graphs:
        return
    graph = registry.graph(name)
    if set(graph.ranges) != {registry.BATCH}:
        raise DeriveError(f"{name} has inputs of changing size: a CUDA graph is of one size.")
    cuda = config.optimization.cuda
    cuda.graphs = cuda.output_copy_stream = True
    batches = graph.ranges[registry.BATCH]
    least = batches.least
    for size in sorted({batches.least, batches.usual, *config.dynamic_batching.preferred_batch_size}):
        spec = cuda.graph_spec.add(batch_size=size)
        spec.graph_lower_bound.batch_size = least  # batches from here on are padded to this one's size
        for tensor in graph.inputs:
            for dims in (spec.input[tensor.name].dim, spec.graph_lower_bound.input[tensor.name].dim):
                dims.extend(int(dim) for dim in tensor.dims)
        least = size + 1


def _accelerate(graph: registry.Graph, config: Any, own: Mapping[str, str]) -> None:
    """Precision lives in the graph: in FP32, and in it alone, ONNX Runtime has TensorRT keep the types of the file."""
    _run_on_gpu(config)
    profile = graph.profile()
    shapes = {
        f"trt_profile_{end}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, dims[at]))}" for name, dims in profile.items()
        )
        for at, end in enumerate(("min", "opt", "max"))
    }
    accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")
    accelerator.parameters.update(
        {
            "precision_mode": "FP32",
            "trt_engine_cache_enable": "true",
            "trt_engine_cache_path": CACHE,
            "trt_engine_cache_prefix": graph.name,
            "trt_timing_cache_enable": "true",
            "trt_timing_cache_path": CACHE,
            **shapes,
            **own,
        }
    )


def _run_on_gpu(config: Any) -> None:
    for group in config.instance_group:
        group.kind = ModelInstanceGroup.KIND_GPU


def _write(folder: Path, source: Path, config: Any | None, words: str, served: Mapping[str, Path]) -> None:
    text = (source / CONFIG).read_text()
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    if config is not None:
        text = text_format.MessageToString(config)
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(f"{_MARK} the config with SHA-256 {digest}: {words}\n{text}")
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.name != CONFIG and path.suffix != ".stamp" and "__pycache__" not in path.parts:
            _link(path, folder / path.relative_to(source))
    for name, path in served.items():
        _link(path, folder / "1" / name)
    if PLAN in served:
        _link(served[PLAN].with_name(f"{PLAN}.json"), folder / "1" / f"{PLAN}.json")


def _link(path: Path, to: Path) -> None:
    to.parent.mkdir(exist_ok=True)
    try:
        os.link(path.resolve(), to)
    except OSError:  # another file system, or one without links
        shutil.copy2(path, to)


def _put(new: Path, target: Path, old: Path) -> None:
    """In place of what was derived before; between the two renames there is nothing, never a mixture."""
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise


def _in_words(change: ModelChange) -> str:
    changed = {key: value for key, value in vars(change).items() if value is not None and value != {}}
    return ", ".join(f"{key} {value}" for key, value in _flat(changed).items()) or "unchanged"


def _flat(changed: Mapping[str, Any]) -> dict[str, str]:
    flat = {key: value for key, value in changed.items() if key != "parameters"} | dict(changed.get("parameters", {}))
    return {key: " ".join(str(value).split()) for key, value in flat.items()}  # it is one line


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("derive", help="a model repository for GPUs, or in INT8", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("target", choices=NAMED, help=f"one of {', '.join(NAMED)}")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="to write; replaced if derived")
    parser.add_argument("--plans", type=Path, metavar="FOLDER", help="of `talksplat-export tensorrt`, for tensorrt")
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), help="default: %(default)s")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    try:
        derive(args.output, named(args.target), source=args.repository, plans=args.plans)
    except (DeriveError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {args.target}")
    return 0
