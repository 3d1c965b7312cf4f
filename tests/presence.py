"""What the tests of the adapters share: real speech to say, ways to wait, and ears and eyes for what comes out."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import soxr

from talksplat_client import read_audio

SPEECH = Path(__file__).resolve().parents[1] / "demo" / "speech.wav"
Sound = np.ndarray[Any, np.dtype[np.int16]]
Times = np.ndarray[Any, np.dtype[np.float64]]


def speech(seconds: float, rate: int) -> Sound:
    """The demo's, from its first word on."""
    recording = read_audio(SPEECH)
    resampled = soxr.resample(np.concatenate(list(recording.packets)), recording.sample_rate, rate)
    begin = int(np.flatnonzero(np.abs(resampled) > 0.05)[0])
    return np.asarray(32767 * np.clip(resampled[begin : begin + round(seconds * rate)], -1, 1), np.int16)


def flashes(count: int, rate: int) -> Sound:
    """Sound that jumps between two levels, 0.2 s each."""
    return np.repeat(np.tile([16_000, -16_000], count // 2), rate // 5).astype(np.int16)


def skews(
    heard: Sequence[tuple[float, Sound]],  # when, and what
    seen: Sequence[tuple[float, float]],  # when, and how bright
) -> Times:
    """How far each jump of the picture was from the sound's, in seconds; what was said were `flashes`."""
    sounds = _jumps([(when, float(np.median(sound))) for when, sound in heard], 20_000)
    pictures = _jumps(seen, 60)
    return np.asarray(np.abs(pictures[:, None] - sounds).min(axis=1), np.float64)


def _jumps(levels: Sequence[tuple[float, float]], least: float) -> Times:
    return np.array([time for (_, before), (time, level) in itertools.pairwise(levels) if abs(level - before) > least])


def loud(sounds: Sequence[tuple[float, Sound]]) -> list[float]:
    """When there was something to hear."""
    return [when for when, sound in sounds if np.abs(sound).max() > 300]


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)


@asynccontextmanager
async def no_leaks() -> AsyncIterator[None]:
    """Nothing goes on that did not before, but for threads of the event loop's own pool."""
    threads, tasks = set(threading.enumerate()), asyncio.all_tasks()
    yield
    await asyncio.sleep(0.01)
    assert asyncio.all_tasks() <= tasks
    left = [thread.name for thread in threading.enumerate() if thread not in threads and not thread.daemon]
    assert all(name.startswith(("asyncio", "ThreadPoolExecutor")) for name in left)
