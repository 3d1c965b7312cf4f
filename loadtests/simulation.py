"""How many replicas a number of live streams needs: simulated with SimPy from measured service times.

What is simulated: streams of 25 frames a second as `loadtests.streams.schedule` plans them for a real run; the edge,
which sends each chunk to the replica with the fewest requests under way (nginx's ``least_conn``, counted by one edge);
and replicas. A replica has two stations, as the ensemble has:

*nets*, a chain of processes for the steps before the rasterizer, taken as one thread that serves chunk after chunk.
Triton would batch what waits, but what was measured of that is small (1.0 to 1.2 chunks a batch up to saturation: the
rasterizer is what they wait for). So a batch saves nothing here.

*rasterizer*, as many threads as the replica has cores; they draw the chunk that was due first, one frame each.

Cores are shared: every thread that has work gets the same part, and none more than one core, which is what the kernel's
scheduler does. Service times vary by a gamma distribution. A replica that is lost takes nothing along: its chunks begin
anew elsewhere, as the edge would have it.

What is not: pauses of virtual machines, the network between machines, several edges that do not know of each other's
requests, garbage in caches, preloads. Take the number as the least that is needed, and ``n + 1`` for a loss.

    python -m loadtests.simulation --streams 50 100 200 500 --cores 2
    python -m loadtests.simulation --check --json bench/simulation.json

The service times are those of ``bench/profile.json`` (`loadtests.profile`, on the kind of machine that replicas are to
have). ``--check`` measures them anew on two real replicas behind the real edge, each on a processor of its own, and
compares what is predicted with what these two then do.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import itertools
import json
import math
import os
import random
import sys
import tempfile
import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import simpy

from loadtests import streams as viewers
from loadtests.cast import cast
from loadtests.slo import Float64, Playout, Slo, Summary, due
from loadtests.streams import Load, Triton, schedule
from loadtests.usage import Watch
from talksplat import clock, edge, tenants
from talksplat.bench._report import Row, report
from talksplat.server import ROOT, Ports, Server

Routing: TypeAlias = Literal["least_conn", "round_robin"]

PROFILE = ROOT / "bench" / "profile.json"
NETS = ("tritonserver", "audio_encoder", "vad", "avatar", "deformation")  # whose work comes before the rasterizer's
SECONDS = 30.0  # simulated, after the warm-up
CHECKED = (2, 4, 6, 8, 9, 10, 11, 12, 14)  # streams of the real run
CHECK_SECONDS = 10.0
CALIBRATION_STREAMS = 8
REST_SECONDS = 6.0  # after failures: for 3 s the edge leaves out a replica that took 2 s for a chunk


class NoPlanError(Exception):
    """There are no measured service times, or no number of replicas will do; the message says what to do, or why."""


@dataclass(frozen=True)
class Service:
    """What a chunk takes of a replica."""

    nets_ms: float  # of one core
    raster_ms: float  # of all cores together
    overhead_ms: float = 0.0  # that a chunk spends on its way while nothing works on it
    variation: float = 0.0  # standard deviation to mean, of both service times

    def __post_init__(self) -> None:
        if min(self.nets_ms, self.raster_ms, self.overhead_ms, self.variation) < 0 or not self.work_ms > 0:
            raise ValueError(f"{self}: expected times of 0 or more, and some work.")

    @property
    def work_ms(self) -> float:
        """Of processors, for a chunk."""
        return self.nets_ms + self.raster_ms

    def utilisation(self, streams: int, replicas: int, cores: int) -> float:
        """What these streams use of all cores."""
        return streams * clock.FPS / clock.CHUNK_FRAMES * self.work_ms / 1e3 / (replicas * cores)

    @classmethod
    def of_profile(cls, path: Path) -> Self:
        """From what `loadtests.profile` measured: flat out, where caches are hot and processors shared.

        Raises:
            NoPlanError: there is no such file, or it is another one.
        """
        try:
            rows = json.loads(path.read_text())["rows"]
            busy = {row["part"]: row for row in rows if row["view"] == "process" and row["load"] == "flat_out 8"}
            alone = {row["part"]: row for row in rows if row["view"] == "process" and row["load"] == "paced 1"}
            nets = sum(busy[part]["cpu_ms"] for part in NETS)
            ways = sum(alone[part][way] for part in NETS[1:] for way in ("queue_ms", "input_ms", "output_ms"))
            return cls(clock.CHUNK_FRAMES * nets, clock.CHUNK_FRAMES * busy["rasterizer"]["cpu_ms"], ways, VARIATION)
        except FileNotFoundError as error:
            raise NoPlanError(
                f"There is no {path}: measure with `python -m loadtests.profile --json {path}`."
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise NoPlanError(f"{path} was not written by `python -m loadtests.profile`: {error!r}.") from error


VARIATION = 0.25  # of service times where they were not measured one by one


@dataclass(eq=False)
class _Chunk:
    number: int
    due: float
    nets: float  # seconds of work left
    raster: float
    replica: _Replica | None = None


class _Replica:
    """Two stations on shared cores."""

    def __init__(self, env: simpy.Environment, cores: int, deadline: float, done: Any) -> None:
        self.env = env
        self.cores = cores
        self.deadline = deadline
        self.done = done  # called with a chunk and whether it was drawn
        self.under_way = 0
        self.lost = False
        self.worked = 0.0  # seconds of cores
        self._queue: deque[_Chunk] = deque()  # before the nets
        self._waiting: list[tuple[float, int, _Chunk]] = []  # before the rasterizer
        self._nets: _Chunk | None = None
        self._raster: _Chunk | None = None
        self._since = 0.0
        self._timer = 0

    def add(self, chunk: _Chunk) -> None:
        chunk.replica = self
        self.under_way += 1
        self._advance()
        self._queue.append(chunk)
        self._begin()

    def lose(self) -> list[_Chunk]:
        """End; what it had under way."""
        self._advance()
        left = [*self._queue, *(each for _, _, each in self._waiting)]
        left += [each for each in (self._nets, self._raster) if each is not None]
        self.lost, self.under_way = True, 0
        self._queue.clear()
        self._waiting.clear()
        self._nets = self._raster = None
        self._timer += 1
        return left

    def _speeds(self) -> tuple[float, float]:
        """Of nets and rasterizer, in cores: each thread that has work gets the same."""
        drawing = min(self.cores, clock.CHUNK_FRAMES) if self._raster else 0
        threads = drawing + bool(self._nets)
        share = min(1.0, self.cores / threads) if threads else 0.0
        return share * bool(self._nets), share * drawing

    def _advance(self) -> None:
        """Account for the work that was done since the last look."""
        seconds, self._since = self.env.now - self._since, self.env.now
        nets, raster = self._speeds()
        if self._nets:
            self._nets.nets -= nets * seconds
        if self._raster:
            self._raster.raster -= raster * seconds
        self.worked += (nets + raster) * seconds

    def _begin(self) -> None:
        """Take up what can be, and wait for what is done first."""
        if self._nets is None and self._queue:
            self._nets = self._queue.popleft()
        while self._raster is None and self._waiting:
            _, _, chunk = heapq.heappop(self._waiting)
            if self.env.now - chunk.due > self.deadline:
                self._end(chunk, drawn=False)
            else:
                self._raster = chunk
        self._timer += 1
        nets, raster = self._speeds()
        ends = []
        if self._nets:
            ends.append(self._nets.nets / nets)
        if self._raster:
            ends.append(self._raster.raster / raster)
        if ends:
            timer = self._timer
            self.env.timeout(max(0.0, min(ends))).callbacks.append(lambda _: self._look(timer))

    def _look(self, timer: int) -> None:
        if timer != self._timer:
            return  # something has come meanwhile
        self._advance()
        if (chunk := self._nets) is not None and chunk.nets <= _NOTHING:
            self._nets = None
            heapq.heappush(self._waiting, (chunk.due, chunk.number, chunk))
        if (chunk := self._raster) is not None and chunk.raster <= _NOTHING:
            self._raster = None
            self._end(chunk, drawn=True)
        self._begin()

    def _end(self, chunk: _Chunk, *, drawn: bool) -> None:
        self.under_way -= 1
        self.done(chunk, drawn)


_NOTHING = 1e-12  # seconds of work: rounding


@dataclass(frozen=True, eq=False)
class Outcome:
    """Of each chunk, and of the replicas."""

    answered: Float64  # [chunks] seconds; inf for a dropped one
    answers: list[int]  # [chunks] how often each was answered or dropped
    worked: float  # seconds of all cores


@dataclass(frozen=True)
class Replicas:
    """What is simulated, beside the load."""

    service: Service
    count: int
    cores: int = 2  # of each
    routing: Routing = "least_conn"
    deadline: float = math.inf  # seconds, after which a chunk is not begun to be drawn
    lost_at: float = math.inf  # seconds, when one replica is lost for good
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.count, self.cores) < 1 or (self.count < 2 and self.lost_at < math.inf):
            raise ValueError("Expected a replica and a core or more, and one replica more than are lost.")

    def run(self, dues: Sequence[float] | Float64) -> Outcome:
        """When chunks are answered that are asked for at these times."""
        env = simpy.Environment()
        draw = random.Random(self.seed)
        answered = np.full(len(dues), math.inf)
        answers = [0] * len(dues)

        def done(chunk: _Chunk, drawn: bool) -> None:
            answers[chunk.number] += 1
            if drawn:
                answered[chunk.number] = env.now + self.service.overhead_ms / 1e3

        replicas = [_Replica(env, self.cores, self.deadline, done) for _ in range(self.count)]
        turns = itertools.cycle(range(self.count))

        def send(chunk: _Chunk) -> None:
            turn = next(turns)
            alive = [each for each in replicas[turn:] + replicas[:turn] if not each.lost]
            chosen = min(alive, key=lambda each: each.under_way) if self.routing == "least_conn" else alive[0]
            factor = self._factor(draw)
            chunk.nets = factor * self.service.nets_ms / 1e3
            chunk.raster = factor * self.service.raster_ms / 1e3
            chosen.add(chunk)

        def arrive() -> Generator[simpy.Event, None, None]:
            for number in np.argsort(dues, kind="stable"):
                yield env.timeout(max(0.0, float(dues[number]) - env.now))  # rounding may leave it a hair late
                send(_Chunk(int(number), float(dues[number]), 0.0, 0.0))

        def lose() -> Generator[simpy.Event, None, None]:
            yield env.timeout(self.lost_at)
            for chunk in replicas[0].lose():
                send(chunk)

        env.process(arrive())
        if self.lost_at < math.inf:
            env.process(lose())
        env.run()
        return Outcome(answered, answers, sum(each.worked for each in replicas))

    def _factor(self, draw: random.Random) -> float:
        if not self.service.variation:
            return 1.0
        shape = self.service.variation**-2
        return draw.gammavariate(shape, 1 / shape)

    def play(self, load: Load) -> Summary:
        """What viewers of a load see."""
        streams = schedule(load)
        dues = [due(stream.start, chunk) for stream in streams for chunk in range(stream.chunks)]
        answered = iter(self.run(dues).answered.tolist())
        seen = []
        for stream in streams:
            arrivals = [each if math.isfinite(each) else None for each in itertools.islice(answered, stream.chunks)]
            if due(stream.start, 0) >= load.warm_up_seconds:
                seen.append(Playout.of(stream.start, arrivals))
        return Summary.of(seen)


def needed(replicas: Replicas, load: Load) -> tuple[Replicas, Summary]:
    """The least number that holds the SLO, from what the work alone takes upwards.

    Raises:
        NoPlanError: not even as many as there are streams do.
    """
    busy = replicas.service.utilisation(load.streams, 1, replicas.cores)
    least = max(math.ceil(busy), 1 + (replicas.lost_at < math.inf))
    for count in range(least, least + load.streams + 1):
        enough = replace(replicas, count=count)
        if (summary := enough.play(load)).ok(Slo()):
            return enough, summary
    broken = "; ".join(summary.broken(Slo()))
    raise NoPlanError(f"No number of replicas holds the SLO, since one is too slow for a stream of its own: {broken}.")


def plan(replicas: Replicas, streams: Sequence[int], seconds: float = SECONDS) -> list[Row]:
    """A row a number of streams: replicas that hold the SLO, what viewers see, and replicas to hold it through a loss.

    Args:
        replicas: their count does not matter.
        streams: live at a time.
        seconds: simulated; a replica is lost in the middle.
    """
    rows: list[Row] = []
    for count in streams:
        load = Load(count, ("any",), seconds=seconds)
        enough, summary = needed(replicas, load)
        with_loss, through = needed(replace(replicas, count=2, lost_at=load.warm_up_seconds + seconds / 2), load)
        rows.append(
            {
                "streams": count,
                "replicas": enough.count,
                "utilisation_pct": 100 * replicas.service.utilisation(count, enough.count, replicas.cores),
                **_seen(summary),
                "replicas_for_a_loss": with_loss.count,
                "first_frame_p95_ms_with_loss": through.first_frame_p95_ms,
                "deadline_miss_pct_with_loss": through.deadline_miss_pct,
            }
        )
    return rows


SEEN = ("chunk_p50_ms", "chunk_p95_ms", "first_frame_p95_ms", "deadline_miss_pct")


def _seen(summary: Summary) -> Row:
    row = summary.row()
    return {name: row[name] for name in SEEN}


@dataclass
class Pair:
    """Two real replicas behind the real edge, each on a processor of its own; a context manager.

    Raises:
        MissingNginxError: nginx or its Lua module is not installed.
        ServerError, OSError: something does not start.
    """

    avatar: Path
    size: int = Load.size  # pixels a side
    chunks: int = Load.chunks  # of a stream
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> Self:
        with self.stack:
            folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="talksplat-simulation-")))
            self.avatars = cast(self.avatar, folder / "avatars", 4)
            key, digest = tenants.key()
            file = folder / "tenants.toml"
            file.write_text(
                f'streams = 1000\n[tenants.load]\nkeys = ["{digest}"]\navatars = ["*"]\n'
                "streams = 1000\nrequests_per_second = 100000\n"
            )
            every = sorted(os.sched_getaffinity(0))
            self.ports = [Ports.free(), Ports.free()]
            self.servers = []
            for number, ports in enumerate(self.ports):
                server = Server(avatars=folder / "avatars", tenants=file, ports=ports, run_dir=folder / str(number))
                os.sched_setaffinity(0, {every[number % len(every)]})  # its processes inherit it
                try:
                    self.servers.append(self.stack.enter_context(server))
                finally:
                    os.sched_setaffinity(0, every)
            address = edge.Address(folder / "certificate.pem", folder / "key.pem", port=Ports.free().http)
            edge.make_certificate(address.certificate, address.certificate_key, address.host)
            nginx = edge.Edge(file, self.ports, address, folder / "edge")
            nginx.start()
            self.stack.callback(nginx.stop)
            self.target = Triton(address.url, key, address.certificate)
            self.generator = self.stack.enter_context(viewers.Generator())
            self.stack = self.stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def calibrate(self, seconds: float = CHECK_SECONDS) -> Service:
        """Service times where both are busy, the generator and the edge with them on the same two processors.

        All that runs there slows the replicas down, so what a chunk takes follows from chunks a second at saturation;
        the kernel's account only says how it is divided.
        """
        load = self.load(CALIBRATION_STREAMS, seconds)
        watches = [Watch(pid) for server in self.servers if (pid := server.pid) is not None]

        def look() -> None:
            for watch in watches:
                watch()

        busy = self.generator.flat_out(self.target, load, look)
        nets, raster = (
            sum(watch.cpu_seconds.get(part, 0.0) for watch in watches for part in parts)
            for parts in (NETS, ("rasterizer",))
        )
        cores = min(len(os.sched_getaffinity(0)), len(self.servers))
        work_ms = 1e3 * cores * clock.CHUNK_FRAMES / busy.frames_per_s
        alone = self.generator.paced(self.target, self.load(1, seconds))
        chunk_ms = np.concatenate([each.chunk_ms for each in alone.playouts])
        p16, p50, p84 = np.percentile(chunk_ms, (16, 50, 84))
        return Service(
            work_ms * nets / (nets + raster),
            work_ms * raster / (nets + raster),
            max(0.0, float(p50) - work_ms),
            float(p84 - p16) / 2 / work_ms,
        )

    def load(self, streams: int, seconds: float) -> Load:
        """The same for the real ones and the simulated."""
        return Load(streams, self.avatars, self.size, seconds, chunks=self.chunks)


def check(pair: Pair, streams: Sequence[int], seconds: float) -> tuple[list[Row], dict[str, list[Row]]]:
    """Two rows a number of streams, what was predicted and what two real replicas did; and what that comes to.

    Service times are measured again at the end: how far they differ is how much the machine changed meanwhile.
    """
    service = pair.calibrate(seconds)
    simulated = Replicas(service, len(pair.servers), cores=1)
    rows: list[Row] = []
    for count in streams:
        load = pair.load(count, seconds)
        real = pair.generator.paced(pair.target, load)
        for what, summary in (("predicted", simulated.play(load)), ("measured", Summary.of(real.playouts))):
            row: Row = {"streams": count, "what": what, **_seen(summary), "slo_ok": int(summary.ok())}
            if what == "predicted":
                row["utilisation_pct"] = 100 * service.utilisation(count, simulated.count, simulated.cores)
            else:
                row["failed_requests"] = sum(map(len, real.failed_ms.values()))
            rows.append(row)
        if real.failed_ms:
            time.sleep(REST_SECONDS)
    measured: list[Row] = [
        {"measured": "before", **vars(service)},
        {"measured": "after", **vars(pair.calibrate(seconds))},
    ]
    return rows, {"service": measured, "comparison": [compare(rows)]}


def compare(rows: Sequence[Row]) -> Row:
    """Of pairs of rows: the largest number of streams that held, and predicted to measured times where both held."""
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    held = [(predicted, measured) for predicted, measured in pairs if predicted["slo_ok"] and measured["slo_ok"]]
    found: Row = {
        f"largest_{row['what']}": max(
            (int(each["streams"] or 0) for each in rows[turn::2] if each["slo_ok"]), default=0
        )
        for turn, row in enumerate(rows[:2])
    }
    for name in SEEN[:2]:
        ratios = [float(predicted[name] or 0) / float(measured[name] or 1) for predicted, measured in held]
        found[f"{name.removesuffix('_ms')}_ratio"] = float(np.median(ratios)) if ratios else None
    return found


def main(argv: list[str] | None = None) -> int:
    """Plan, or check the simulation against real replicas; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.simulation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="+", default=None, metavar="N", help="live at a time")
    parser.add_argument("--cores", type=int, default=2, help="of a replica; default: %(default)s")
    parser.add_argument("--routing", choices=("least_conn", "round_robin"), default="least_conn")
    parser.add_argument("--profile", type=Path, default=PROFILE, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, help=f"default: {SECONDS:g}, or {CHECK_SECONDS:g} for each --check")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--check", action="store_true", help="against two real replicas here, in 4 minutes")
    parser.add_argument(
        "--avatar", type=Path, default=ROOT / "avatars" / "ava", help="for --check; default: %(default)s"
    )
    arguments = parser.parse_args(argv)
    if arguments.check:
        streams = arguments.streams or CHECKED
        with Pair(arguments.avatar) as pair:
            rows, further = check(pair, streams, arguments.seconds or CHECK_SECONDS)
        report("simulation", rows, arguments.json, further)
        return 0
    try:
        replicas = Replicas(Service.of_profile(arguments.profile), 1, arguments.cores, arguments.routing)
        rows = plan(replicas, arguments.streams or (50, 100, 200, 500), arguments.seconds or SECONDS)
    except NoPlanError as error:
        print(f"simulation: {error}", file=sys.stderr)
        return 1
    report("simulation", rows, arguments.json, {"service": [dict(vars(replicas.service))]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
