"""A study: which ways of serving are compared, under which loads, as one TOML file says it.

The *baseline* is the committed repository, but for what ``[baseline]`` changes. Each ``[[grid]]`` names axes with the
values they take, and stands for all combinations of them on top of the baseline; a *point* is one combination.
export/experiments/README.md lists the axes.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from talksplat.animator import Options

from .derive import ModelChange, Platform
from .registry import Precision, graph

NETS = ("audio_encoder", "vad", "deformation")  # of the ensemble `animate`, in the order of its chain

Positive: TypeAlias = Annotated[int, Field(ge=1)]
Counts: TypeAlias = Annotated[tuple[Positive, ...], Field(min_length=1, strict=False)]  # TOML has arrays, no tuples


class StudyError(ValueError):
    """A study can't be read, or asks for what can't be; the message says where and what was expected."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Net(_Value):
    """How a net is served; None: as the committed repository has it."""

    precision: Precision | None = None
    platform: Platform | None = None
    instances: Positive | None = None
    preferred_batch_sizes: Counts | None = None
    cuda_graphs: bool | None = None
    threads: Positive | None = None  # of ONNX Runtime, within an operator
    parameters: Mapping[str, str] = {}  # of the config, such as further settings of ONNX Runtime


class Rasterizer(_Value):
    """The last step; it is one process, whose threads share the cores."""

    device: Literal["cpu", "cuda"] | None = None
    preferred_batch_sizes: Counts | None = None
    parameters: Mapping[str, str] = {}


class Queue(_Value):
    """The one stage at which requests wait for company, and how long at most; None: as committed."""

    stage: Literal["audio_encoder", "vad", "deformation", "rasterizer"] | None = None
    delay_us: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.stage is None) != (self.delay_us is None):
            raise ValueError("stage and delay_us belong together: give both, or neither")
        return self

    @property
    def words(self) -> str:
        """For a label."""
        return "delay as committed" if self.delay_us is None else f"{self.stage} waits {self.delay_us / 1e3:g} ms"


class Request(_Value):
    """What viewers ask for."""

    format: Literal["jpeg", "raw"] = "jpeg"
    quality: Annotated[int, Field(ge=1, le=100)] | None = None  # of JPEG; None: the server's default
    chunks: Annotated[int, Field(ge=1, le=16)] = 1  # of 160 ms, in one request
    transport: Literal["grpc", "shared_memory"] = "grpc"  # of the frames

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.format == "raw" and self.quality is not None:
            raise ValueError("raw frames have no quality: leave it out, or ask for jpeg")
        return self

    @property
    def jpeg_quality(self) -> int:
        """That the server encodes with."""
        return Options().quality if self.quality is None else self.quality

    @property
    def words(self) -> list[str]:
        """For a label."""
        return [
            "raw" if self.format == "raw" else f"JPEG {self.jpeg_quality}",
            "1 chunk" if self.chunks == 1 else f"{self.chunks} chunks",
            "gRPC" if self.transport == "grpc" else "shared memory",
        ]


class Settings(_Value):
    """One point: how everything is served and asked for."""

    nets: Net = Net()  # all of them, but for what one's own table says
    audio_encoder: Net = Net()
    vad: Net = Net()
    deformation: Net = Net()
    rasterizer: Rasterizer = Rasterizer()
    queue: Queue = Queue()
    request: Request = Request()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for name in NETS:
            net, offered = self.net(name), graph(name).tolerances
            if net.precision is not None and net.precision not in offered:
                raise ValueError(f"{name} is not offered in {net.precision}, but in {', '.join(offered)}")
            if net.cuda_graphs and net.platform != "tensorrt_plan":
                raise ValueError(f"{name}: CUDA graphs need the platform tensorrt_plan")
            if net.platform == "tensorrt_plan" and (net.threads or net.parameters):
                raise ValueError(f"{name}: threads and parameters are ONNX Runtime's, a plan has none")
        return self

    def net(self, name: str) -> Net:
        """What holds for one of `NETS`."""
        own: Net = getattr(self, name)
        return self.nets.model_copy(update={axis: getattr(own, axis) for axis in own.model_dump(exclude_defaults=True)})

    def changes(self) -> dict[str, ModelChange]:
        """What is to be derived, by model; only those that change."""
        changes = {name: _change(self.net(name), self._delay(name)) for name in NETS}
        device = {} if self.rasterizer.device is None else {"device": self.rasterizer.device}
        changes["rasterizer"] = ModelChange(
            preferred_batch_sizes=self.rasterizer.preferred_batch_sizes,
            queue_delay_us=self._delay("rasterizer"),
            parameters={**self.rasterizer.parameters, **device},
        )
        return {name: change for name, change in changes.items() if change != ModelChange()}

    def label(self, baseline: Settings) -> str:
        """What differs from the baseline, in words that fit beside a dot; two points of one label are one point."""
        words = []
        for axis in Net.model_fields:
            values = {name: getattr(self.net(name), axis) for name in NETS}
            changed = {name: value for name, value in values.items() if value != getattr(baseline.net(name), axis)}
            if len(changed) == len(NETS) and all(value == changed[NETS[0]] for value in changed.values()):
                changed = {"": changed[NETS[0]]}
            words += [f"{name} {_words(axis, value)}".strip() for name, value in changed.items()]
        for axis in Rasterizer.model_fields:
            if (value := getattr(self.rasterizer, axis)) != getattr(baseline.rasterizer, axis):
                words.append(f"rasterizer {_words(axis, value)}")
        if self.queue != baseline.queue:
            words.append(self.queue.words)
        if self.request != baseline.request:
            words += [word for word in self.request.words if word not in baseline.request.words]
        return ", ".join(words) or BASELINE

    def _delay(self, stage: str) -> int | None:
        if self.queue.stage is None:
            return None
        return self.queue.delay_us if stage == self.queue.stage else 0


def _change(net: Net, delay_us: int | None) -> ModelChange:
    threads = {} if net.threads is None else {"intra_op_thread_count": str(net.threads)}
    return ModelChange(
        precision=net.precision,
        platform=net.platform,
        instances=net.instances,
        preferred_batch_sizes=net.preferred_batch_sizes,
        queue_delay_us=delay_us,
        cuda_graphs=net.cuda_graphs,
        parameters={**net.parameters, **threads},
    )


def _words(axis: str, value: Any) -> str:
    match axis:
        case "instances" | "threads":
            return f"{value} {axis if value != 1 else axis[:-1]}"
        case "preferred_batch_sizes":
            return f"batches of {'/'.join(map(str, value))}"
        case "cuda_graphs":
            return "CUDA graphs" if value else "no CUDA graphs"
        case "parameters":
            return " ".join(f"{key} {setting}" for key, setting in value.items())
        case _:
            return str(value)


class Loads(_Value):
    """What every point is put under, beside the baseline."""

    size: Annotated[int, Field(ge=8, multiple_of=8)] = 512  # pixels a side
    concurrencies: Counts = (8,)  # requests under way, of perf_analyzer; the largest one's throughput counts
    concurrency_seconds: Positive = 3
    streams: Counts = (6,)  # viewers in real time; the largest number's latency counts
    stream_seconds: Annotated[float, Field(gt=0, strict=False)] = 4.0
    repeats: Positive = 2  # of each load: the baseline and the point, then the point and the baseline, and so on


class Limits(_Value):
    """Below these a point is broken: of what is drawn, before JPEG, against the baseline's."""

    psnr_db: Annotated[float, Field(strict=False)] = 38.0
    coefficients_r: Annotated[float, Field(le=1, strict=False)] = 0.99


QUICK = Loads(size=64, concurrencies=(1,), concurrency_seconds=1, streams=(1,), stream_seconds=0.5, repeats=1)


class Study(_Value):
    """One file."""

    name: str  # of the file
    title: str
    device: Literal["cpu", "cuda"] = "cpu"  # that it is about
    avatar: str = "ava"
    baseline: Settings = Settings()
    loads: Loads = Loads()
    limits: Limits = Limits()
    points: tuple[Settings, ...]  # the baseline first: a second server of it says how far chance goes

    @classmethod
    def read(cls, path: Path) -> Self:
        """Parse a file.

        Raises:
            StudyError: it can't be read, has an unknown axis, a value of a wrong type, or a combination that can't be.
        """
        try:
            found = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise StudyError(f"{path} can't be read: {error}") from error
        try:
            return cls._of(path.stem, found)
        except StudyError as error:
            raise StudyError(f"{path}: {error}") from error

    @classmethod
    def _of(cls, name: str, found: dict[str, Any]) -> Self:
        grids = found.pop("grid", [])
        if not isinstance(grids, list) or not grids or not all(isinstance(grid, dict) for grid in grids):
            raise StudyError("there is no [[grid]]: at least one is expected, with the axes and their values")
        if taken := sorted({"name", "points"} & found.keys()):
            raise StudyError(f"{taken[0]}: not for a file to say")
        base = found.get("baseline", {})
        points = [_parsed(Settings, base, "baseline")]
        for number, grid in enumerate(grids, 1):
            points += [_parsed(Settings, _merged(base, values), f"grid {number}") for values in _combinations(grid)]
        unique: dict[str, Settings] = {}
        for point in points:
            unique.setdefault(point.label(points[0]), point)
        if len(unique) == 1:
            raise StudyError("no grid has a point that differs from the baseline")
        return _parsed(cls, {**found, "baseline": points[0], "name": name, "points": tuple(unique.values())}, "")

    def label(self, point: Settings) -> str:
        """Of one of its points."""
        return point.label(self.baseline)


BASELINE = "baseline"

_T = TypeVar("_T", bound=_Value)


def _parsed(kind: type[_T], values: Any, where: str) -> _T:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise StudyError("; ".join(_problem(kind, each, where) for each in error.errors())) from error


def _problem(kind: type[BaseModel], error: Any, where: str) -> str:
    """One of pydantic's, as a sentence with the axis in it."""
    place = ".".join(str(part) for part in error["loc"] if not isinstance(part, int))
    at = ", ".join(filter(None, (where, place)))
    match error["type"]:
        case "extra_forbidden":
            return f"{at}: unknown, expected one of {', '.join(_fields(kind, error['loc'][:-1]))}"
        case "value_error":
            return f"{at}: {error['ctx']['error']}"
        case "missing":
            return f"{at}: missing"
        case "tuple_type" | "model_type" | "mapping_type":
            return f"{at} is {error['input']!r}, expected a {'list' if error['type'] == 'tuple_type' else 'table'}"
        case "too_short":
            return f"{at} is empty"
        case _:
            return f"{at} is {error['input']!r}, expected {error['msg'].removeprefix('Input should be ')}"


def _fields(kind: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    for part in path:
        kind = cast(type[BaseModel], kind.model_fields[str(part)].annotation)
    return [name for name in kind.model_fields if kind is not Study or name not in ("name", "points")]


def _combinations(grid: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every value of every axis with every other one's, as nested tables."""
    axes = dict(_leaves(grid))
    for axis, values in axes.items():
        if not isinstance(values, list) or not values:
            raise StudyError(f"grid: {axis} is {values!r}, expected a list of the values that it takes")
    for combination in itertools.product(*axes.values()):
        point: dict[str, Any] = {}
        for axis, value in zip(axes, combination, strict=True):
            *tables, last = axis.split(".")
            place = point
            for table in tables:
                place = place.setdefault(table, {})
            place[last] = value
        yield point


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return merged
