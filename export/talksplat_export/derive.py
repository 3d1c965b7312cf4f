"""`talksplat-export derive`: another model repository out of the committed one, for experiments and for GPUs.

Configs are changed as protobuf messages, never as text. Files are hard links where the file system has them, else
copies: the folder stands by itself, wherever it is mounted.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from talksplat.server import ROOT

from . import registry

Platform: TypeAlias = Literal["onnxruntime", "onnxruntime_tensorrt", "tensorrt_plan"]

CONFIG = "config.pbtxt"
_EXTENDED = 1  # optimization.graph.level: at the default, all, ONNX Runtime crashes on an fp16 graph
_BACKEND_PARAMETERS = {  # that a config may have beyond the committed ones
    "onnxruntime": ("intra_op_thread_count", "inter_op_thread_count"),
}


class DeriveError(ValueError):
    """No such repository can be derived; the message says why."""


@dataclass(frozen=True)
class ModelChange:
    """What is different about one model; None leaves it as it is.

    Raises:
        DeriveError: on construction, for a value that no model can have.
    """

    precision: registry.Precision | None = None
    platform: Platform | None = None
    instances: int | None = None
    preferred_batch_sizes: tuple[int, ...] | None = None
    queue_delay_us: int | None = None
    cuda_graphs: bool | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.precision not in (None, *registry.PRECISIONS):
            raise DeriveError(f"No precision is called {self.precision!r}: expected {_either(registry.PRECISIONS)}.")
        if self.platform not in (None, *get_args(Platform)):
            raise DeriveError(f"No platform is called {self.platform!r}: expected {_either(get_args(Platform))}.")
        if self.instances is not None and self.instances < 1:
            raise DeriveError(f"{self.instances} instances: expected 1 or more.")
        if self.queue_delay_us is not None and self.queue_delay_us < 0:
            raise DeriveError(f"A queue delay of {self.queue_delay_us} us: expected 0 or more.")
        if any(size < 1 for size in self.preferred_batch_sizes or ()):
            raise DeriveError(f"Preferred batch sizes {list(self.preferred_batch_sizes or ())}: expected 1 or more.")


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
    """
    target, source = target.absolute(), source.resolve()
    configs = _read(source)
    _check_target(target, source)
    if unknown := sorted(set(changes) - set(configs)):
        raise DeriveError(f"{source} has no model {', '.join(unknown)}: it has {', '.join(configs)}.")
    derived = {name: _changed(name, configs[name], change) for name, change in changes.items()}
    _check_delays({**configs, **derived})
    target.parent.mkdir(parents=True, exist_ok=True)
    build = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        build.chmod(0o755)
        for name in configs:
            _write(build / name, source / name, derived.get(name), changes.get(name, ModelChange()))
        _put(build, target)
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


def _changed(name: str, committed: Any, change: ModelChange) -> Any:
    config = ModelConfig()
    config.CopyFrom(committed)
    if change.precision is not None or change.platform is not None:
        _check_graph(name, change)
    if change.platform not in (None, "onnxruntime") or change.cuda_graphs:
        raise DeriveError(f"{name}: {change.platform} is not there yet.")
    if change.precision == "fp16":
        config.optimization.graph.level = _EXTENDED
    if change.instances is not None:
        if not config.instance_group:
            raise DeriveError(f"{name} is an ensemble: only the models of its steps have instances.")
        for group in config.instance_group:
            group.count = change.instances
    _change_batching(name, config, change)
    known = {*config.parameters, *_BACKEND_PARAMETERS.get(config.backend, ())}
    if unknown := sorted(set(change.parameters) - known):
        raise DeriveError(f"{name} has no parameter {', '.join(unknown)}: it has {', '.join(sorted(known)) or 'none'}.")
    for key, value in change.parameters.items():
        config.parameters[key].string_value = value
    return config


def _check_graph(name: str, change: ModelChange) -> None:
    try:
        graph = registry.graph(name)
    except KeyError:
        nets = ", ".join(graph.name for graph in registry.GRAPHS)
        raise DeriveError(f"{name} is no net: only {nets} have a precision and a platform.") from None
    if change.precision is not None and change.precision not in graph.tolerances:
        raise DeriveError(f"{name} is not offered in {change.precision}: expected {_either(tuple(graph.tolerances))}.")


def _change_batching(name: str, config: Any, change: ModelChange) -> None:
    if change.preferred_batch_sizes is None and change.queue_delay_us is None:
        return
    if not config.HasField("dynamic_batching"):
        raise DeriveError(f"{name} gathers no batches: it has neither preferred sizes nor a queue delay.")
    batching = config.dynamic_batching
    if change.preferred_batch_sizes is not None:
        if any(size > config.max_batch_size for size in change.preferred_batch_sizes):
            sizes = list(change.preferred_batch_sizes)
            raise DeriveError(f"{name}: preferred batch sizes {sizes}: expected {config.max_batch_size} at most.")
        batching.preferred_batch_size[:] = change.preferred_batch_sizes
    if change.queue_delay_us is not None:
        batching.max_queue_delay_microseconds = change.queue_delay_us


def _check_delays(configs: Mapping[str, Any]) -> None:
    """A delay on each of several stages adds up: 10.6 ms instead of 2.5 ms were measured with 2 ms on four."""
    delays = [name for name, config in configs.items() if config.dynamic_batching.max_queue_delay_microseconds]
    if len(delays) > 1:
        raise DeriveError(f"{', '.join(delays)} would each wait for company: at most one model may have a queue delay.")


def _check_target(target: Path, source: Path) -> None:
    resolved = target.resolve()
    if resolved == source or source in resolved.parents or resolved in source.parents:
        raise DeriveError(f"{target} would be written over {source}: expected a folder apart from it.")
    if not target.exists():
        return
    configs = list(target.glob(f"*/{CONFIG}")) if target.is_dir() else []
    if not configs and target.is_dir() and not any(target.iterdir()):
        return
    if not configs or not all(path.read_text().startswith(_MARK) for path in configs):
        raise DeriveError(f"{target} is there and was not derived: expected a new folder, or one derived before.")


def _write(folder: Path, source: Path, config: Any | None, change: ModelChange) -> None:
    text = (source / CONFIG).read_text()
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    if config is not None:
        text = text_format.MessageToString(config)
    folder.mkdir()
    (folder / CONFIG).write_text(f"{_MARK} the config of SHA-256 {digest}: {_in_words(change)}.\n{text}")
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.name != CONFIG and path.suffix != ".stamp" and "__pycache__" not in path.parts:
            to = folder / path.relative_to(source)
            to.parent.mkdir(parents=True, exist_ok=True)
            _link(_model_file(source.name, change) if path.suffix == ".onnx" and change.precision else path, to)


def _model_file(name: str, change: ModelChange) -> Path:
    if change.precision == "fp32":
        return ROOT / "model_repository" / name / "1" / "model.onnx"
    path = ROOT / "build" / "models" / str(change.precision) / f"{name}.onnx"
    if not path.is_file():
        raise DeriveError(f"{path} is not there: run `talksplat-export models --precision {change.precision}`.")
    return path


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path.resolve(), to)
    except OSError:  # another file system, or one without links
        shutil.copy2(path, to)


def _put(build: Path, target: Path) -> None:
    """In place of what was derived before: a crash between the two renames leaves the target missing, never mixed."""
    with contextlib.ExitStack() as stack:
        if target.exists():
            before = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
            stack.callback(shutil.rmtree, before, ignore_errors=True)
            target.rename(before / target.name)
        build.rename(target)


def _in_words(change: ModelChange) -> str:
    changed = {key: value for key, value in vars(change).items() if value not in (None, {})}
    return re.sub(r"\s+", " ", ", ".join(f"{key}={value!r}" for key, value in changed.items())) or "unchanged"


def _either(values: tuple[str, ...]) -> str:
    return " or ".join(values)


_MARK = "# Derived by talksplat-export from"
