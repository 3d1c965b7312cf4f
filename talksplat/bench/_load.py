"""Streams that ask `animate`, or its like of another profile, for chunk after chunk, in a process of their own."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton

from talksplat import clock

UTTERANCE_CHUNKS = 10  # 1.6 s; then a stream ends and a new one takes its place
WARM_UP_SECONDS = 1.5
FRESH_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


@dataclass(frozen=True)
class Timings:
    """What the streams saw; milliseconds from request to frames."""

    chunk_ms: list[float]
    first_frame_ms: list[float]  # of a new stream, connection included
    seconds: float

    @property
    def frames_per_s(self) -> float:
        """Of all streams together."""
        return clock.CHUNK_FRAMES * len(self.chunk_ms) / self.seconds


def drive(url: str, model: str, avatar: str, *, streams: int, size: int, seconds: float) -> Timings:
    """Run ``streams`` closed loops against the server at ``url``."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_drive, url, model, avatar, streams, size, seconds).result()


def _drive(url: str, model: str, avatar: str, streams: int, size: int, seconds: float) -> Timings:
    chunk_ms: list[float] = []
    first_ms: list[float] = []
    errors: list[BaseException] = []
    begin = time.perf_counter() + WARM_UP_SECONDS
    end = begin + seconds

    def loop(number: int) -> None:
        try:
            for ms, is_first in _stream(url, model, avatar, size, number, end):
                if time.perf_counter() >= begin:
                    chunk_ms.append(ms)
                    if is_first:
                        first_ms.append(ms)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=loop, args=(number,)) for number in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return Timings(chunk_ms, first_ms, seconds)


def _stream(url: str, model: str, avatar: str, size: int, number: int, end: float) -> Iterator[tuple[float, bool]]:
    """Milliseconds of each chunk, and whether it was a stream's first."""
    requests = _requests(avatar, number)
    for utterance in itertools.count():
        parameters = {"size": size, "seed": 1000 * number + utterance}
        began = time.perf_counter()
        with triton.InferenceServerClient(url, channel_args=FRESH_CONNECTION) as client:
            for chunk, inputs in enumerate(requests):
                if time.perf_counter() >= end:
                    return
                client.infer(model, inputs, parameters=parameters)
                now = time.perf_counter()
                yield 1e3 * (now - began), chunk == 0
                began = now


def _requests(avatar: str, number: int) -> list[list[triton.InferInput]]:
    """The inputs of an utterance's chunks, made beforehand: the load should cost the machine little."""
    audio = voice(number, UTTERANCE_CHUNKS)
    name = triton.InferInput("AVATAR", [1, 1], "BYTES")
    name.set_data_from_numpy(np.array([[avatar.encode()]], np.object_))
    requests = []
    for chunk in range(UTTERANCE_CHUNKS):
        window = audio[None, chunk * clock.CHUNK_SAMPLES :][:, : clock.WINDOW]
        index = np.array([[chunk * clock.CHUNK_FRAMES]], np.int64)
        requests.append(
            [
                triton.InferInput("AUDIO", window.shape, "FP32").set_data_from_numpy(window),
                name,
                triton.InferInput("FRAME_INDEX", index.shape, "INT64").set_data_from_numpy(index),
            ]
        )
    return requests


def voice(seed: int, chunks: int) -> npt.NDArray[np.float32]:
    """Something that a detector takes for speech: harmonics of a wandering pitch in syllables of 200 ms."""
    samples = (chunks - 1) * clock.CHUNK_SAMPLES + clock.WINDOW
    t = np.arange(samples) / clock.SAMPLE_RATE
    pitch = 110 + 20 * np.sin(2 * np.pi * 0.5 * t + seed)
    phase = 2 * np.pi * np.cumsum(pitch) / clock.SAMPLE_RATE
    tone = sum(np.sin(k * phase) / k for k in range(1, 25))
    syllables = 0.5 - 0.5 * np.cos(2 * np.pi * 5 * t)
    return np.asarray(0.2 * tone * syllables, np.float32)
