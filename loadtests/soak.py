"""Twenty minutes of streams at 80 % of what this machine carries: does anything grow, get lost, or fall behind?

The load runs in rounds of a minute. Within a round every stream has a connection of its own and ends after 12 s, when
another viewer's takes its place; from round to round the avatars move on, so that each is switched to and from, one of
them is away, and the number of viewers goes one up and one down. Bundles are forgotten and read anew in between. Memory
is looked at all the time. The first quarter is the warm-up: what a process holds more at the end than after it, it has
grown by.

    python -m loadtests.soak --json bench/soak.json

Ends with 1 if a limit does not hold; interrupted, it judges what it has seen.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import psutil
import tritonclient.grpc as triton
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loadtests.cast import cast
from loadtests.slo import Playout, Slo, Summary
from loadtests.streams import Generator, Load, Triton
from loadtests.usage import Usage
from talksplat import clock
from talksplat.bench._ask import operate
from talksplat.bench._report import Row, report
from talksplat.files import replacing
from talksplat.server import ROOT, Ports, Server

SHARE = 0.8  # of the streams that `loadtests.capacity` found to hold
AVATARS = 5  # of which all but one speak at a time
CHUNKS = 75  # of a stream, 12 s
ROUND_SECONDS = 60.0
LOOK_SECONDS = 2.0  # between two looks at memory
WARM_UP = 0.25  # of the whole time
GROWTH_PCT = 2.0  # of memory after the warm-up, at most
DRIFT_MS = Slo().skew_p95_ms  # by which frames may come later after their audio at the end than at the beginning


def main(argv: list[str] | None = None) -> int:
    """Soak and report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there, and a plot beside it as .png")
    parser.add_argument("--avatar", type=Path, default=ROOT / "avatars" / "ava", help="bundle; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=20.0, help="default: %(default)g")
    parser.add_argument("--size", type=int, default=512, help="pixels a side; default: %(default)s")
    parser.add_argument("--streams", type=int, help="default: 80 %% of what --capacity says")
    parser.add_argument("--capacity", type=Path, default=ROOT / "bench" / "capacity.json", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    streams = arguments.streams or streams_of(arguments.capacity, arguments.size)
    if not streams:
        parser.error(f"{arguments.capacity} says nothing of {arguments.size}: give --streams, or `make bench` first")
    soak = Soak(streams, arguments.size, arguments.minutes)
    with tempfile.TemporaryDirectory(prefix="talksplat-soak-") as folder:
        avatars = cast(arguments.avatar, Path(folder), AVATARS)
        with Server(avatars=Path(folder), ports=Ports.free()) as server, Generator() as generator:
            try:
                soak.run(server, generator, avatars)
            except KeyboardInterrupt:
                print("Interrupted: this is what was seen.", flush=True)
    if not soak.rounds or not soak.looks:
        print("Nothing was seen.", file=sys.stderr)
        return 1
    report("soak", soak.rows(), arguments.json, {"memory": soak.memory()})
    if arguments.json is not None:
        soak.plot(arguments.json.with_suffix(".png"))
    problems = soak.problems()
    print(
        "\n".join(problems) or f"{len(soak.rounds)} rounds of {streams} streams: nothing grew, got lost or fell behind."
    )
    return 1 if problems else 0


def streams_of(path: Path, size: int) -> int:
    """80 % of the streams that hold by what ``loadtests.capacity`` has written; 0 where it says nothing."""
    try:
        rows = json.loads(path.read_text())["rows"]
    except FileNotFoundError:
        return 0
    return int(SHARE * max((row["streams"] for row in rows if row["size"] == size and row["slo_ok"]), default=0))


@dataclass(frozen=True)
class Round:
    """What came of one."""

    ended: float  # seconds since the beginning
    streams: int
    playouts: Sequence[Playout]
    lost: int  # frames

    @property
    def drift_ms(self) -> float:
        """How much later after their audio a stream's last frames came than its first ones: the median stream's."""
        thirds = [np.array_split(each.chunk_ms, 3) for each in self.playouts if len(each.chunk_ms) >= 3]
        return float(np.median([np.median(last) - np.median(first) for first, _, last in thirds])) if thirds else 0.0


@dataclass
class Soak:
    """A run, and what was seen of it."""

    streams: int
    size: int
    minutes: float
    round_seconds: float = ROUND_SECONDS
    chunks: int = CHUNKS
    rounds: list[Round] = field(default_factory=list)
    looks: list[tuple[float, Mapping[str, int]]] = field(default_factory=list)  # seconds, and bytes by process
    died: str | None = None

    def run(self, server: Server, generator: Generator, avatars: Sequence[str]) -> None:
        """Load the server until the time is over or it dies."""
        assert server.pid is not None
        began = time.monotonic()
        with _looking(server.pid, began, self.looks), triton.InferenceServerClient(server.grpc_url) as client:
            while self.died is None and time.monotonic() - began < 60 * self.minutes:
                number = len(self.rounds)
                present = tuple(avatars[(number + place) % len(avatars)] for place in range(len(avatars) - 1))
                streams = max(1, self.streams + (0, 1, 0, -1)[number % 4])
                load = Load(streams, present, self.size, self.round_seconds, chunks=self.chunks, seed=number)
                seen = generator.paced(Triton(server.grpc_url), load)
                lost = clock.CHUNK_FRAMES * sum(map(len, seen.failed_ms.values()))
                self.rounds.append(Round(time.monotonic() - began, streams, seen.playouts, lost))
                print(", ".join(f"{name} {_short(value)}" for name, value in self.rows()[-1].items()), flush=True)
                self.died = server.dead_processes()
                if self.died is None:
                    operate(client, "unload", present[0])  # and read anew, when it comes back

    def rows(self) -> list[Row]:
        """A row a round."""
        rows: list[Row] = []
        for each in self.rounds:
            summary = Summary.of(each.playouts).row()
            rss = [sum(look.values()) for at, look in self.looks if at <= each.ended]
            rows.append(
                {
                    "minute": round(each.ended / 60, 1),
                    "streams": each.streams,
                    "frames": summary["frames"],
                    "lost": each.lost,
                    "drift_ms": each.drift_ms,
                    **{name: summary[name] for name in ("chunk_p50_ms", "chunk_p95_ms", "first_frame_p95_ms")},
                    **{name: summary[name] for name in ("deadline_miss_pct", "skew_p95_ms")},
                    "rss_mb": rss[-1] / 1e6 if rss else None,
                }
            )
        return rows

    def memory(self) -> list[Row]:
        """A row a process, and one for all: after the warm-up and at the end, peaks of a quarter of the time each.

        Peaks, since memory comes and goes as bundles are forgotten and read anew.
        """
        count = len(self.looks)
        after = self.looks[int(WARM_UP * count) : int(2 * WARM_UP * count) + 1]
        last = self.looks[int((1 - WARM_UP) * count) :]
        rows: list[Row] = []
        for name in [*sorted(self.looks[-1][1]), "all"]:
            before, now = (
                float(max(sum(look.values()) if name == "all" else look.get(name, 0) for _, look in looks))
                for looks in (after, last)
            )
            row: Row = {"process": name, "after_warm_up_mb": before / 1e6, "at_the_end_mb": now / 1e6}
            rows.append({**row, "growth_pct": 100 * (now / before - 1) if before else None})
        return rows

    def problems(self) -> list[str]:
        """Each limit that does not hold, in a sentence."""
        found = [] if self.died is None else [f"The server died: {self.died}."]
        if lost := sum(each.lost for each in self.rounds):
            found.append(f"{lost} frames were lost.")
        for row in self.memory():
            growth = row["growth_pct"]
            if growth is None or float(growth) > GROWTH_PCT:
                found.append(f"The memory of {row['process']} grew by {_short(growth)} %, beyond {GROWTH_PCT:g} %.")
        summary = Summary.of([playout for each in self.rounds for playout in each.playouts])
        found += [f"{sentence}." for sentence in summary.broken()]
        drift = max((each.drift_ms for each in self.rounds), key=abs)
        if not abs(drift) <= DRIFT_MS:
            found.append(f"In some round frames drifted by {drift:.0f} ms from their audio, beyond {DRIFT_MS:g}.")
        return found

    def plot(self, path: Path) -> None:
        """Memory by process, and the frames' delay, over time."""
        figure = Figure(figsize=(9, 8), layout="constrained")
        FigureCanvasAgg(figure)
        upper, lower = figure.subplots(2, 1, sharex=True)
        upper.set_prop_cycle(color=matplotlib.colormaps["tab20"](range(20)))  # a dozen processes
        minutes = [at / 60 for at, _ in self.looks]
        for name in sorted(self.looks[-1][1], key=lambda name: -self.looks[-1][1][name]):
            upper.plot(minutes, [look.get(name, 0) / 1e6 for _, look in self.looks], label=name)
        upper.axvline(WARM_UP * minutes[-1], color="0.8")
        upper.set(yscale="log", ylabel="memory, MB", title=f"{self.streams} streams of {self.size} x {self.size}")
        upper.legend(fontsize=7, ncols=3)
        rows = self.rows()
        for name in ("chunk_p50_ms", "chunk_p95_ms", "drift_ms"):
            lower.plot([row["minute"] for row in rows], [row[name] for row in rows], marker=".", label=name)
        lower.set(xlabel="minutes", ylabel="ms")
        lower.legend(fontsize=8)
        for axes in (upper, lower):
            axes.grid(alpha=0.3)
        with replacing(path) as unfinished:
            figure.savefig(unfinished, dpi=110)


@contextmanager
def _looking(pid: int, began: float, looks: list[tuple[float, Mapping[str, int]]]) -> Iterator[None]:
    """Meanwhile memory is noted, until the process ends."""
    over = threading.Event()

    def look() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while True:
                looks.append((time.monotonic() - began, Usage.of(pid).rss))
                if over.wait(LOOK_SECONDS):
                    return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _short(value: str | int | float | None) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
