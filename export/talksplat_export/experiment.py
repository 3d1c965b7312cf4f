"""`talksplat-export experiment`: measures the points of a study beside its baseline, and draws what they cost and give.

For each point a model repository is derived and served, warmed up, held against the baseline's frames and loaded; then
it is stopped. The baseline's server stays up meanwhile, and each load is put on one and then on the other, the order
turned round from one repeat to the next: what the machine does by the way hits both, and a row's ratios compare
neighbours. Rows are kept as soon as they are there: what is interrupted goes on, and a point that was measured on this
machine, from the same sources and under the same loads, is not measured again. One that fails is a row that says why;
it is tried again the next time.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt
import polars as pl
import simplejpeg
import tritonclient.grpc as triton
from adjustText import adjust_text
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from rich.console import Console
from tritonclient.utils import np_to_triton_dtype

from talksplat import avatar as bundle
from talksplat import clock, framing
from talksplat.bench._report import Row, commit, machine, report
from talksplat.files import replacing, sha256
from talksplat.server import ROOT, Ports, Server, ServerError

from . import feeds
from .derive import DeriveError, derive
from .study import NETS, QUICK, Request, Settings, Study, StudyError

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

LOADTESTS = ROOT / "loadtests"
QUALITY_CHUNKS = 16  # from all of the demo's speech, by which points are compared
IDENTICAL_DB = 100.0  # stands for frames in which no byte differs
SLACK_SECONDS = 60.0  # beyond ten times what a load should take, before it counts as stuck


class ExperimentError(RuntimeError):
    """An experiment can't be run at all; the message says why."""


class NoCheckoutError(ExperimentError):
    """The load tests, or files that they need, are not here."""


class NoGpuError(ExperimentError):
    """The study is about GPUs, and there is none."""


class PointError(RuntimeError):
    """A point was served, but not as it should be, or could not be loaded."""


# ------------------------------------------------------------------------------------------------------------ results

_MEASURED = {  # by kind of load: what a row has of it, the median of its repeats
    "concurrency": ("frames_per_s",),
    "streams": (
        "chunk_p50_ms",
        "chunk_p95_ms",
        "first_frame_p95_ms",
        "deadline_miss_pct",
        "server_cpu_s_per_stream_s",
        "generator_cpu_share_pct",
        "batch_audio_encoder",
    ),
}
_RATIOS = {  # to the neighbouring runs of the baseline
    "throughput_ratio": ("concurrency", "frames_per_s"),
    "latency_ratio": ("streams", "chunk_p95_ms"),
    "cpu_ratio": ("streams", "server_cpu_s_per_stream_s"),
}
_QUALITY = ("psnr_db", "delivered_psnr_db", "coefficients_r")
_FIGURES = (*itertools.chain(*_MEASURED.values()), *_RATIOS, "throughput_spread_pct", *_QUALITY)
_RUN_FIGURES = (
    *itertools.chain(*_MEASURED.values()),
    "request_p50_ms",
    "request_p95_ms",
    "server_cpu_ms_per_frame",
    "generator_lag_p99_ms",
    "batch_rasterizer",
)
_RUN = {"server": pl.String(), "kind": pl.String(), "count": pl.Int32(), "repeat": pl.Int32()}
SCHEMA: dict[str, pl.DataType] = {
    "point": pl.String(),
    "settings": pl.String(),  # JSON: what is not as committed
    **dict.fromkeys(_FIGURES, pl.Float64()),
    "reason": pl.String(),  # of a failure
    "runs": pl.List(pl.Struct({**_RUN, **dict.fromkeys(_RUN_FIGURES, pl.Float64())})),
    "machine": pl.String(),
    "commit": pl.String(),
    "key": pl.String(),  # a digest of all that the row depends on
}

Measured = dict[str, Any]  # a row of SCHEMA


class Results:
    """The rows of a study: a Parquet file that is written anew, and as a whole, with each of them."""

    def __init__(self, path: Path) -> None:
        """Read what is there.

        Raises:
            ExperimentError: it is something else.
        """
        self._path = path
        self.rows: list[Measured] = []
        if path.exists():
            try:
                self.rows = pl.read_parquet(path, schema=SCHEMA).to_dicts()
            except (pl.exceptions.PolarsError, OSError) as error:
                raise ExperimentError(f"{path} holds no results of a study: {error}") from error

    def has(self, point: str, key: str) -> bool:
        """Whether a point is measured; one that failed is not."""
        return any((row["point"], row["key"], row["reason"]) == (point, key, None) for row in self.rows)

    def put(self, row: Measured) -> None:
        """Keep a row, in place of the point's earlier one."""
        self.rows = [*(other for other in self.rows if other["point"] != row["point"]), row]
        with replacing(self._path) as unfinished:
            pl.DataFrame(self.rows, schema=SCHEMA).write_parquet(unfinished)


def on_front(costs: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether no other is as small in both and smaller in one: Pareto's front."""
    front = [False] * len(costs)
    least = float("inf")  # of the second, among those whose first is smaller
    order = sorted(range(len(costs)), key=costs.__getitem__)
    for _, group in itertools.groupby(order, key=lambda place: costs[place][0]):
        equal = list(group)
        best = costs[equal[0]][1]
        for place in equal:
            front[place] = costs[place][1] == best < least
        least = min(least, best)
    return front


# ------------------------------------------------------------------------------------------------------------ running


def run(
    study: Study, output: Path, *, plans: Path | None = None, only: Sequence[str] = (), console: Console | None = None
) -> list[Measured]:
    """Measure what is not measured yet, and write ``NAME.parquet``, ``.png``, ``.md`` and ``.json`` into ``output``.

    Args:
        plans: has a folder a precision, each what `talksplat-export tensorrt --plans` has written for it.
        only: parts of labels; other points are left as they are.
        console: says how far it is.

    Returns:
        The study's rows as far as they are there, the baseline's first; see export/experiments/README.md.

    Raises:
        ExperimentError: one of its kinds.
        ServerError: the baseline itself can't be served.
        DeriveError: nor derived.
    """
    console = console or Console(quiet=True)
    _require(study)
    results = Results(output / f"{study.name}.parquet")
    made_from = sources(study.avatar, plans)
    points = {study.label(point): (point, _key(study, point, made_from)) for point in study.points}
    wanted = [label for label in points if not only or any(part in label for part in only)]
    todo = [label for label in wanted if not results.has(label, points[label][1])]
    console.print(f"{study.name}: {len(todo)} of {len(points)} points to measure")
    if todo:
        with _Bench(study, plans) as bench:
            for number, label in enumerate(todo, 1):
                point, key = points[label]
                with console.status(f"{label} ({number} of {len(todo)})"):
                    row = bench.measure(point)
                results.put({**row, "key": key})
                console.print(f"{label} ({number} of {len(todo)}): {_in_words(row)}")
    rows = [row for label in points for row in results.rows if row["point"] == label]
    _publish(study, rows, output)
    return rows


def check(study: Study, plans: Path | None = None) -> dict[str, str | None]:
    """By point: None where its repository can be derived, or why not. Starts nothing."""
    return {study.label(point): _underivable(point, plans) for point in study.points}


def _underivable(point: Settings, plans: Path | None) -> str | None:
    try:
        with _derived(point, plans):
            return None
    except DeriveError as error:
        return str(error)


def _require(study: Study) -> None:
    for path in (LOADTESTS / "point.py", feeds.SPEECH, ROOT / "avatars" / study.avatar):
        if not path.exists():
            raise NoCheckoutError(f"{path} is not here: experiments run in a checkout, which has what loads servers.")
    if study.device == "cuda" and not shutil.which("nvidia-smi"):
        raise NoGpuError(f"{study.name} is about GPUs, and this machine has none; --check says what can be said here.")


def sources(avatar: str, plans: Path | None) -> str:
    """A digest of the code, configs, models and packages that figures depend on."""
    digest = hashlib.sha256()
    wanted = [
        (ROOT / "talksplat", ("*.py", "splat/*.py", "splat/src/*")),
        (ROOT / "model_repository", ("*/config.pbtxt", "*/1/model.py", *(f"{net}/1/model.onnx" for net in NETS))),
        (ROOT / "build" / "models", tuple(f"*/{net}.onnx" for net in NETS)),
        (ROOT / "backends", ("*/*.py",)),
        (ROOT / "avatars" / avatar, ("*",)),
        (LOADTESTS, ("point.py", "streams.py", "slo.py", "usage.py", "perf_analyzer.py")),
    ]
    if plans is not None:
        wanted.append((plans, ("*/*/1/model.plan.json",)))
    for folder, patterns in wanted:
        for path in sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file()):
            digest.update(f"{path.relative_to(folder)} {sha256(path)}\n".encode())
    digest.update(repr([(name, version(name)) for name in ("onnxruntime", "numpy", "simplejpeg")]).encode())
    return digest.hexdigest()


def _key(study: Study, point: Settings, made_from: str) -> str:
    said = [each.model_dump_json() for each in (study.baseline, point, study.loads, study.limits)]
    return hashlib.sha256(json.dumps([*said, study.avatar, made_from, machine()]).encode()).hexdigest()[:16]


class _Bench:
    """The baseline's server, kept up, and the process that makes the loads; a context manager."""

    def __init__(self, study: Study, plans: Path | None) -> None:
        self._study, self._plans = study, plans
        self._kept = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._loads = stack.enter_context(_LoadProcess())
            self._baseline = stack.enter_context(self._serving(self._study.baseline))
            self._reference = self._pictures(self._baseline, self._study.baseline)
            self._kept = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.close()

    def measure(self, point: Settings) -> Measured:
        """A row; where something fails, with the reason."""
        row: Measured = dict.fromkeys(SCHEMA) | {
            "point": self._study.label(point),
            "settings": point.model_dump_json(exclude_defaults=True),
            "runs": [],
            "machine": machine(),
            "commit": commit(),
        }
        try:
            self._restart_baseline()
            with self._serving(point) as server:
                row |= self._pictures(server, point).compared(self._reference)
                self._check(row)
                row["runs"] = list(self._runs(server, point))
                row |= _summary(row["runs"])
        except Exception as error:  # whichever it is: the other points can be measured
            row["reason"] = _sentence(error)
        return row

    def _restart_baseline(self) -> None:
        if self._baseline.dead_processes():
            self._baseline.kill()
            self._baseline.start()
            _warm_up(self._baseline, self._study)

    @contextlib.contextmanager
    def _serving(self, point: Settings) -> Iterator[Server]:
        """A warm server of a point."""
        shared_memory = point.request.transport == "shared_memory"
        with (
            _derived(point, self._plans) as repository,
            Server(repository, ports=Ports.free(), shared_memory=shared_memory) as server,
        ):
            _warm_up(server, self._study)
            yield server

    def _pictures(self, server: Server, point: Settings) -> _Pictures:
        return _Pictures.of(server, self._study.avatar, self._study.loads.size, point.request)

    def _check(self, row: Measured) -> None:
        for name, limit in self._study.limits:
            if not row[name] >= limit:
                raise PointError(f"Broken: {name} is {row[name]:.4g}, below {limit:g}.")

    def _runs(self, server: Server, point: Settings) -> Iterator[dict[str, Any]]:
        loads = self._study.loads
        sides = {"baseline": (self._baseline, self._study.baseline), "point": (server, point)}
        for kind, counts, seconds in (
            ("concurrency", loads.concurrencies, float(loads.concurrency_seconds)),
            ("streams", loads.streams, loads.stream_seconds),
        ):
            for count, repeat in itertools.product(counts, range(loads.repeats)):
                for side in sorted(sides, reverse=bool(repeat % 2)):  # A B B A
                    served, settings = sides[side]
                    order = {
                        "url": served.grpc_url,
                        "pid": served.pid,
                        "avatar": self._study.avatar,
                        "size": loads.size,
                        "kind": kind,
                        "count": count,
                        "seconds": seconds,
                        "format": settings.request.format,
                        "quality": settings.request.jpeg_quality,
                        "chunks": settings.request.chunks,
                        "shared_memory": settings.request.transport == "shared_memory",
                    }
                    seen = self._loads.measure(order, 10 * seconds + SLACK_SECONDS)
                    yield {"server": side, "kind": kind, "count": count, "repeat": repeat, **_known(seen)}


def _known(seen: Mapping[str, Any]) -> dict[str, Any]:
    return {name: seen.get(name) for name in _RUN_FIGURES}


@contextlib.contextmanager
def _derived(point: Settings, plans: Path | None) -> Iterator[Path]:
    """A repository of its own."""
    (ROOT / "build").mkdir(exist_ok=True)  # on the file system of the models, which can then be linked
    with tempfile.TemporaryDirectory(prefix="experiment-", dir=ROOT / "build") as folder:
        repository, gathered = Path(folder, "repository"), Path(folder, "plans")
        if plans is not None:
            _gather(plans, point, gathered)
        derive(repository, point.changes(), plans=None if plans is None else gathered)
        yield repository


def _gather(plans: Path, point: Settings, folder: Path) -> None:
    """Link plans of the nets' own precisions beside each other: they are built one precision a folder.

    Raises:
        DeriveError: there is no such plan.
    """
    folder.mkdir()
    for name in NETS:
        net = point.net(name)
        if net.platform == "tensorrt_plan":
            precision = net.precision or "fp32"
            source = (plans / precision / name).resolve()
            if not source.is_dir():
                command = f"talksplat-export tensorrt --plans {plans / precision} --precision {precision}"
                raise DeriveError(f"{source} is missing: run `{command}`.")
            (folder / name).symlink_to(source)


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Medians and ratios, under the largest load of each kind."""
    found = {
        name: statistics.median(_repeats(runs, "point", kind, name))
        for kind, names in _MEASURED.items()
        for name in names
    }
    for ratio in _RATIOS:
        found[ratio] = statistics.median(_ratios(runs, ratio))
    ratios = _ratios(runs, "throughput_ratio")
    found["throughput_spread_pct"] = 50 * (max(ratios) - min(ratios)) / found["throughput_ratio"]
    return found


def _repeats(runs: Sequence[Mapping[str, Any]], server: str, kind: str, name: str) -> list[float]:
    """A figure under the largest load of its kind, repeat by repeat."""
    most = max(run["count"] for run in runs if run["kind"] == kind)
    chosen = [run for run in runs if (run["server"], run["kind"], run["count"]) == (server, kind, most)]
    return [run[name] for run in sorted(chosen, key=lambda run: run["repeat"])]


def _ratios(runs: Sequence[Mapping[str, Any]], ratio: str) -> list[float]:
    """One of `_RATIOS`, repeat by repeat."""
    pairs = zip(*(_repeats(runs, server, *_RATIOS[ratio]) for server in ("point", "baseline")), strict=True)
    return [ours / theirs for ours, theirs in pairs]


def _range(row: Measured, ratio: str) -> tuple[float, float]:
    """Least and largest of the repeats."""
    ratios = _ratios(row["runs"], ratio)
    return min(ratios), max(ratios)


def _sentence(error: Exception) -> str:
    """Without the log that a server that did not start appends, beyond its first line of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2])[:400]
    return said if isinstance(error, (ServerError, DeriveError, PointError)) else f"{type(error).__name__}: {said}"


def _in_words(row: Measured) -> str:
    if row["reason"]:
        return f"failed: {row['reason']}"
    return ", ".join(f"{name.removesuffix('_ratio')} x {row[name]:.3f}" for name in _RATIOS)


class _LoadProcess:
    """``python -m loadtests.point``, started when it is wanted, and anew after it was stuck or ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # closed below
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()  # with which it ends
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
        self._end()
        self._errors.close()

    def measure(self, order: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """What it has seen.

        Raises:
            PointError: the load failed, or took longer than ``timeout`` seconds.
        """
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        where = f"{order['count']} {order['kind']}"
        self._process.stdin.write(f"{json.dumps(order)}\n".encode())
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            self._end()
            raise PointError(f"The load of {where} had not ended after {timeout:g} s.")
        line = self._process.stdout.readline()
        if not line:
            raise PointError(f"The load of {where} ended with {self._process.wait()}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PointError(f"The load of {where} failed: {answer['error']}")
        return dict(answer["seen"])

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loadtests.point"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            start_new_session=True,  # Ctrl-C reaches this process only, which ends everything in order
        )

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with process, contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _last_words(self) -> str:
        self._errors.seek(0)
        return (self._errors.read().decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]


# ------------------------------------------------------------------------------------------------------------ quality


@dataclass(frozen=True, eq=False)
class _Pictures:
    """What a server makes of some of the demo's speech."""

    drawn: UInt8  # [frames, height, width, 3] before JPEG
    delivered: UInt8  # [frames, height, width, 3] as viewers ask for it
    coefficients: Float32  # [frames, 20]

    @classmethod
    def of(cls, server: Server, avatar: str, size: int, request: Request) -> Self:
        """Ask for it, chunk by chunk."""
        drawn: list[UInt8] = []
        delivered: list[UInt8] = []
        coefficients: list[Float32] = []
        with triton.InferenceServerClient(server.grpc_url) as client:
            for chunk, window in enumerate(_speech()):
                inputs = {"AUDIO": window[None], **_chunk(avatar, chunk * clock.CHUNK_FRAMES)}
                raw = _infer(client, "animate", inputs, {"size": size, "format": "raw"}).as_numpy("FRAMES")[0]
                drawn += [np.frombuffer(frame, np.uint8).reshape(size, size, 3) for frame in raw]
                if request.format == "jpeg":
                    asked = {"size": size, "quality": request.jpeg_quality}
                    encoded = _infer(client, "animate", inputs, asked).as_numpy("FRAMES")[0]
                    delivered += [simplejpeg.decode_jpeg(frame) for frame in encoded]
                coefficients.append(_coefficients(client, inputs))
        pictures = np.stack(drawn)
        return cls(pictures, np.stack(delivered) if delivered else pictures, np.concatenate(coefficients))

    def compared(self, baseline: _Pictures) -> dict[str, float]:
        """The columns of `_QUALITY`."""
        return {
            "psnr_db": _psnr(self.drawn, baseline.drawn),
            "delivered_psnr_db": _psnr(self.delivered, baseline.drawn),
            "coefficients_r": float(np.corrcoef(self.coefficients.ravel(), baseline.coefficients.ravel())[0, 1]),
        }


def _psnr(frames: UInt8, others: UInt8) -> float:
    """Over all frames together, so that a few bad ones count; at most `IDENTICAL_DB`."""
    squares = [np.mean((a.astype(np.float32) - b) ** 2, dtype=np.float64) for a, b in zip(frames, others, strict=True)]
    error = float(np.mean(squares))
    return min(IDENTICAL_DB, 20 * np.log10(255) - 10 * np.log10(error)) if error else IDENTICAL_DB


def _speech() -> Float32:  # [QUALITY_CHUNKS, WINDOW]
    """Windows of the demo's speech, far apart."""
    every = framing.windows(feeds.speech()[: framing.MAX_SAMPLES])
    return np.stack([every[place] for place in np.linspace(0, len(every) - 1, QUALITY_CHUNKS, dtype=int)])


def _coefficients(client: triton.InferenceServerClient, inputs: Mapping[str, Any]) -> Float32:  # [frames, 20]
    """What the nets say, asked one by one: the ensemble keeps it to itself."""
    [features] = _outputs(_infer(client, "audio_encoder", {"AUDIO": inputs["AUDIO"]}), "FEATURES")
    adapter = _outputs(_infer(client, "avatar", {"AVATAR": inputs["AVATAR"]}), "ADAPTER_IN", "ADAPTER_OUT")
    moved = {"FEATURES": features, "ADAPTER_IN": adapter[0], "ADAPTER_OUT": adapter[1]}
    [coefficients] = _outputs(_infer(client, "deformation", moved), "COEFFICIENTS")
    return np.concatenate(coefficients)


def _outputs(result: Any, *names: str) -> list[Float32]:
    return [np.asarray(result.as_numpy(name), np.float32) for name in names]


def _warm_up(server: Server, study: Study) -> None:
    """Have everything done once, and every plate decoded: a server that has just started is not to look slow."""
    plates = len(bundle.read(server.avatars, study.avatar).plates)
    with triton.InferenceServerClient(server.grpc_url) as client:
        for index in range(0, 2 * plates, clock.CHUNK_FRAMES):  # forth and back: all of them
            _infer(client, "rasterizer", _chunk(study.avatar, index), {"size": study.loads.size})
        for window in _speech():
            _infer(client, "animate", {"AUDIO": window[None], **_chunk(study.avatar, 0)}, {"size": study.loads.size})


def _chunk(avatar: str, frame_index: int) -> dict[str, npt.NDArray[Any]]:
    return {"AVATAR": np.array([[avatar.encode()]], np.object_), "FRAME_INDEX": np.array([[frame_index]], np.int64)}


def _infer(
    client: triton.InferenceServerClient,
    model: str,
    arrays: Mapping[str, npt.NDArray[Any]],
    parameters: Mapping[str, str | int] | None = None,
) -> Any:
    inputs = [
        triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)).set_data_from_numpy(array)
        for name, array in arrays.items()
    ]
    return client.infer(model, inputs, parameters=dict(parameters or {}), client_timeout=SLACK_SECONDS)


# ------------------------------------------------------------------------------------------------------------- report


def _publish(study: Study, rows: Sequence[Measured], output: Path) -> None:
    """The tables, printed and as files, and the plot."""
    tables = _tables(rows)
    main = tables.pop("")
    report(f"{study.name}, {study.title}", main, output / f"{study.name}.json", tables)
    with replacing(output / f"{study.name}.md") as unfinished:
        unfinished.write_text(_markdown(study, rows, {"": main, **tables}))
    if any(row["reason"] is None for row in rows):
        with replacing(output / f"{study.name}.png") as unfinished:
            _plot(study, rows, unfinished)


def _tables(rows: Sequence[Measured]) -> dict[str, list[Row]]:
    """By title: what is compared, what streams saw, and what failed."""
    sound = [row for row in rows if row["reason"] is None]
    front = on_front([_costs(row) for row in sound])
    compared = (
        "frames_per_s",
        "chunk_p95_ms",
        "server_cpu_s_per_stream_s",
        *_RATIOS,
        "throughput_spread_pct",
        *_QUALITY,
    )
    tables: dict[str, list[Row]] = {
        "": [
            {"point": row["point"], "front": "*" if best else None, **{name: row[name] for name in compared}}
            for row, best in zip(sound, front, strict=True)
        ],
        "streams": [{"point": row["point"], **{name: row[name] for name in _MEASURED["streams"]}} for row in sound],
    }
    if failed := [row for row in rows if row["reason"] is not None]:
        tables["failed"] = [{name: row[name] for name in ("point", *_QUALITY, "reason")} for row in failed]
    return tables


def _costs(row: Measured) -> tuple[float, float]:
    """Smaller is better: of ratios, since these compare neighbours."""
    return row["latency_ratio"], -row["throughput_ratio"]


def _markdown(study: Study, rows: Sequence[Measured], tables: Mapping[str, Sequence[Row]]) -> str:
    lines = [f"# {study.title}", ""]
    lines += [f"Measured on {place}." for place in _places(rows)]
    lines += ["", f"![{study.name}]({study.name}.png)"]
    for title, table in tables.items():
        if table:
            columns = list(table[0])
            lines += ["", *([f"## {title}", ""] if title else []), _cells(columns), _cells("---" for _ in columns)]
            lines += [_cells(_cell(row[name]) for name in columns) for row in table]
    return "\n".join([*lines, ""])


def _places(rows: Sequence[Measured]) -> list[str]:
    """Where rows were measured, and of which commits."""
    commits: dict[str, dict[str, None]] = {}
    for row in rows:
        commits.setdefault(row["machine"], {})[row["commit"]] = None
    return [f"{where}; commit {', '.join(which)}" for where, which in commits.items()]


def _cells(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _cell(value: str | int | float | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _plot(study: Study, rows: Sequence[Measured], path: Path) -> None:
    """Latency against throughput, the front drawn through; colour is how true the delivered frames are."""
    sound = [row for row in rows if row["reason"] is None]
    throughput, latency = _baseline(sound, "throughput_ratio"), _baseline(sound, "latency_ratio")
    x = [throughput * row["throughput_ratio"] for row in sound]
    y = [latency * row["latency_ratio"] for row in sound]
    front = on_front([_costs(row) for row in sound])
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row, a, b in zip(sound, x, y, strict=True):  # the repeats' own places
        axes.plot([throughput * each for each in _range(row, "throughput_ratio")], [b, b], color="0.85", lw=1, zorder=1)
        axes.plot([a, a], [latency * each for each in _range(row, "latency_ratio")], color="0.85", lw=1, zorder=1)
    best = sorted((a, b) for a, b, is_best in zip(x, y, front, strict=True) if is_best)
    axes.step(*zip(*best, strict=True), where="pre", color="C3", lw=1.2, alpha=0.7, zorder=2)
    axes.axvline(throughput, color="0.7", lw=0.8, ls=":", zorder=0)
    axes.axhline(latency, color="0.7", lw=0.8, ls=":", zorder=0)
    truth = [row["delivered_psnr_db"] for row in sound]
    edges = ["C3" if is_best else "white" for is_best in front]
    dots = axes.scatter(x, y, c=truth, cmap="viridis", s=90, edgecolors=edges, linewidths=1.5, zorder=3)
    notes = [
        "Places are ratios to neighbouring runs of the baseline, times its median (dotted); grey: repeats; red: front."
    ]
    if max(truth) - min(truth) < 0.05:
        notes.append(f"All deliver frames at {truth[0]:.1f} dB, against the baseline's before JPEG.")
    else:
        words = "delivered frames against the baseline's before JPEG, dB"
        figure.colorbar(dots, label=words, fraction=0.04, pad=0.02)
    if failed := ", ".join(row["point"] for row in rows if row["reason"] is not None):
        notes.append(f"Failed: {failed}.")
    axes.margins(0.12)
    if max(y) > 4 * min(y):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel(f"frames/s with {max(study.loads.concurrencies)} requests under way  (more is better)")
    axes.set_ylabel(f"chunk p95 of {max(study.loads.streams)} streams in real time, ms  (less is better)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(study.title, fontsize=14)
    figure.supxlabel("\n".join([*notes, *_places(sound)]), fontsize=7.5, color="0.4")
    halo = [withStroke(linewidth=3, foreground="white")]
    texts = [
        axes.text(a, b, row["point"].replace(", ", ",\n"), fontsize=9, path_effects=halo, zorder=4)
        for row, a, b in zip(sound, x, y, strict=True)
    ]
    adjust_text(texts, x, y, ax=axes, expand=(1.25, 1.6), arrowprops={"arrowstyle": "-", "color": "0.5", "lw": 0.6})
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _baseline(rows: Sequence[Measured], ratio: str) -> float:
    """The median of all its runs: what ratios are of, in the plot."""
    kind, name = _RATIOS[ratio]
    return statistics.median(each for row in rows for each in _repeats(row["runs"], "baseline", kind, name))


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("experiment", help="measure ways of serving against each other", description=__doc__)
    parser.add_argument("study", type=Path, metavar="FILE", help="TOML; see export/experiments/README.md")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "build" / "experiments",
        metavar="FOLDER",
        help="for results, which go on from what is there; default: build/experiments",
    )
    parser.add_argument("--plans", type=Path, metavar="FOLDER", help="of plans, a folder a precision in it")
    parser.add_argument("--only", nargs="+", default=(), metavar="TEXT", help="points whose labels have it in them")
    parser.add_argument("--quick", action="store_true", help="everything once and too short to mean anything")
    parser.add_argument("--check", action="store_true", help="derive every point's repository, and serve none")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    console = Console(highlight=False)
    try:
        study = Study.read(args.study)
        if args.check:
            problems = check(study, args.plans)
            for label, problem in problems.items():
                console.print(f"{label}: {problem or 'can be derived'}")
            return int(any(problems.values()))
        if args.quick:
            study = study.model_copy(update={"loads": QUICK})
        run(study, args.output, plans=args.plans, only=args.only, console=console)
    except (StudyError, ExperimentError, ServerError, DeriveError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0
