"""How many live avatars this machine carries, what they cost, and what else is known of its throughput.

``rows``: streams of 25 frames a second in real time, mixed over four avatars, more and more of them until the SLO of
`loadtests.slo` breaks; then the largest number that held is confirmed by a longer run, or the next smaller one is. A
step that breaks is run once more before it counts, since a virtual machine hiccups; ``rows`` has the run that counted
of each number, ``runs`` all of them. ``plain`` and ``plain_runs`` are the same with the server of `loadtests.plain`,
driven by the same generator. Further tables: flat-out frames per second; what a stream costs alone, beside others,
silent, idle and listening; what loaded avatars cost while nobody speaks; preloads under load; a thousand switches of
avatars; how much of a second core the second processor is. The generator runs on the same machine: its own share stands
in every row. ``capacity.png`` draws the curves.

    python -m loadtests.capacity --json bench/capacity.json
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from loadtests.cast import cast, crowd
from loadtests.plain import PlainServer
from loadtests.profile import second_processor
from loadtests.slo import Slo, Summary, percentiles
from loadtests.streams import Generator, Kind, Load, Target, Triton
from loadtests.usage import Usage, Watch
from talksplat.bench._ask import animate, operate
from talksplat.bench._report import Row, report
from talksplat.files import replacing
from talksplat.server import ROOT, Ports, Server

SETTLING = 20  # times half a second that a server gets after a run that was too much for it
TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds, in which the kernel counts processor time


@dataclass(frozen=True)
class Plan:
    """How long everything takes; the default is about ten minutes."""

    sizes: tuple[tuple[int, int, int], ...] = ((512, 4, 1), (256, 8, 2))  # pixels, step and resolution of the search
    step_seconds: float = 6.0
    confirm_seconds: float = 20.0
    flat_out: tuple[int, ...] = (1, 8)  # streams
    flat_out_seconds: float = 5.0
    at_rest: int = 8  # streams that are idle, listening, silent or speaking
    crowd: int = 100  # further avatars on disk
    still_seconds: float = 4.0  # of a server that nobody asks for anything
    preloads: int = 8  # under load, one a second
    switches: int = 1000
    chunks: int = 15  # of a stream: 2.4 s
    kernel_seconds: float = 2.0


QUICK = Plan(
    sizes=((64, 1, 1),),
    step_seconds=0.5,
    confirm_seconds=0.5,
    flat_out=(1,),
    flat_out_seconds=0.5,
    at_rest=1,
    crowd=3,
    still_seconds=0.2,
    preloads=1,
    switches=4,
    chunks=3,
    kernel_seconds=0.2,
)
QUICK_STREAMS = 2


def main(argv: list[str] | None = None) -> int:
    """Measure and report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.capacity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write everything there, and a plot beside it as .png"
    )
    parser.add_argument("--avatar", type=Path, default=ROOT / "avatars" / "ava", help="bundle; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="everything once and too short to mean anything")
    arguments = parser.parse_args(argv)
    plan, most = (QUICK, QUICK_STREAMS) if arguments.quick else (Plan(), sys.maxsize)
    with tempfile.TemporaryDirectory(prefix="talksplat-capacity-") as folder:
        avatars = cast(arguments.avatar, Path(folder), 4)
        extras = crowd(Path(folder) / avatars[0], Path(folder), plan.crowd)
        rows, further = measure(plan, Path(folder), avatars, extras, most)
    report("capacity", rows, arguments.json, further)
    if arguments.json is not None:
        plot(rows, further["plain"], arguments.json.with_suffix(".png"))
    return 0


def measure(
    plan: Plan, folder: Path, avatars: Sequence[str], extras: Sequence[str], most: int = sys.maxsize
) -> tuple[list[Row], dict[str, list[Row]]]:
    """The rows, and the further tables by name."""
    rows: list[Row] = []
    further: dict[str, list[Row]] = {"largest": [], "flat_out": [], "plain": []}
    with Generator() as generator:
        processors = second_processor(folder, avatars[0], plan.kernel_seconds)
        with Server(avatars=folder, ports=Ports.free()) as server:
            assert server.pid is not None
            bench = Bench(generator, Triton(server.grpc_url), server.pid, tuple(avatars), plan, server, most)
            further["avatars_at_rest"] = bench.avatars_at_rest(extras)
            held = bench.search(rows)
            further["flat_out"] += bench.flat_out()
            further["cost"] = bench.cost(held)
            further["preload_under_load"] = bench.preload_under_load(extras, held)
            further["switches"] = bench.switches(extras)
        with PlainServer(folder) as plain:
            bench = Bench(generator, plain.target, plain.pid, tuple(avatars), plan, most=most)
            plainly = bench.search(further["plain"])
            further["flat_out"] += bench.flat_out()
    further["second_processor"] = [processors, second_processor(folder, avatars[0], plan.kernel_seconds)]
    further["largest"] = list(_largest(rows, further, held, plainly))
    further["runs"] = rows
    further["plain_runs"] = further["plain"]
    further["plain"] = decisive(further["plain"])
    return decisive(rows), further


def decisive(runs: Sequence[Row]) -> list[Row]:
    """Of each number of streams the run that counts: the longest, and of those the last. By size, then by number."""
    best: dict[tuple[int, int], Row] = {}
    for run in runs:
        key = -int(run["size"] or 0), int(run["streams"] or 0)
        if float(run["seconds"] or 0) >= float(best.get(key, run)["seconds"] or 0):
            best[key] = run
    return [best[key] for key in sorted(best)]


def largest(holds: Callable[[int], bool], stride: int, resolution: int, most: int = sys.maxsize) -> int:
    """The largest number that holds: 1, then in strides until one breaks, then in between down to the resolution.

    0 where not even 1 holds.
    """
    if not holds(1):
        return 0
    good, bad = 1, None
    for number in itertools.count(stride, stride):
        if number > most:
            break
        if number > good:
            if not holds(number):
                bad = number
                break
            good = number
    while bad is not None and bad - good > resolution:
        middle = (good + bad) // 2
        if holds(middle):
            good = middle
        else:
            bad = middle
    return good


@dataclass
class Bench:
    """One server under measurement."""

    generator: Generator
    target: Target
    pid: int
    avatars: tuple[str, ...]
    plan: Plan
    server: Server | None = None  # with Triton's statistics; None: the plain one
    most: int = sys.maxsize  # streams that the search goes to

    @property
    def name(self) -> str:
        """Of the server, in tables."""
        return "talksplat" if self.server is not None else "plain"

    def search(self, rows: list[Row]) -> dict[int, int]:
        """Streams that hold, confirmed, by size; every run becomes a row."""
        held = {}
        for size, stride, resolution in self.plan.sizes:

            def holds(streams: int, seconds: float = self.plan.step_seconds, size: int = size) -> bool:
                for _ in range(2):
                    row = self.paced(size, streams, seconds)
                    rows.append(row)
                    if row["slo_ok"]:
                        return True
                return False

            found = largest(holds, stride, resolution, self.most)
            while found and not holds(found, self.plan.confirm_seconds):
                found -= min(found, resolution)
            held[size] = found
        return held

    def paced(self, size: int, streams: int, seconds: float, kind: Kind = "speaking") -> Row:
        """One run in real time, as a row."""
        load = self._load(size, streams, seconds, kind)
        watch = Watch(self.pid, self.server.grpc_url if self.server is not None else None)
        seen = self.generator.paced(self.target, load, watch)
        cpu = max(TICK, sum(watch.cpu_seconds.values()))
        lost = sum(map(len, seen.failed_ms.values()))
        if lost:
            self._settle()
        summary = Summary.of(seen.playouts)
        stream_seconds = streams * seconds
        print(f"{self.name}: {size}, {streams} streams {kind}: {', '.join(summary.broken()) or 'holds'}", flush=True)
        return {
            "size": size,
            "streams": streams,
            "first_frame_p95_ms": summary.row()["first_frame_p95_ms"],
            "deadline_miss_pct": summary.deadline_miss_pct,
            "frames_per_s": seen.frames_per_s,
            "slo_ok": summary.ok(),
            "seconds": seconds,
            **{name: value for name, value in summary.row().items() if name not in ("streams", "frames")},
            "failed_chunks": lost,
            "server_cpu_s_per_stream_s": cpu / stream_seconds,
            "generator_cpu_s_per_stream_s": seen.cpu_seconds / stream_seconds,
            "generator_cpu_share_pct": 100 * seen.cpu_seconds / (seen.cpu_seconds + cpu),
            "generator_lag_p99_ms": seen.lag_p99_ms,
            "frames_per_server_cpu_s": seen.frames_per_s * seconds / cpu,
            "cores_busy": (seen.cpu_seconds + cpu) / seconds,
            "rss_mb": watch.rss_bytes / 1e6,
            **watch.batches,
        }

    def flat_out(self) -> list[Row]:
        """Closed loops: every stream as fast as it is answered."""
        return [
            self._flat_out(size, streams)
            for (size, _, _), streams in itertools.product(self.plan.sizes, self.plan.flat_out)
        ]

    def _flat_out(self, size: int, streams: int) -> Row:
        watch = Watch(self.pid, self.server.grpc_url if self.server is not None else None)
        load = self._load(size, streams, self.plan.flat_out_seconds)
        seen = self.generator.flat_out(self.target, load, watch)
        cpu = max(TICK, sum(watch.cpu_seconds.values()))
        p50, p95, p99 = percentiles(seen.chunk_ms)
        return {
            "server": self.name,
            "size": size,
            "streams": streams,
            "frames_per_s": seen.frames_per_s,
            "chunk_p50_ms": p50,
            "chunk_p95_ms": p95,
            "chunk_p99_ms": p99,
            "frames_per_server_cpu_s": seen.frames_per_s * seen.seconds / cpu,
            "generator_cpu_share_pct": 100 * seen.cpu_seconds / (seen.cpu_seconds + cpu),
            "cores_busy": (seen.cpu_seconds + cpu) / seen.seconds,
            **watch.batches,
        }

    def cost(self, held: dict[int, int]) -> list[Row]:
        """A stream's processor time: one alone, as many as hold, at rest for the first time and again, silent."""
        size, streams = self.plan.sizes[0][0], self.plan.at_rest
        runs: list[tuple[str, int, Kind]] = [
            ("one alone", 1, "speaking"),
            ("as many as hold", max(1, held[size]), "speaking"),
            ("speaking", streams, "speaking"),
            ("idle, first time", streams, "idle"),  # each of the frames is drawn once
            ("idle", streams, "idle"),
            ("listening, first time", streams, "listening"),
            ("listening", streams, "listening"),
            ("silent", streams, "silent"),
        ]
        rows: list[Row] = []
        for what, count, kind in runs:
            row = self.paced(size, count, self.plan.step_seconds, kind)
            rows.append({"what": what, **{name: row[name] for name in COST_COLUMNS}})
        alone, speaking = (float(rows[place]["server_cpu_s_per_stream_s"] or 0) for place in (0, 2))
        for row in rows:
            own = float(row["server_cpu_s_per_stream_s"] or 0)
            row |= {"against_one_alone": own / alone, "against_speaking": own / speaking}
        return rows

    def avatars_at_rest(self, extras: Sequence[str]) -> list[Row]:
        """What loaded avatars cost while nobody asks for anything: one of them, and then all."""
        rows: list[Row] = []
        with self._client() as client:
            for count in (1, len(extras)):
                for avatar in extras[:count]:
                    operate(client, "preload", avatar)
                before = Usage.of(self.pid)
                time.sleep(self.plan.still_seconds)
                after = Usage.of(self.pid)
                rows.append(
                    {
                        "avatars_loaded": count,
                        "rss_mb": after.rss_bytes / 1e6,
                        "cores_busy": (after.total - before.total) / self.plan.still_seconds,
                    }
                )
            for avatar in extras:
                operate(client, "unload", avatar)
        return rows

    def preload_under_load(self, extras: Sequence[str], held: dict[int, int]) -> list[Row]:
        """Streams at 60 % of what holds, without and with an avatar that is read anew every second."""
        size = self.plan.sizes[0][0]
        streams = max(1, int(0.6 * held[size]))
        rows: list[Row] = []
        for preloads in (0, self.plan.preloads):
            with self._preloading(extras, preloads) as taken:
                row = self.paced(size, streams, self.plan.step_seconds)
            chosen = ("streams", "chunk_p50_ms", "chunk_p95_ms", "chunk_p99_ms", "deadline_miss_pct")
            rows.append(
                {
                    "preloads": len(taken),
                    **{name: row[name] for name in chosen},
                    "preload_p50_ms": float(np.median(taken)) if taken else None,
                    "preload_most_ms": max(taken, default=None),
                }
            )
        without, beside = (float(row["chunk_p99_ms"] or 0) for row in rows)
        rows[1]["p99_ratio"] = beside / without
        return rows

    @contextmanager
    def _preloading(self, extras: Sequence[str], preloads: int) -> Iterator[list[float]]:
        """Meanwhile that many of the extras are preloaded, one a second; their milliseconds."""
        taken: list[float] = []
        over = threading.Event()

        def run() -> None:
            with self._client() as client:
                for number in range(preloads):
                    avatar = extras[number % len(extras)]
                    operate(client, "unload", avatar)
                    taken.append(operate(client, "preload", avatar))
                    if over.wait(1.0):
                        return

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield taken
        finally:
            over.set()
            thread.join()

    def switches(self, extras: Sequence[str]) -> list[Row]:
        """Memory before and after many switches: each forgets an avatar, loads the next one and draws a chunk of it."""
        size = self.plan.sizes[-1][0]
        rows: list[Row] = []
        warm_up = self.plan.switches // 5
        with self._client() as client:
            for done in range(warm_up + self.plan.switches + 1):
                if done in (warm_up, warm_up + self.plan.switches):
                    rows.append({"switches": done - warm_up, "rss_mb": Usage.of(self.pid).rss_bytes / 1e6})
                avatar = extras[done % len(extras)]
                operate(client, "unload", extras[done % len(extras) - 1])
                animate(client, avatar, done, size)
        growth = float(rows[1]["rss_mb"] or 0) / float(rows[0]["rss_mb"] or 1) - 1
        rows[1]["growth_pct"] = 100 * growth
        return rows

    def _settle(self) -> None:
        """Wait until the server has worked off what nobody waits for any more."""
        for _ in range(SETTLING):
            before = Usage.of(self.pid)
            time.sleep(0.5)
            if Usage.of(self.pid).total - before.total < 0.05:
                return

    def _client(self) -> triton.InferenceServerClient:
        assert self.server is not None
        return triton.InferenceServerClient(self.server.grpc_url)

    def _load(self, size: int, streams: int, seconds: float, kind: Kind = "speaking") -> Load:
        return Load(streams, self.avatars, size, seconds, (kind,), chunks=self.plan.chunks)


COST_COLUMNS = ("streams", "server_cpu_s_per_stream_s", "generator_cpu_s_per_stream_s", "chunk_p50_ms", "chunk_p99_ms")


def _largest(
    rows: Sequence[Row], further: dict[str, list[Row]], held: dict[int, int], plainly: dict[int, int]
) -> Iterator[Row]:
    """What it comes to, by size."""
    for size in held:
        fastest = {
            name: max(
                (
                    float(row["frames_per_s"] or 0)
                    for row in further["flat_out"]
                    if (row["server"], row["size"]) == (name, size)
                ),
                default=0.0,
            )
            for name in ("talksplat", "plain")
        }
        yield {
            "size": size,
            "streams": held[size],
            "plain_streams": plainly[size],
            "streams_ratio": held[size] / plainly[size] if plainly[size] else None,
            "flat_out_frames_per_s": fastest["talksplat"],
            "plain_flat_out_frames_per_s": fastest["plain"],
            "flat_out_ratio": fastest["talksplat"] / fastest["plain"] if fastest["plain"] else None,
        }


def plot(rows: Sequence[Row], plain: Sequence[Row], path: Path) -> None:
    """The curves: milliseconds and misses by the number of streams, ours drawn through, the plain server's dashed."""
    sizes = list(dict.fromkeys(int(row["size"] or 0) for row in rows))
    figure = Figure(figsize=(6 * len(sizes), 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(sizes), sharex="col", squeeze=False)
    for (upper, lower), size in zip(axes.T, sizes, strict=True):
        for server, runs, style in (("talksplat", rows, "-"), ("plain", plain, "--")):
            best = {int(row["streams"] or 0): row for row in runs if row["size"] == size}
            counts = sorted(best)
            for column, color in (("chunk_p50_ms", "C0"), ("chunk_p95_ms", "C1"), ("chunk_p99_ms", "C2")):
                values = [best[count][column] for count in counts]
                label = f"{server}, {column.removesuffix('_ms').replace('_', ' ')}"
                upper.plot(counts, values, style, color=color, marker=".", label=label)
            upper.plot(counts, [best[c]["first_frame_p95_ms"] for c in counts], style, color="0.5", marker=".",
                       label=f"{server}, first frame p95")  # fmt: skip
            misses = [best[count]["deadline_miss_pct"] for count in counts]
            lower.plot(counts, misses, style, color="C3", marker=".", label=server)
        upper.axhline(Slo().first_frame_p95_ms, color="0.8")
        lower.axhline(Slo().deadline_miss_pct, color="0.8")
        upper.set(
            yscale="log", title=f"{size} x {size}, from when a chunk was due until its frames were here", ylabel="ms"
        )
        lower.set(xlabel="streams of 25 frames/s", ylabel="frames that missed the playout, %")
        lower.set_yscale("symlog", linthresh=1)
        lower.set_ylim(0, 100)
        upper.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axis in (upper.yaxis, lower.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for each in (upper, lower):
            each.grid(alpha=0.3)
            each.legend(fontsize=8)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
