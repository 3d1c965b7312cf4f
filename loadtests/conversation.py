"""How people talk: for how long, what is said, and when which sample of it exists. Nothing here needs locust."""

from __future__ import annotations

import functools
import itertools
import math
import random
import threading
import time
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loadtests import slo
from talksplat import clock

Samples = npt.NDArray[np.float32]

SPEECH = Path(__file__).resolve().parent.parent / "demo" / "speech.wav"
PACKET = clock.SAMPLES_PER_FRAME  # of live sound; every request is due at the end of one


def turn_seconds(rng: random.Random) -> float:
    """How long somebody speaks: 3.5 s as often more as less, a sentence or three, 0.8 to 11 s."""
    return min(max(rng.lognormvariate(math.log(3.5), 0.6), 0.8), 11.0)


def pause_seconds(rng: random.Random) -> float:
    """How long somebody listens: 2 s as often more as less, 0.3 to 10 s."""
    return min(max(rng.lognormvariate(math.log(2.0), 0.7), 0.3), 10.0)


def chunks(seconds: float) -> int:
    """So many chunks are nearest to that."""
    return max(1, round(seconds / slo.CHUNK_SECONDS))


class Voice:
    """Speech while it is being said: no sample is given before its time. Then silence, until `hush`.

    Args:
        samples: [T] at `clock.SAMPLE_RATE`.
        start: when the first sample sounds, on `time.perf_counter`.
        patience: seconds of silence after which it ends by itself.
    """

    def __init__(self, samples: Samples, start: float, patience: float) -> None:
        self._samples = samples
        self._start = start
        self._patience = patience
        self._hushed = threading.Event()
        self.late = 0.0  # seconds that a packet was given after its time, at the worst

    def __iter__(self) -> Iterator[Samples]:
        for begin in range(0, len(self._samples), PACKET):
            said = self._start + (begin + PACKET) / clock.SAMPLE_RATE
            if self._hushed.wait(max(0.0, said - time.perf_counter())):
                return
            self.late = max(self.late, time.perf_counter() - said)
            yield self._samples[begin : begin + PACKET]
        self._hushed.wait(self._patience)  # the last chunk may have been dropped, and nothing would end the stream

    def hush(self) -> None:
        """Say no more."""
        self._hushed.set()


def samples(count: int) -> int:
    """Of so many chunks, with the look-ahead of the last."""
    return count * clock.CHUNK_SAMPLES + clock.LOOK_AHEAD


@functools.cache
def speech(path: Path = SPEECH) -> Samples:  # [T] at clock.SAMPLE_RATE
    """What is said; by default the sentences that come with the demo, 12 s.

    Raises:
        ValueError: the file is not WAV of 16 kHz, mono, 16 bit.
    """
    with wave.open(str(path)) as file:
        if (file.getframerate(), file.getnchannels(), file.getsampwidth()) != (clock.SAMPLE_RATE, 1, 2):
            raise ValueError(f"{path} is not WAV of {clock.SAMPLE_RATE} Hz, mono, 16 bit.")
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768


def endless(rng: random.Random) -> Iterator[Samples]:
    """Speech, chunk by chunk, from anywhere on."""
    for chunk in itertools.count(rng.randrange(len(speech()) // clock.CHUNK_SAMPLES)):
        yield speech().take(np.arange(clock.CHUNK_SAMPLES) + chunk * clock.CHUNK_SAMPLES, mode="wrap")
