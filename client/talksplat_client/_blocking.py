"""The blocking client. `_asyncio` is its twin: what changes here changes there."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from . import _protocol as protocol
from ._audio import Pcm, Samples, packets
from ._clock import Clock
from ._config import DEFAULT_URL, Limits, Retry, Timeout, Tls
from ._exceptions import ChunkExpiredError, TalksplatError
from ._frame import AvatarInfo, Frame, Health, Preloaded, Utterance
from ._speaking import Recital
from ._state import Format, StreamState, new_id
from ._stream import REST_SECONDS, StreamCore, UtteranceCutter
from ._transport import Call, CallCancelledError, Replicas, Terms, Transport


class Client:
    """Talks to one talksplat server, or to several equal ones, of which it uses one until that fails.

    Safe to share between threads. Audio is given as packets of any size (or as one): NumPy arrays of float32 in
    [-1, 1], float64 or int16, [samples] or [samples, channels], or bytes of int16 mono.

    Args:
        url: ``host:port`` of a server's gRPC endpoint, or several.
        api_key: who asks, where an edge wants to know. It travels to other machines only over TLS.
        tls: how connections are encrypted; None: not at all.
        timeout: how long to wait for what.
        limits: how much may be under way at once.
        retry: pauses between attempts. Every request can be repeated: the server keeps nothing of a stream.

    Raises:
        InvalidRequestError: an address is not ``host:port``; the API key or the CA file can't be used.
    """

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
        self._transport = Transport(Replicas(url, api_key, tls, timeout, retry))
        self._timeout = timeout
        self._limits = limits
        self._clock: Clock | None = None
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._latest = new_id()  # id of the stream opened last, or first
        self._opening = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel all streams and close the connections: what else is under way, or asked then, is a TalksplatError."""
        streams = list(self._streams)
        for stream in streams:
            stream.cancel()
        self._transport.close()
        expires = time.monotonic() + REST_SECONDS
        for stream in streams:  # Python aborts if it exits while a thread resamples in C++
            stream._feeder.rest(expires - time.monotonic())

    def clock(self) -> Clock:
        """Sample rate, frame rate and windows of the server; asked for once.

        Raises:
            ServerUnavailableError: nothing answers.
            ServerError: something answers, but is no talksplat server.
        """
        if self._clock is None:
            response = self._transport.call("ModelConfig", protocol.CLOCK, Terms(self._timeout.connect, None)).result()
            self._clock = Clock.from_parameters(protocol.clock_parameters(response))
        return self._clock

    def animate(
        self,
        audio: Pcm | Iterable[Pcm],
        *,
        avatar: str,
        sample_rate: int | None = None,  # Hz; None: the server's
        seed: int = 0,
        size: int | None = None,
        format: Format = "jpeg",
        quality: int = 85,
        model: str = "animate",
        deadline: float | None = None,  # seconds
    ) -> Stream:
        """Frames that speak the audio, from its first sample to its last: ceil(seconds * fps) of them.

        A frame comes as soon as the look-ahead after its chunk is there. The audio is read in a thread of its own,
        so that a source which blocks (a microphone, a synthesiser) never holds back frames that are ready.

        Args:
            audio: see the class. Empty audio has no frames.
            avatar: id of the avatar.
            sample_rate: of the audio. Rates other than the server's need the extra ``media``.
            seed: of blinks and plates; the same seed gives the same frames.
            size: height and width in pixels, a multiple of 8 up to the avatar's own, which is the default.
            format: ``jpeg``, or ``raw`` RGB.
            quality: of JPEG, 1 to 100.
            model: of the server, that animates this avatar: `preload` says which.
            deadline: for live sound: a chunk of frames that does not come so soon is dropped, see `Stream.dropped`.
                None, for recordings: no frame is ever dropped.

        Raises:
            UnauthenticatedError, PermissionDeniedError, TlsError, OverloadedError: here and while iterating.
            InvalidRequestError, ServerUnavailableError, DeadlineExceededError, ServerError, MissingExtraError: here.
            UnknownAvatarError, InvalidAudioError, and the above: while iterating, with the state to resume from.
        """
        clock = self.clock()
        state = StreamState(avatar, clock, clock.rate(sample_rate), seed, size, format, quality, model, deadline)
        return self._open(audio, state)

    def idle(
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
    ) -> Stream:
        """Frames of an avatar at rest, without end: it breathes and blinks, as it does when `animate` is given silence.

        They come as fast as they are taken. To let the avatar speak, and rest again, without a jump, go on from state
        to state; plates, blinks and frame numbers run through, and for an edge it is one stream::

            stream = client.idle("ava", sample_rate=24_000)
            ...                                                   # frames, until there is something to say
            stream = client.resume(synthesiser, stream.state)     # it begins at the next frame
            ...                                                   # frames, until they end or somebody interrupts
            stream = client.resume(None, stream.state)

        Arguments and errors are those of `animate`.
        """
        clock = self.clock()
        state = StreamState(avatar, clock, clock.rate(sample_rate), seed, size, format, quality, model, deadline)
        return self._open(None, state)

    def resume(self, audio: Pcm | Iterable[Pcm] | None, state: StreamState) -> Stream:
        """Go on with a stream, here or on another server: the same frames come as if nothing had happened.

        The stream that the state is of is cancelled, or was; it and the resumed one are the same stream.

        Args:
            audio: what follows `StreamState.position`, at the sample rate that the stream has. None: nothing more is
                said, the avatar rests from the next frame on, see `idle`.
            state: from `Stream.state`, or from an error that ended a stream.

        Raises:
            InvalidStateError: the state belongs to a server with another clock; else as `animate`.
        """
        core = StreamCore(state, self.clock(), rests=audio is None)
        with self._opening:
            return self._start(audio, core)

    def transcribe(
        self,
        audio: Pcm | Iterable[Pcm],
        *,
        sample_rate: int | None = None,  # Hz; None: the server's
    ) -> str:
        """What is said. Audio longer than one request may hold is cut in its pauses, see `UtteranceCutter`.

        Raises:
            InvalidAudioError, ServerUnavailableError, DeadlineExceededError, ServerError, MissingExtraError.
        """
        clock = self.clock()
        texts = [
            protocol.text(
                self._infer(protocol.transcribe(piece, first, self._latest), self._timeout.utterance).result()
            )
            for first, piece in self._pieces(audio, UtteranceCutter(clock.rate(sample_rate), clock))
        ]
        return " ".join(filter(None, texts))

    def speech_to_animation(
        self,
        audio: Pcm | Iterable[Pcm],
        *,
        avatar: str,
        sample_rate: int | None = None,  # Hz; None: the server's
        seed: int = 0,
        size: int | None = None,
        format: Format = "jpeg",
        quality: int = 85,
    ) -> Iterator[Utterance]:
        """Text and frames of recorded speech: one utterance if one request can hold it.

        Longer audio is cut in its pauses, see `UtteranceCutter`; frame numbers run through. Arguments and errors are
        those of `animate`.
        """
        clock = self.clock()
        state = StreamState(avatar, clock, clock.rate(sample_rate), seed, size, format, quality, id=self._latest)
        cutter = UtteranceCutter(state.sample_rate, clock)
        return self._utterances(audio, cutter, state)

    def synthesize(self, text: str) -> Iterator[Samples]:
        """Speech of a text, piece by piece, at the server's sample rate (``clock().sample_rate``), mono in [-1, 1].

        The first piece is short, so that it comes soon; while one is played, the next is on its way. A text without a
        word has none. The same text gives the same speech.

        Raises:
            InvalidRequestError: the server's voice can't say a sentence: the message says why, and what helps.
            ServerUnavailableError, DeadlineExceededError, ServerError: while iterating, as the above.
        """
        self.clock()  # the first contact: nobody waits for a server that was never there
        recital = Recital(text)
        call = self._say(recital)
        try:
            while call is not None:
                piece, samples = protocol.speech(call.result())
                recital.came(piece, samples)
                call = self._say(recital)
                yield piece
        finally:
            if call is not None:
                call.cancel()

    def avatars(self) -> list[AvatarInfo]:
        """The server's avatars, by id."""
        return protocol.avatars(self._operation("list"))

    def preload(self, avatar: str) -> Preloaded:
        """Load an avatar, so that its first frame comes at once.

        Raises:
            UnknownAvatarError: there is none of that id.
        """
        return protocol.preloaded(self._operation("preload", avatar))

    def unload(self, avatar: str) -> None:
        """Free an avatar's memory; its next frame loads it again."""
        self._operation("unload", avatar)

    def health(self) -> list[Health]:
        """Every replica, in the order of their addresses. Never raises because of a server."""
        return [self._health(url) for url in self._transport.replicas.urls]

    def _open(self, audio: Pcm | Iterable[Pcm] | None, state: StreamState) -> Stream:
        """A new stream. It takes the place of one that has ended, so that an edge counts one and not two."""
        with self._opening:
            if any(stream._core.id == self._latest and not stream._feeder.stopped for stream in self._streams):
                self._latest = new_id()
            return self._start(audio, StreamCore(replace(state, id=self._latest), state.clock, rests=audio is None))

    def _start(self, audio: Pcm | Iterable[Pcm] | None, core: StreamCore) -> Stream:
        def send(request: protocol.Request) -> Call:
            return self._transport.call("ModelInfer", request, core.terms(self._timeout.chunk))

        stream = Stream(core, () if audio is None else packets(audio), send, self._limits.in_flight)
        self._latest = core.id
        self._streams.add(stream)
        return stream

    def _health(self, url: str) -> Health:
        try:
            request = protocol.operation("list", "", self._latest)
            response = self._transport.ask(url, "ModelInfer", request, Terms(self._timeout.connect, None))
            return protocol.health(url, response)
        except TalksplatError as error:
            return Health(url, False, str(error))

    def _operation(self, name: str, avatar: str = "") -> protocol.Response:
        self.clock()  # the first contact: nobody waits for a server that was never there
        request = protocol.operation(name, avatar, self._latest)
        return self._transport.call("ModelInfer", request, Terms(self._timeout.utterance, None)).result()

    def _utterances(
        self, audio: Pcm | Iterable[Pcm], cutter: UtteranceCutter, state: StreamState
    ) -> Iterator[Utterance]:
        for first, piece in self._pieces(audio, cutter):
            request = protocol.speech_to_animation(piece, first, state)
            response = self._infer(request, self._timeout.utterance).result()
            yield protocol.utterance(response, first, cutter.frames(piece), state)

    def _pieces(self, audio: Pcm | Iterable[Pcm], cutter: UtteranceCutter) -> Iterator[tuple[int, Samples]]:
        for packet in packets(audio):
            cutter.push(packet)
            yield from iter(cutter.next_piece, None)
        cutter.finish()
        yield from iter(cutter.next_piece, None)

    def _say(self, recital: Recital) -> Call | None:
        piece = recital.next()
        return piece and self._infer(protocol.synthesize(*piece, self._latest), self._timeout.utterance)

    def _infer(self, request: protocol.Request, timeout: float) -> Call:
        # an utterance takes the place of the latest stream, or of the one that is opened next
        return self._transport.call("ModelInfer", request, Terms(timeout, self._latest))


class Stream(Iterator[Frame]):
    """Frames in order. Close it (`cancel`, or a ``with`` block) when not all of them are wanted."""

    def __init__(
        self, core: StreamCore, audio: Iterable[Pcm], send: Callable[[protocol.Request], Call], in_flight: int
    ) -> None:
        self._core = core
        self._feeder = _Feeder(core, audio, send, in_flight)
        self._frames: deque[Frame] = deque()  # that have come and were not taken yet
        weakref.finalize(self, self._feeder.stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    @property
    def state(self) -> StreamState:
        """Where the stream is. What resumes from it must give the audio after `StreamState.position`.

        Once the stream was cancelled or has failed, an iterator that it was given can simply be given on: nothing
        more is taken from it, unless it has been blocking for longer than 0.1 s.
        """
        if self._feeder.stopped:
            self._feeder.rest(REST_SECONDS)
        return self._core.state()

    @property
    def dropped(self) -> int:
        """Frames that are missing so far, because their chunks came too late for the deadline."""
        return self._core.dropped

    @property
    def listening(self) -> float:
        """How much the face listens, 0 (not at all, the default) to 1: it looks at the viewer, nods, and blinks less.

        May be set at any time, from any thread. Chunks that are requested from then on turn to it, by 0.5 a chunk at
        most, so that nothing jumps; so does a stream that is resumed from `state`. Setting it raises
        InvalidRequestError for what is not 0 to 1.
        """
        return self._core.listening

    @listening.setter
    def listening(self, share: float) -> None:
        self._core.listen(share)

    def cancel(self) -> None:
        """End the stream now, from any thread: drop what is in flight, release whoever waits for a frame."""
        self._feeder.stop()

    def __next__(self) -> Frame:
        while not self._frames and not self._feeder.stopped:
            try:
                head = self._feeder.head()
                if head is None:
                    break
                first, call = head
                frames = self._core.frames(first, call.result())
            except CallCancelledError:
                break
            except ChunkExpiredError:
                self._core.skip(first)
                frames = []
            except Exception as error:
                self._feeder.stop()
                if isinstance(error, TalksplatError):
                    error.state = self.state
                raise
            self._feeder.take()
            self._frames.extend(frames)
        if not self._frames or self._feeder.stopped:
            self._feeder.stop()
            raise StopIteration
        frame = self._frames.popleft()
        self._core.shown(frame)
        return frame


class _Feeder:
    """Reads the audio in a thread and keeps up to ``in_flight`` requests ahead of the consumer.

    The consumer waits for the first of them; so the frames come in order whatever the order of the answers.
    """

    def __init__(
        self, core: StreamCore, audio: Iterable[Pcm], send: Callable[[protocol.Request], Call], in_flight: int
    ) -> None:
        self._core, self._audio, self._send, self._in_flight = core, audio, send, in_flight
        self._allowed = 1  # in flight: the first chunk goes alone, so that nothing delays it
        self._changed = threading.Condition()
        self._calls: deque[tuple[int, Call]] = deque()
        self._ended = False
        self._error: Exception | None = None  # of the audio; the frames before it come first
        self.stopped = False
        self._thread = threading.Thread(target=self._run, name="talksplat-audio", daemon=True)
        self._thread.start()

    def head(self) -> tuple[int, Call] | None:
        """First frame and call of the next chunk, once there is one; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._calls or self._ended or self.stopped)
            if self._calls and not self.stopped:
                return self._calls[0]
            if self._error and not self.stopped:
                raise self._error
            return None

    def take(self) -> None:
        """The head is done with: another request may be sent."""
        with self._changed:
            self._allowed = self._in_flight
            if self._calls:
                self._calls.popleft()
            self._changed.notify_all()

    def stop(self) -> None:
        """Drop what is in flight and send nothing more."""
        with self._changed:
            self.stopped = True
            calls = list(self._calls)
            self._calls.clear()
            self._changed.notify_all()
        for _, call in calls:
            call.cancel()

    def rest(self, seconds: float) -> None:
        """Wait, but not for long, until no packet is being taken any more."""
        if threading.current_thread() is not self._thread:
            self._thread.join(seconds)

    def _run(self) -> None:
        try:
            for packet in self._audio:
                self._core.push(packet)
                self._send_ready()
                if self.stopped:
                    return
            self._core.finish()
            self._send_ready()
        except Exception as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _send_ready(self) -> None:
        while (request := self._core.next_request()) is not None:
            first, message = request
            with self._changed:
                self._changed.wait_for(lambda: len(self._calls) < self._allowed or self.stopped)
                if self.stopped:
                    return
                self._calls.append((first, self._send(message)))
                self._changed.notify_all()
