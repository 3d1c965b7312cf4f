"""Streams as viewers make them: 25 frames a second in real time, from a process of its own that costs little.

A *viewer* watches one stream after the other (utterances of a conversation), each over a connection of its own, without
a gap; its stream id and its frame index go on. What is sent when is fixed in advance (`schedule`), so nothing that
goes wrong lightens the load; `loadtests.slo` says when a request is due and what counts. `paced` drives that open
loop; `flat_out` drives a closed one, in which every viewer sends its next chunk as soon as the last one is answered.
Requests are put together from ready-made bytes and answers are not decoded, beyond counting the frames in them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import math
import multiprocessing
import random
import struct
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeAlias

import grpc
import numpy as np
from tritonclient.grpc import service_pb2

from loadtests.conversation import SPEECH, speech
from loadtests.slo import CHUNK_SECONDS, FIRST_DUE_SECONDS, Float64, Playout, due
from talksplat import clock

Kind: TypeAlias = Literal["speaking", "silent", "idle", "listening"]

FLAT_OUT_WARM_UP_SECONDS = 1.0
TIMEOUT_SECONDS = 5.0  # of one request
LEAD_SECONDS = 0.5  # for the generator to make its requests in
QUIET = 0.05  # of the loudest chunk: what is below is a pause
JPEG_BEGINS = b"\xff\xd8\xff"  # nowhere else in a JPEG: there, 0 follows every 255
METHOD = "/inference.GRPCInferenceService/ModelInfer"
CHANNEL_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
]


class AskError(Exception):
    """No frames came; the message is a status by name."""


@dataclass(frozen=True)
class Ask:
    """A chunk that a viewer wants, or several in one request."""

    avatar: str
    size: int  # pixels a side
    seed: int
    frame_index: int  # of the first chunk's first frame
    audio: bytes | None  # f32 [chunks, WINDOW], None of idle and listening ones
    chunks: int = 1
    listening: int = 0  # percent


class Connection(Protocol):
    """One stream's way to the server."""

    def ask(self, ask: Ask) -> Awaitable[int]:
        """How many frames came.

        Raises:
            AskError: there is none, or it is an error.
        """
        ...


class Target(Protocol):
    """A server under load; it is sent to the generator's process."""

    def open(self, stream_id: str) -> contextlib.AbstractAsyncContextManager[Connection]:
        """A new connection; that it can't be made may turn out at the first request."""
        ...


@dataclass(frozen=True)
class Triton:
    """talksplat's own server over gRPC, directly or through the edge."""

    url: str  # host:port
    key: str | None = None  # API key
    ca: Path | None = None  # certificates to trust, PEM; with them TLS is spoken
    deadline_ms: int | None = None  # after which a chunk is not rendered any more
    model: str = "animate"
    format: Literal["jpeg", "raw"] = "jpeg"
    quality: int | None = None  # of JPEG; None: as the server has it

    @contextlib.asynccontextmanager
    async def open(self, stream_id: str) -> AsyncIterator[Connection]:
        """See `Target`."""
        async with self.channel() as channel:
            yield _GrpcConnection(self, stream_id, channel.unary_unary(METHOD), self.metadata(stream_id))

    def channel(self) -> Any:
        """A new gRPC channel of asyncio's, a context manager."""
        if self.ca is None:
            return grpc.aio.insecure_channel(self.url, CHANNEL_OPTIONS)
        trusted = grpc.ssl_channel_credentials(self.ca.read_bytes())
        return grpc.aio.secure_channel(self.url, trusted, CHANNEL_OPTIONS)

    def metadata(self, stream_id: str) -> list[tuple[str, str]]:
        """The headers of each request."""
        metadata = [("x-talksplat-stream", stream_id)]
        if self.key is not None:
            metadata.append(("authorization", f"Bearer {self.key}"))
        return metadata

    def request(self, stream_id: str, ask: Ask) -> bytes:
        """A serialised ModelInferRequest: concatenated messages are one message."""
        head = service_pb2.ModelInferRequest(
            model_name="rasterizer" if ask.audio is None else self.model, id=f"{stream_id}-{ask.frame_index}"
        )
        head.parameters["size"].int64_param = ask.size
        head.parameters["seed"].int64_param = ask.seed
        if ask.listening:
            head.parameters["listening"].int64_param = head.parameters["listening_before"].int64_param = ask.listening
        if self.deadline_ms is not None:
            head.parameters["deadline_ms"].int64_param = self.deadline_ms
        if self.format != "jpeg":
            head.parameters["format"].string_param = self.format
        if self.quality is not None:
            head.parameters["quality"].int64_param = self.quality
        avatar = ask.avatar.encode()
        indices = range(ask.frame_index, ask.frame_index + ask.chunks * clock.CHUNK_FRAMES, clock.CHUNK_FRAMES)
        head.inputs.add(name="AVATAR", datatype="BYTES", shape=[ask.chunks, 1])
        head.inputs.add(name="FRAME_INDEX", datatype="INT64", shape=[ask.chunks, 1])
        head.raw_input_contents.append(ask.chunks * (struct.pack("<I", len(avatar)) + avatar))
        head.raw_input_contents.append(struct.pack(f"<{ask.chunks}q", *indices))
        return bytes(head.SerializeToString()) + (b"" if ask.audio is None else _audio_input(ask.audio, ask.chunks))

    def frames(self, answer: bytes, ask: Ask) -> int:
        """How many there are in a serialised ModelInferResponse."""
        return len(answer) // (3 * ask.size**2) if self.format == "raw" else answer.count(JPEG_BEGINS)


@functools.lru_cache(None)
def _audio_input(audio: bytes, chunks: int) -> bytes:
    message = service_pb2.ModelInferRequest(raw_input_contents=[audio])
    message.inputs.add(name="AUDIO", datatype="FP32", shape=[chunks, clock.WINDOW])
    return bytes(message.SerializeToString())


@dataclass(frozen=True)
class _GrpcConnection:
    target: Triton
    stream_id: str
    call: Any  # a unary-unary multicallable, bytes to bytes
    metadata: Sequence[tuple[str, str]]

    async def ask(self, ask: Ask) -> int:
        request = self.target.request(self.stream_id, ask)
        try:
            answer = await self.call(request, timeout=TIMEOUT_SECONDS, metadata=self.metadata)
        except grpc.RpcError as error:
            raise AskError(error.code().name) from error
        return self.target.frames(answer, ask)


@dataclass(frozen=True)
class Load:
    """What viewers want, and for how long."""

    streams: int  # viewers at a time
    avatars: tuple[str, ...]  # mixed over them
    size: int = 512  # pixels a side
    seconds: float = 20.0  # measured, after the warm-up
    kinds: tuple[Kind, ...] = ("speaking",)  # of a viewer's streams, in turn
    chunks: int = 25  # of a stream: 4 s
    chunks_per_request: int = 1  # each waits for the voice of all of them
    seed: int = 0  # of when streams start and what they say

    def __post_init__(self) -> None:
        if (
            min(self.streams, self.chunks, self.chunks_per_request) < 1
            or not self.avatars
            or not self.kinds
            or not self.seconds > 0
        ):
            raise ValueError("A load needs streams, avatars, kinds, chunks and seconds.")

    @property
    def ramp_seconds(self) -> float:
        """Over which viewers come in."""
        return self.chunks * CHUNK_SECONDS

    @property
    def warm_up_seconds(self) -> float:
        """From when on all viewers are there."""
        return self.ramp_seconds + FIRST_DUE_SECONDS

    def stream(self, viewer: int, number: int, draw: random.Random, start: float = 0.0) -> Stream:
        """The viewer's next stream."""
        return Stream(
            viewer,
            self.kinds[(viewer + number) % len(self.kinds)],
            self.avatars[viewer % len(self.avatars)],
            start,
            first_frame_index=number * self.chunks * clock.CHUNK_FRAMES,
            offset=draw.randrange(1 << 30),
            chunks=self.chunks,
        )


@dataclass(frozen=True)
class Stream:
    """One entry of the schedule."""

    viewer: int
    kind: Kind
    avatar: str
    start: float  # seconds from the run's begin until its first sample sounds
    first_frame_index: int
    offset: int  # of its first chunk in the speech, any whole number
    chunks: int


def schedule(load: Load) -> list[Stream]:
    """All streams of a paced run, by start.

    Viewers begin at random times within the ramp. Each stream is up to one chunk late against its place in the viewer's
    row, so that phases between viewers change; the load is the same on average.
    """
    draw = random.Random(f"{load.seed} {load.streams}")
    end = load.warm_up_seconds + load.seconds
    streams = []
    for viewer in range(load.streams):
        begin = draw.uniform(0, load.ramp_seconds)
        for number in itertools.count():
            start = begin + number * load.ramp_seconds + draw.uniform(0, CHUNK_SECONDS)
            if due(start, 0) >= end:
                break
            stream = load.stream(viewer, number, draw, start)
            left = math.ceil((end - due(start, 0)) / CHUNK_SECONDS)
            streams.append(replace(stream, chunks=min(stream.chunks, left)))
    return sorted(streams, key=lambda stream: stream.start)


@dataclass(frozen=True, eq=False)
class Paced:
    """What came of an open loop. The streams counted are those that began after the warm-up."""

    playouts: list[Playout]  # without streams that were refused as a whole
    failed_ms: dict[str, list[float]]  # status -> from when each such request was due until the answer
    refused: int  # streams of whose chunks not one was admitted (RESOURCE_EXHAUSTED)
    frames_per_s: float  # that came
    seconds: float  # measured
    cpu_seconds: float  # of the generator, in that time
    lag_p99_ms: float  # from when requests were due until they were sent: the generator's own


@dataclass(frozen=True, eq=False)
class FlatOut:
    """What came of a closed loop."""

    chunk_ms: Float64  # from request to answer
    first_frame_ms: Float64  # the same of each stream's first chunk, connecting included
    frames_per_s: float
    seconds: float
    cpu_seconds: float  # of the generator


class Generator:
    """The process that makes the load; a context manager."""

    def __enter__(self) -> Self:
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self._pool.submit(_nothing).result()  # its imports are done
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def paced(self, target: Target, load: Load, watch: Callable[[], object] = lambda: None) -> Paced:
        """Run the open loop; ``watch`` is called as the measured time begins and as it ends."""
        begin = time.monotonic() + LEAD_SECONDS
        run = self._pool.submit(_paced, target, load, begin)
        _watch(run, begin + load.warm_up_seconds, load.seconds, watch)
        return run.result()

    def flat_out(self, target: Target, load: Load, watch: Callable[[], object] = lambda: None) -> FlatOut:
        """Run the closed loop, after a short warm-up."""
        begin = time.monotonic() + LEAD_SECONDS
        run = self._pool.submit(_flat_out, target, load, begin)
        _watch(run, begin + FLAT_OUT_WARM_UP_SECONDS, load.seconds, watch)
        return run.result()


def _nothing() -> None:
    pass


def _watch(run: Future[Any], begin: float, seconds: float, watch: Callable[[], object]) -> None:
    for moment in (begin, begin + seconds):
        time.sleep(max(0.0, moment - time.monotonic()))
        if run.done():
            run.result()  # it failed early
        watch()


def _paced(target: Target, load: Load, begin: float) -> Paced:
    return asyncio.run(_Run(target, load, begin).paced())


def _flat_out(target: Target, load: Load, begin: float) -> FlatOut:
    return asyncio.run(_Run(target, load, begin).flat_out())


@dataclass
class _Run:
    """One run, in the generator's process."""

    target: Target
    load: Load
    begin: float  # time.monotonic
    failed_ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    lags: list[float] = field(default_factory=list)
    in_time: int = 0  # chunks that came within the measured time
    speech: dict[tuple[int, int], bytes] = field(default_factory=dict)
    window: tuple[float, float] = (0.0, 0.0)  # the measured time

    def __post_init__(self) -> None:
        self.voice = windows()

    def _measure_after(self, seconds: float) -> None:
        self.window = self.begin + seconds, self.begin + seconds + self.load.seconds

    async def paced(self) -> Paced:
        streams = schedule(self.load)
        self._measure_after(self.load.warm_up_seconds)
        if time.monotonic() > self.begin:
            raise RuntimeError(f"{LEAD_SECONDS} s were too short to prepare the load.")
        cpu = asyncio.ensure_future(self._cpu_seconds())
        seen = await _together([self._play(stream) for stream in streams])
        counted = [
            (stream, arrivals)
            for stream, arrivals in zip(streams, seen, strict=True)
            if due(stream.start, 0) >= self.load.warm_up_seconds
        ]
        admitted = [(stream, arrivals) for stream, arrivals in counted if arrivals is not None]
        return Paced(
            playouts=[Playout.of(self.begin + stream.start, arrivals) for stream, arrivals in admitted],
            failed_ms=dict(self.failed_ms),
            refused=len(counted) - len(admitted),
            frames_per_s=clock.CHUNK_FRAMES * self.in_time / self.load.seconds,
            seconds=self.load.seconds,
            cpu_seconds=await cpu,
            lag_p99_ms=1e3 * float(np.percentile(self.lags, 99, method="higher")),
        )

    async def flat_out(self) -> FlatOut:
        self._measure_after(FLAT_OUT_WARM_UP_SECONDS)
        cpu = asyncio.ensure_future(self._cpu_seconds())
        await _until(self.begin)
        seen = await _together([self._flat_out_viewer(viewer) for viewer in range(self.load.streams)])
        chunks = [(ms, first) for viewer in seen for ms, first in viewer]
        return FlatOut(
            chunk_ms=np.array([ms for ms, _ in chunks]),
            first_frame_ms=np.array([ms for ms, first in chunks if first]),
            frames_per_s=clock.CHUNK_FRAMES * self.in_time / self.load.seconds,
            seconds=self.load.seconds,
            cpu_seconds=await cpu,
        )

    async def _play(self, stream: Stream) -> list[float | None] | None:
        """When each chunk's frames came; None if the stream was refused."""
        start = self.begin + stream.start
        await _until(due(start, 0))
        statuses: set[str | None] = set()
        async with self.target.open(_stream_id(stream.viewer)) as connection:

            async def request(numbers: range) -> list[float | None]:
                when = due(start, numbers[-1])
                self.lags.append(time.monotonic() - when)
                status = await self._ask(connection, stream, numbers)
                now = time.monotonic()
                statuses.add(status)
                if status is None:
                    return [now] * len(numbers)
                self.failed_ms[status].append(1e3 * (now - when))
                return [None] * len(numbers)

            tasks = []
            for numbers in self._requests(stream):
                await _until(due(start, numbers[-1]))
                tasks.append(asyncio.ensure_future(request(numbers)))
            arrivals = [arrival for answered in await asyncio.gather(*tasks) for arrival in answered]
        return None if statuses == {"RESOURCE_EXHAUSTED"} else arrivals

    async def _flat_out_viewer(self, viewer: int) -> list[tuple[float, bool]]:
        """Milliseconds of each chunk within the measured time, and whether it was a stream's first."""
        chunks: list[tuple[float, bool]] = []
        draw = random.Random(f"{self.load.seed} {viewer}")
        for number in itertools.count():
            stream = self.load.stream(viewer, number, draw)
            began = time.monotonic()
            async with self.target.open(_stream_id(viewer)) as connection:
                for numbers in self._requests(stream):
                    if began >= self.window[1]:
                        return chunks
                    if (status := await self._ask(connection, stream, numbers)) is not None:
                        raise RuntimeError(f"A chunk was answered with {status}.")
                    now = time.monotonic()
                    if self.window[0] <= now < self.window[1]:
                        chunks.append((1e3 * (now - began), numbers[0] == 0))
                    began = now
        raise AssertionError  # the loop above has no end of its own

    def _requests(self, stream: Stream) -> list[range]:
        """Which chunks each request of a stream carries."""
        numbers = range(stream.chunks)
        return [
            numbers[begin : begin + self.load.chunks_per_request] for begin in numbers[:: self.load.chunks_per_request]
        ]

    async def _ask(self, connection: Connection, stream: Stream, numbers: range) -> str | None:
        """Ask for chunks; None, or the status where no frames came."""
        begin, chunks = stream.offset + numbers[0], len(numbers)
        audio = {"speaking": self._speech(begin % len(self.voice), chunks), "silent": SILENCE * chunks}
        listening = 100 if stream.kind == "listening" else 0
        frame_index = stream.first_frame_index + numbers[0] * clock.CHUNK_FRAMES
        ask = Ask(stream.avatar, self.load.size, stream.viewer, frame_index, audio.get(stream.kind), chunks, listening)
        try:
            frames = await connection.ask(ask)
        except AskError as error:
            return str(error)
        if frames != chunks * clock.CHUNK_FRAMES:
            return "NO_FRAMES"
        self.in_time += chunks * (self.window[0] <= time.monotonic() < self.window[1])
        return None

    def _speech(self, begin: int, chunks: int) -> bytes:
        """So many windows; the same object each time, whose request is ready-made."""
        if (begin, chunks) not in self.speech:
            windows = [self.voice[number % len(self.voice)] for number in range(begin, begin + chunks)]
            self.speech[begin, chunks] = b"".join(windows)
        return self.speech[begin, chunks]

    async def _cpu_seconds(self) -> float:
        """Of this process in the measured time."""
        await _until(self.window[0])
        before = time.process_time()
        await _until(self.window[1])
        return time.process_time() - before


async def _together(coroutines: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """All results; the first error ends everything."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(each) for each in coroutines]
    return [task.result() for task in tasks]


async def _until(moment: float) -> None:
    await asyncio.sleep(moment - time.monotonic())  # at once if it has passed


def _stream_id(viewer: int) -> str:
    return f"viewer-{viewer}"


SILENCE = bytes(4 * clock.WINDOW)


@functools.lru_cache(None)
def windows(path: Path = SPEECH) -> tuple[bytes, ...]:
    """A recording's chunks in which somebody speaks, each in its window of f32 [WINDOW].

    Pauses are left out: whose face is at rest costs next to nothing, and a speaking stream is to be one.

    Raises:
        ValueError: the file is too short, or none that `conversation.speech` reads.
    """
    audio = speech(path)
    begins = range(0, len(audio) - clock.WINDOW + 1, clock.CHUNK_SAMPLES)
    if not begins:
        raise ValueError(f"{path} is shorter than a window of {clock.WINDOW / clock.SAMPLE_RATE} s.")
    cut = np.stack([audio[begin : begin + clock.WINDOW] for begin in begins])
    loudness = cut[:, clock.LEFT_CONTEXT : -clock.LOOK_AHEAD].std(1)  # of the chunks themselves
    return tuple(window.astype("<f4").tobytes() for window in cut[loudness >= QUIET * loudness.max()])
