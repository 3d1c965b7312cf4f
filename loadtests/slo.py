"""What a stream must be like to count as served: the limits, and what its viewer sees of a paced stream.

Time is in seconds of one monotonic clock, whichever; nothing here reads a clock or a file. The model of a stream:

*Source.* A live voice: the first sample sounds at ``start``, and no sample exists before its time. The request for
chunk k needs the chunk and its look-ahead, so it is *due* at ``start + (k + 1) * 160 ms + 120 ms``. The load is open:
a request goes out when it is due, whatever became of those before it, and every latency counts from when it was due,
not from when it was sent, so that a generator or a server that falls behind can't hide it (coordinated omission).

*Time to first frame.* From when the first chunk's request was due until its frames were here, connecting included. A
listener of a live voice waits those 280 ms of audio longer, which no server can take from it.

*Viewer.* It starts the playout `BUFFER` after the first frame has come. From then on audio and picture have one clock
that never waits: frame i is due at ``playout + i / 25 s``. A frame that comes after its due time, or never, is a
*miss*. If the first chunks never come, the playout starts with the first one that does, and theirs are misses.

*A/V skew.* How far the picture is behind the audio: from a frame's due time until it or any later one is shown; 0 for a
frame in time. What is noticed is the worst moment, so the skew of each second is that of its worst frame. (Over single
frames a 95th percentile would say nothing, with misses at 1 % or less.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import numpy.typing as npt

from talksplat import clock

Float64 = npt.NDArray[np.float64]

CHUNK_SECONDS = clock.CHUNK_SAMPLES / clock.SAMPLE_RATE
FIRST_DUE_SECONDS = (clock.CHUNK_SAMPLES + clock.LOOK_AHEAD) / clock.SAMPLE_RATE  # after the first sample
BUFFER = 2 / clock.FPS  # seconds from the first frame to the playout
INTERRUPT_P95_MS = 300.0  # limit: from a barge-in until frames of a face at rest are here; speakers answer so soon


@dataclass(frozen=True)
class Slo:
    """The limits; each holds at equality."""

    first_frame_p95_ms: float = 500.0
    deadline_miss_pct: float = 1.0  # of all frames
    skew_p95_ms: float = 45.0  # where people begin to notice, ITU-R BT.1359


def due(start: float, chunk: int) -> float:
    """When the request for a chunk, counted from 0, can be sent at the earliest and is to be sent."""
    return start + FIRST_DUE_SECONDS + chunk * CHUNK_SECONDS


@dataclass(frozen=True, eq=False)
class Playout:
    """One stream as its viewer saw it; `inf` stands for never."""

    first_frame_ms: float  # from when the first request was due
    chunk_ms: Float64  # [chunks] from when each request was due until its frames were here
    missed: npt.NDArray[np.bool_]  # [frames] later than the playout, or never
    skew_ms: Float64  # [frames] the picture behind the audio

    @classmethod
    def of(
        cls,
        start: float,
        arrivals: Sequence[float | None],  # [chunks] when each chunk's frames were here, None for never
        buffer: float = BUFFER,
    ) -> Self:
        """The playout of a stream whose chunks came at these times; those not yet due are left out by the caller.

        Raises:
            ValueError: there is no chunk, one came before it was due, or the buffer is negative.
        """
        if not arrivals:
            raise ValueError("A playout needs one chunk or more.")
        if not buffer >= 0:
            raise ValueError(f"The buffer is {buffer} s, expected 0 or more.")
        came = np.array([math.inf if at is None else at for at in arrivals]) - start  # [chunks] s
        chunk_ms = 1e3 * (came - due(0.0, 0) - CHUNK_SECONDS * np.arange(len(came)))
        if not (chunk_ms >= -1e-3).all():  # not so for NaN either
            raise ValueError("A chunk came before its request was due.")
        frame_came = np.repeat(came, clock.CHUNK_FRAMES)  # [frames]
        index = np.arange(len(frame_came))
        first = int(np.isfinite(frame_came).argmax())  # 0 if none came
        frame_due = frame_came[first] + buffer + (index - first) / clock.FPS  # inf if none came
        shown = np.maximum(frame_came, frame_due)  # if it is not too old by then
        caught_up = np.minimum.accumulate(shown[::-1])[::-1]
        with np.errstate(invalid="ignore"):
            skew = np.where(np.isfinite(caught_up), caught_up - frame_due, math.inf)
        missed = ~np.isfinite(frame_came) | (frame_came > frame_due)
        return cls(1e3 * (came[first // clock.CHUNK_FRAMES] - due(0.0, 0)), chunk_ms, missed, 1e3 * skew)

    @property
    def second_skew_ms(self) -> Float64:
        """[seconds] of each second's worst frame; a second begun counts."""
        return np.maximum.reduceat(self.skew_ms, np.arange(0, len(self.skew_ms), clock.FPS))


@dataclass(frozen=True)
class Summary:
    """Many streams together. A percentile is a value that was measured, the next one above; `inf` stands for never."""

    streams: int
    frames: int
    first_frame_p50_ms: float
    first_frame_p95_ms: float
    first_frame_p99_ms: float
    chunk_p50_ms: float
    chunk_p95_ms: float
    chunk_p99_ms: float
    deadline_miss_pct: float  # of all frames
    skew_p95_ms: float  # over the seconds of all streams

    @classmethod
    def of(cls, playouts: Iterable[Playout]) -> Self:
        """Of all these streams.

        Raises:
            ValueError: there is none.
        """
        seen = list(playouts)
        if not seen:
            raise ValueError("There is no stream to sum up.")
        missed = np.concatenate([each.missed for each in seen])
        return cls(
            len(seen),
            len(missed),
            *percentiles(np.array([each.first_frame_ms for each in seen])),
            *percentiles(np.concatenate([each.chunk_ms for each in seen])),
            100 * float(missed.mean()),
            percentiles(np.concatenate([each.second_skew_ms for each in seen]))[1],
        )

    def broken(self, slo: Slo = Slo()) -> list[str]:
        """Each limit that does not hold, in words."""
        return [
            f"{field.name} is {value:.4g}, beyond {limit:g}"
            for field in fields(slo)
            if not (value := getattr(self, field.name)) <= (limit := getattr(slo, field.name))
        ]

    def ok(self, slo: Slo = Slo()) -> bool:
        """Whether every limit holds."""
        return not self.broken(slo)

    def row(self) -> dict[str, int | float | None]:
        """Every field, for a table or JSON; None stands for never."""
        return {name: value if math.isfinite(value) else None for name, value in vars(self).items()}


def percentiles(values: Float64 | Sequence[float]) -> tuple[float, float, float]:
    """The 50th, 95th and 99th; each is one of the values, the next one above."""
    p50, p95, p99 = np.percentile(values, (50, 95, 99), method="higher")
    return float(p50), float(p95), float(p99)
