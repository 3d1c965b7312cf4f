"""The asyncio client, twin of `_blocking`: what changes here changes there."""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self, TypeAlias

from . import _protocol as protocol
from ._audio import Pcm, Samples, packets
from ._clock import Clock
from ._config import DEFAULT_URL, Limits, Retry, Timeout, Tls
from ._exceptions import ChunkExpiredError, TalksplatError
from ._frame import AvatarInfo, Frame, Health, Preloaded, Utterance
from ._speaking import Recital
from ._state import Format, StreamState, new_id
from ._stream import REST_SECONDS, StreamCore, UtteranceCutter
from ._transport import AsyncCall, AsyncTransport, CallCancelledError, Replicas, Terms

Audio: TypeAlias = Pcm | Iterable[Pcm] | AsyncIterable[Pcm]


class AsyncClient:
    """Twin of `Client`, for one event loop. Audio may come from an asynchronous iterator as well."""

    def __init__(
        self,
        url: str | Sequence[str] = DEFAULT_URL,
        *,
        api_key: str | None = None,
        tls: Tls | None = None,
        timeout: Timeout = Timeout(),  # noqa: B008 (frozen)
        limits: Limits = Limits(),  # noqa: B008
        retry: Retry = Retry(),  # noqa: B008
    ) -> None:
        self._replicas = Replicas(url, api_key, tls, timeout, retry)
        self._timeout = timeout
        self._limits = limits
        self._clock: Clock | None = None
        self._streams: weakref.WeakSet[AsyncStream] = weakref.WeakSet()
        self._latest = new_id()  # id of the stream opened last, or first

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel all streams and close the connections."""
        for stream in list(self._streams):
            await stream.cancel()
        await self._transport.close()

    async def clock(self) -> Clock:
        """See `Client.clock`."""
        if self._clock is None:
            terms = Terms(self._timeout.connect, None)
            response = await self._transport.call("ModelConfig", protocol.CLOCK, terms).result()
            self._clock = Clock.from_parameters(protocol.clock_parameters(response))
        return self._clock

    async def animate(
        self,
        audio: Audio,
        *,
        avatar: str,
        sample_rate: int | None = None,  # Hz; None: the server's
        seed: int = 0,
        size: int | None = None,
        format: Format = "jpeg",
        quality: int = 85,
        model: str = "animate",
        deadline: float | None = None,  # seconds
    ) -> AsyncStream:
        """See `Client.animate`. Other than lists, blocking iterators are read in a thread."""
        clock = await self.clock()
        state = StreamState(avatar, clock, clock.rate(sample_rate), seed, size, format, quality, model, deadline)
        return self._open(audio, state)

    async def idle(
        self,
        avatar: str,
        *,
        sample_rate: int | None = None,  # Hz, of the audio that may follow; None: the server's
        seed: int = 0,
        size: int | None = None,
        format: Format = "jpeg",
        quality: int = 85,
        model: str = "animate",
        deadline: float | None = None,  # seconds
    ) -> AsyncStream:
        """See `Client.idle`."""
        clock = await self.clock()
        state = StreamState(avatar, clock, clock.rate(sample_rate), seed, size, format, quality, model, deadline)
        return self._open(None, state)

    async def resume(self, audio: Audio | None, state: StreamState) -> AsyncStream:
        """See `Client.resume`."""
        return self._start(audio, StreamCore(state, await self.clock(), rests=audio is None))

    async def transcribe(
        self,
        audio: Audio,
        *,
        sample_rate: int | None = None,  # Hz; None: the server's
    ) -> str:
        """See `Client.transcribe`."""
        clock = await self.clock()
        texts = [
            protocol.text(
                await self._infer(protocol.transcribe(piece, first, self._latest), self._timeout.utterance).result()
            )
            async for first, piece in self._pieces(audio, UtteranceCutter(clock.rate(sample_rate), clock))
        ]
        return " ".join(filter(None, texts))

    async def speech_to_animation(
        self,
        audio: Audio,
        *,
        avatar: str,
        sample_rate: int | None = None,  # Hz; None: the server's
        seed: int = 0,
        size: int | None = None,
        format: Format = "jpeg",
        quality: int = 85,
    ) -> AsyncIterator[Utterance]:
        """See `Client.speech_to_animation`."""
        clock = await self.clock()
        state = StreamState(avatar, clock, clock.rate(sample_rate), seed, size, format, quality, id=self._latest)
        cutter = UtteranceCutter(state.sample_rate, clock)
        return self._utterances(audio, cutter, state)

    async def synthesize(self, text: str) -> AsyncIterator[Samples]:
        """See `Client.synthesize`; ``async for piece in client.synthesize(text)``."""
        await self.clock()  # the first contact: nobody waits for a server that was never there
        recital = Recital(text)
        call = self._say(recital)
        try:
            while call is not None:
                piece, samples = protocol.speech(await call.result())
                recital.came(piece, samples)
                call = self._say(recital)
                yield piece
        finally:
            if call is not None:
                call.cancel()

    async def avatars(self) -> list[AvatarInfo]:
        """See `Client.avatars`."""
        return protocol.avatars(await self._operation("list"))

    async def preload(self, avatar: str) -> Preloaded:
        """See `Client.preload`."""
        return protocol.preloaded(await self._operation("preload", avatar))

    async def unload(self, avatar: str) -> None:
        """See `Client.unload`."""
        await self._operation("unload", avatar)

    async def health(self) -> list[Health]:
        """See `Client.health`."""
        return list(await asyncio.gather(*map(self._health, self._replicas.urls)))

    @functools.cached_property
    def _transport(self) -> AsyncTransport:  # not before there is an event loop
        return AsyncTransport(self._replicas)

    def _open(self, audio: Audio | None, state: StreamState) -> AsyncStream:
        """See `Client._open`."""
        if any(stream._core.id == self._latest and not stream._feeder.stopped for stream in self._streams):
            self._latest = new_id()
        return self._start(audio, StreamCore(replace(state, id=self._latest), state.clock, rests=audio is None))

    def _start(self, audio: Audio | None, core: StreamCore) -> AsyncStream:
        def send(request: protocol.Request) -> AsyncCall:
            return self._transport.call("ModelInfer", request, core.terms(self._timeout.chunk))

        stream = AsyncStream(core, _async_packets(() if audio is None else audio), send, self._limits.in_flight)
        self._latest = core.id
        self._streams.add(stream)
        return stream

    async def _health(self, url: str) -> Health:
        try:
            request = protocol.operation("list", "", self._latest)
            response = await self._transport.ask(url, "ModelInfer", request, Terms(self._timeout.connect, None))
            return protocol.health(url, response)
        except TalksplatError as error:
            return Health(url, False, str(error))

    async def _operation(self, name: str, avatar: str = "") -> protocol.Response:
        await self.clock()  # the first contact: nobody waits for a server that was never there
        request = protocol.operation(name, avatar, self._latest)
        return await self._transport.call("ModelInfer", request, Terms(self._timeout.utterance, None)).result()

    async def _utterances(self, audio: Audio, cutter: UtteranceCutter, state: StreamState) -> AsyncIterator[Utterance]:
        async for first, piece in self._pieces(audio, cutter):
            request = protocol.speech_to_animation(piece, first, state)
            response = await self._infer(request, self._timeout.utterance).result()
            yield protocol.utterance(response, first, cutter.frames(piece), state)

    async def _pieces(self, audio: Audio, cutter: UtteranceCutter) -> AsyncIterator[tuple[int, Samples]]:
        async for packet in _async_packets(audio):
            cutter.push(packet)
            for piece in iter(cutter.next_piece, None):
                yield piece
        cutter.finish()
        for piece in iter(cutter.next_piece, None):
            yield piece

    async def _detect(self, audio: Samples, end: int) -> list[float]:
        """For each of a window's last frames, as many as a chunk has, the probability of speech."""
        request = protocol.detect(audio, end, self._latest)
        return protocol.probabilities(await self._infer(request, self._timeout.chunk).result())

    def _say(self, recital: Recital) -> AsyncCall | None:
        piece = recital.next()
        return piece and self._infer(protocol.synthesize(*piece, self._latest), self._timeout.utterance)

    def _infer(self, request: protocol.Request, timeout: float) -> AsyncCall:
        return self._transport.call("ModelInfer", request, Terms(timeout, self._latest))


class AsyncStream(AsyncIterator[Frame]):
    """Twin of `Stream`."""

    def __init__(
        self,
        core: StreamCore,
        audio: AsyncIterable[Pcm],
        send: Callable[[protocol.Request], AsyncCall],
        in_flight: int,
    ) -> None:
        self._core = core
        self._feeder = _AsyncFeeder(core, audio, send, in_flight)
        self._frames: deque[Frame] = deque()  # that have come and were not taken yet
        weakref.finalize(self, self._feeder.stop).atexit = False  # the event loop is gone by then

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.cancel()

    @property
    def state(self) -> StreamState:
        """See `Stream.state`."""
        return self._core.state()

    @property
    def dropped(self) -> int:
        """See `Stream.dropped`."""
        return self._core.dropped

    @property
    def listening(self) -> float:
        """See `Stream.listening`."""
        return self._core.listening

    @listening.setter
    def listening(self, share: float) -> None:
        self._core.listen(share)

    async def cancel(self) -> None:
        """See `Stream.cancel`. Waits up to 0.1 s for a packet that is just being taken."""
        self._feeder.stop()
        await self._feeder.rest()

    async def __anext__(self) -> Frame:
        while not self._frames and not self._feeder.stopped:
            try:
                head = await self._feeder.head()
                if head is None:
                    break
                first, call = head
                frames = self._core.frames(first, await call.result())
            except CallCancelledError:
                break
            except ChunkExpiredError:
                self._core.skip(first)
                frames = []
            except Exception as error:
                await self.cancel()
                if isinstance(error, TalksplatError):
                    error.state = self.state
                raise
            self._feeder.take()
            self._frames.extend(frames)
        if not self._frames or self._feeder.stopped:
            self._feeder.stop()
            raise StopAsyncIteration
        frame = self._frames.popleft()
        self._core.shown(frame)
        return frame


class _AsyncFeeder:
    """Twin of `_Feeder`, with a task for its thread."""

    def __init__(
        self,
        core: StreamCore,
        audio: AsyncIterable[Pcm],
        send: Callable[[protocol.Request], AsyncCall],
        in_flight: int,
    ) -> None:
        self._core, self._audio, self._send, self._in_flight = core, audio, send, in_flight
        self._allowed = 1  # in flight: the first chunk goes alone, so that nothing delays it
        self._changed = asyncio.Event()
        self._calls: deque[tuple[int, AsyncCall]] = deque()
        self._ended = False
        self._error: Exception | None = None  # of the audio; the frames before it come first
        self.stopped = False
        self._task = asyncio.create_task(self._run(), name="talksplat-audio")

    async def head(self) -> tuple[int, AsyncCall] | None:
        """First frame and call of the next chunk, once there is one; None at the end."""
        await self._wait_for(lambda: bool(self._calls) or self._ended or self.stopped)
        if self._calls and not self.stopped:
            return self._calls[0]
        if self._error and not self.stopped:
            raise self._error
        return None

    def take(self) -> None:
        """The head is done with: another request may be sent."""
        self._allowed = self._in_flight
        if self._calls:
            self._calls.popleft()
        self._changed.set()

    def stop(self) -> None:
        """Drop what is in flight and send nothing more."""
        self.stopped = True
        for _, call in self._calls:
            call.cancel()
        self._calls.clear()
        self._changed.set()

    async def rest(self) -> None:
        """Wait, but not for long, until no packet is being taken any more."""
        await asyncio.wait([self._task], timeout=REST_SECONDS)
        self._task.cancel()

    async def _wait_for(self, predicate: Callable[[], bool]) -> None:
        while not predicate():
            self._changed.clear()
            await self._changed.wait()

    async def _run(self) -> None:
        try:
            async for packet in self._audio:
                self._core.push(packet)
                await self._send_ready()
                if self.stopped:
                    return
            self._core.finish()
            await self._send_ready()
        except Exception as error:
            self._error = error
        finally:
            self._ended = True
            self._changed.set()

    async def _send_ready(self) -> None:
        while (request := self._core.next_request()) is not None:
            first, message = request
            await self._wait_for(lambda: len(self._calls) < self._allowed or self.stopped)
            if self.stopped:
                return
            self._calls.append((first, self._send(message)))
            self._changed.set()


async def _async_packets(audio: Audio) -> AsyncIterator[Pcm]:
    if isinstance(audio, AsyncIterable):
        async for packet in audio:
            yield packet
        return
    given = packets(audio)
    if isinstance(given, Sequence):
        for packet in given:
            yield packet
        return
    iterator = iter(given)
    while (taken := await asyncio.to_thread(next, iterator, None)) is not None:
        yield taken
