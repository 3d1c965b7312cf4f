"""What a load test has measured, on all its machines together, and whether the SLO held.

Each process of locust that runs users keeps a `Tally` and hands over what is new with every report that locust sends to
its master anyway; without workers the only process reports to itself. The `Figures` there are exact: they hold each
chunk's time, not a histogram, so that the gate judges by the same `Playout` and `Summary` as every other load test.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from loadtests import slo
from loadtests.slo import Playout, Slo, Summary

Kind: TypeAlias = Literal["speech", "idle", "flat out"]
Failure: TypeAlias = Literal["refused", "expired", "error"]

PACED: tuple[Kind, ...] = ("speech", "idle")  # in real time, so that the SLO says something about them
REPORT_SECONDS = 3.0  # as often as locust's workers report
SATURATED_PCT = 80.0  # of one core; locust is one thread, and beyond this it measures itself
PASSED, BROKEN, WORTHLESS = 0, 1, 3  # exit codes; locust itself takes 1 for failures and 2 for errors of its own


@dataclass
class Stretch:
    """Consecutive chunks of one stream: an utterance, or a pause.

    Times are in seconds of this machine's monotonic clock.
    """

    kind: Kind
    start: float  # as in `slo.due`; of a flat-out stream: when its first request was sent
    arrivals: list[float | None] = field(default_factory=list)  # [chunks] None: never
    end: float = math.nan
    late: float = 0.0  # seconds that the generator was behind its own plan, at the worst

    def close(self, chunks: int, now: float, *, failed: bool = False) -> None:
        """End it, with those of its ``chunks`` that were due by then and have not come.

        After a failure they never come. When the stream was ended on purpose (a barge-in, the end of the test), the one
        under way counts as having come at that moment if a viewer was missing it already, and is left out if not.
        """
        self.end = now
        if self.kind == "flat out":
            return
        for chunk in range(len(self.arrivals), chunks):
            if slo.due(self.start, chunk) > now:
                break
            if failed:
                self.arrivals.append(None)
            elif self._is_missed(chunk, now):
                self.arrivals.append(now)
            else:
                break

    def _is_missed(self, chunk: int, now: float) -> bool:
        if not self.arrivals or self.arrivals[0] is None:
            return now > slo.due(self.start, chunk) + Slo().first_frame_p95_ms / 1e3
        return now > self.arrivals[0] + slo.BUFFER + chunk * slo.CHUNK_SECONDS

    def shifted(self, seconds: float) -> Stretch:
        """On a clock that shows so much more."""
        arrivals = [None if at is None else at + seconds for at in self.arrivals]
        return Stretch(self.kind, self.start + seconds, arrivals, self.end + seconds, self.late)


class Tally:
    """What one process has measured and not handed over yet."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """A test begins."""
        self.stretches: list[Stretch] = []
        self.interrupts: list[tuple[float, float]] = []  # when, and ms until resting frames were here
        self.failures: Counter[Failure] = Counter()
        self.checked = 0  # frames whose face was looked at
        self.foreign = 0  # of those, the face of another avatar
        self._since = time.perf_counter(), time.process_time()

    def drain(self) -> dict[str, Any]:
        """What is new, for `Figures.add` on whichever machine: times are relative to now."""
        now, processor = time.perf_counter(), time.process_time()
        message = {
            "stretches": [
                [each.kind, each.start, each.arrivals, each.end, each.late]
                for each in (stretch.shifted(-now) for stretch in self.stretches)
            ],
            "interrupts": [[at - now, milliseconds] for at, milliseconds in self.interrupts],
            "failures": dict(self.failures),
            "checked": self.checked,
            "foreign": self.foreign,
            "seconds": now - self._since[0],
            "processor_seconds": processor - self._since[1],
        }
        self.reset()
        return message


TALLY = Tally()  # of this process


@dataclass(frozen=True)
class Level:
    """A while in which the number of users did not change."""

    begin: float
    end: float

    def holds(self, begin: float, end: float) -> bool:
        """Whether it covers all of that time."""
        return self.begin <= begin and end <= self.end


@dataclass(frozen=True)
class Share:
    """Processor time of one generator in one report."""

    generator: str
    begin: float
    end: float
    processor_seconds: float


class Figures:
    """All that was measured so far, on one clock."""

    def __init__(self) -> None:
        self.stretches: list[Stretch] = []
        self.interrupts: list[tuple[float, float]] = []
        self.failures: Counter[Failure] = Counter()
        self.checked = 0
        self.foreign = 0
        self.shares: list[Share] = []
        self._changes: list[tuple[float, int | None]] = []  # of the number of users; None: while it changes

    def add(self, generator: str, message: dict[str, Any], now: float) -> None:
        """Take what a generator's `Tally` has handed over just now."""
        for kind, start, arrivals, end, late in message["stretches"]:
            self.stretches.append(Stretch(kind, start, arrivals, end, late).shifted(now))
        self.interrupts += [(now + age, milliseconds) for age, milliseconds in message["interrupts"]]
        self.failures.update(message["failures"])
        self.checked += message["checked"]
        self.foreign += message["foreign"]
        self.shares.append(Share(generator, now - message["seconds"], now, message["processor_seconds"]))

    def watch(self, users: int | None, now: float) -> None:
        """So many users there are from now on; None while their number changes."""
        if not self._changes or self._changes[-1][1] != users:
            self._changes.append((now, users))

    def levels(self) -> dict[int, list[Level]]:
        """When there were how many users, by their number."""
        found: defaultdict[int, list[Level]] = defaultdict(list)
        ends = [at for at, _ in self._changes[1:]]
        for (begin, users), end in zip(self._changes, [*ends, math.inf], strict=False):
            if users:
                found[users].append(Level(begin, end))
        return dict(sorted(found.items()))

    def summary(self, kind: Kind, levels: Sequence[Level] | None = None) -> Summary | None:
        """Of the paced streams of a kind, wholly inside one of ``levels`` where these are given; None without any."""
        stretches = [each for each in self._of(kind, levels) if each.arrivals]
        return Summary.of(Playout.of(each.start, each.arrivals) for each in stretches) if stretches else None

    def flat_out_ms(self, levels: Sequence[Level] | None = None) -> list[float]:
        """Milliseconds from each request to its frames, of the streams that ask for chunk after chunk."""
        return [
            1e3 * (at - before)
            for each in self._of("flat out", None)
            for before, at in zip([each.start, *each.arrivals], each.arrivals, strict=False)
            if before is not None and at is not None
            if levels is None or any(level.holds(before, at) for level in levels)
        ]

    def interrupts_ms(self, levels: Sequence[Level] | None = None) -> list[float]:
        """Milliseconds from each barge-in to the frames of a face at rest."""
        return [ms for at, ms in self.interrupts if levels is None or any(each.holds(at, at) for each in levels)]

    def chunks_per_s(self, levels: Sequence[Level]) -> float:
        """Of all streams together, while there were that many users."""
        times = sorted(at for each in self.stretches for at in each.arrivals if at is not None)
        if not times:
            return 0.0
        spans = [(level.begin, min(level.end, times[-1])) for level in levels]
        count = sum(bisect_right(times, end) - bisect_right(times, begin) for begin, end in spans)
        seconds = sum(max(0.0, end - begin) for begin, end in spans)
        return count / seconds if seconds else 0.0

    def generator_pct(self, levels: Sequence[Level] | None = None) -> float:
        """Processor time of the busiest generator, of one core."""
        used: defaultdict[str, float] = defaultdict(float)
        lasted: defaultdict[str, float] = defaultdict(float)
        for share in self.shares:
            middle = (share.begin + share.end) / 2
            if levels is None or any(each.holds(middle, middle) for each in levels):
                used[share.generator] += share.processor_seconds
                lasted[share.generator] += share.end - share.begin
        return max((100 * used[each] / lasted[each] for each in used if lasted[each]), default=0.0)

    def generator_late_ms(self, levels: Sequence[Level] | None = None) -> float:
        """How far the generator was behind its own plan in the worst moment of a stretch, 95th percentile."""
        return p95(1e3 * each.late for each in self._of(None, levels))

    def _of(self, kind: Kind | None, levels: Sequence[Level] | None) -> Iterator[Stretch]:
        for each in self.stretches:
            inside = levels is None or any(level.holds(each.start, each.end) for level in levels)
            if inside and kind in (None, each.kind):
                yield each


@dataclass(frozen=True)
class Verdict:
    """What the gate says."""

    broken: list[str]  # each limit that did not hold, in words
    doubts: list[str]  # why the figures mean nothing, whatever they are

    @property
    def exit_code(self) -> int:
        """For the process."""
        return WORTHLESS if self.doubts else BROKEN if self.broken else PASSED

    def __str__(self) -> str:
        if self.doubts:
            return "SLO: no verdict, the figures are worthless: " + "; ".join(self.doubts + self.broken) + "."
        return f"SLO broken: {'; '.join(self.broken)}." if self.broken else "SLO held."


def judge(figures: Figures, limits: Slo, interrupt_p95_ms: float, *, refusals_allowed: bool = False) -> Verdict:
    """Hold the figures against the limits."""
    summaries = [(kind, figures.summary(kind)) for kind in PACED]
    broken = [
        f"{reason} ({kind})" for kind, summary in summaries if summary is not None for reason in summary.broken(limits)
    ]
    silence = p95(figures.interrupts_ms())
    if silence > interrupt_p95_ms:
        broken.append(f"interrupt_p95_ms is {silence:.4g}, beyond {interrupt_p95_ms:g}")
    if figures.foreign:
        broken.append(f"{figures.foreign} of {figures.checked} frames looked at show another avatar")
    for failure, count in sorted(figures.failures.items()):
        if failure != "refused" or not refusals_allowed:
            broken.append(f"{count} requests failed: {failure}")
    if not any(each.arrivals for each in figures.stretches):
        broken.append("no frame came")
    shares = [(figures.generator_pct(levels), f" with {users} users") for users, levels in figures.levels().items()]
    share, when = max([(figures.generator_pct(), ""), *shares])
    saturated = f"a load generator took {share:.0f} % of a core{when}: use more workers, or another machine"
    return Verdict(broken, [saturated] if share > SATURATED_PCT else [])


def p95(values: Iterable[float]) -> float:
    """The 95th percentile, a value that was measured; 0 without any."""
    ordered = sorted(values)
    return ordered[math.ceil(0.95 * (len(ordered) - 1))] if ordered else 0.0
