"""A face that is always there: what the adapters for LiveKit, Pipecat and WebRTC share.

Whoever drives it says sound whenever there is some, and takes frames as time passes, each with the sound that belongs
to it. Before, after, and where sound fails to come, the avatar is at rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt

from ._asyncio import AsyncClient, AsyncStream
from ._audio import RUN_IN, Pcm, Samples, Track, to_mono
from ._clock import Clock
from ._exceptions import InvalidRequestError, TalksplatError
from ._frame import Frame
from ._state import Format

Mark = TypeVar("Mark")

LATE_FRAMES = 0.5  # a frame that comes so much after it was due is late, and moves those that follow
BLOCK_SECONDS = 0.02  # of sound, resampled at a time
PACKET_SECONDS = 0.2  # of sound, given to the client at a time, however much there is
FULL_SCALE = 1 << 15  # of int16


@dataclass(frozen=True)
class Moment:
    """A frame and its sound."""

    frame: Frame
    sound: npt.NDArray[np.int16] | None  # [T] mono, as long as the frame is shown; None at rest
    due: float  # when to show it, on the event loop's clock


class LiveStream(Generic[Mark]):
    """Moments without end, for one consumer; from `open`.

    A frame at rest comes when it is due, one of speech up to ``lead`` seconds before, so that the consumer can buffer
    sound. One that is late moves all that follow, so that no sound is skipped. Speech begins as soon as its first chunk
    can be drawn. It ends when `finish` was called, or when the next frame needs more sound and none has come for the
    time of a chunk.

    Attributes:
        fps: frames a second.
        size: height and width of a frame in pixels.
        sample_rate: of the sound that comes out, Hz.
    """

    def __init__(
        self,
        client: AsyncClient,
        clock: Clock,
        look: dict[str, Any],  # arguments of `AsyncClient.idle`
        *,
        size: int,
        sample_rate: int,
        lead: float,
    ) -> None:
        self.fps, self.size, self.sample_rate = clock.fps, size, sample_rate
        self._client, self._clock, self._look, self._lead = client, clock, look, lead
        self._stream: AsyncStream | None = None
        self._listening = 0.0
        self._utterances: deque[_Utterance[Mark]] = deque()  # to be said; the first may be under way
        self._news = asyncio.Event()
        self._due = 0.0  # when the next frame is, on the event loop's clock
        self._number = 0  # of the next frame
        self._closed = False
        self._error: TalksplatError | None = None
        self._patience = clock.chunk / clock.sample_rate  # seconds to wait for more sound

    @classmethod
    async def open(
        cls,
        client: AsyncClient,
        avatar: str,
        *,
        sample_rate: int,  # of the sound that comes out, Hz
        lead: float,  # seconds
        size: int | None = None,  # height and width of a frame in pixels; None: the avatar's own
        format: Format,
    ) -> Self:
        """Load the avatar.

        Raises:
            UnknownAvatarError, and the other errors of `AsyncClient.preload`.
        """
        clock = await client.clock()
        loaded = await client.preload(avatar)
        look = {"avatar": avatar, "model": loaded.model, "size": size, "format": format, "sample_rate": sample_rate}
        return cls(client, clock, look, size=size or loaded.height, sample_rate=sample_rate, lead=lead)

    @property
    def listening(self) -> float:
        """See `Stream.listening`."""
        return self._listening

    @listening.setter
    def listening(self, share: float) -> None:
        if not 0 <= share <= 1:
            raise InvalidRequestError(f"listening is {share!r}, expected 0 to 1")
        self._listening = share
        if self._stream is not None:
            self._stream.listening = share

    def say(
        self,
        sound: Pcm,
        sample_rate: int,  # Hz
    ) -> None:
        """Say this, after what was said before.

        Raises:
            InvalidAudioError, InvalidRequestError, MissingExtraError: see `AsyncClient.animate`; nothing is said.
            TalksplatError: the one that has ended the stream.
        """
        if self._error is not None:
            raise self._error
        samples = to_mono(sound)
        last = self._utterances[-1] if self._utterances else None
        if last is None or last.ended or last.sample_rate != sample_rate:
            utterance = _Utterance[Mark](sample_rate, self.sample_rate)
            self.finish()
            self._utterances.append(utterance)
        self._utterances[-1].push(samples)
        self._news.set()

    def finish(self) -> None:
        """What was said is complete: no more sound is waited for."""
        if self._utterances:
            self._utterances[-1].end()
        self._news.set()

    def mark(self, mark: Mark) -> None:
        """Have this come out between two moments, once all that was said before it is out."""
        if not self._utterances:
            self._utterances.append(_Utterance(self.sample_rate, self.sample_rate))
            self._utterances[-1].end()
        self._utterances[-1].mark(mark)
        self._news.set()

    async def interrupt(self) -> list[Mark]:
        """Stop at once: whatever was said and is not out is dropped, at the server too.

        The consumer drops what it has buffered, and gets the next frame at once.

        Returns:
            The marks that were dropped.
        """
        return [each for each in await self.cut() if not isinstance(each, np.ndarray)]

    async def cut(self) -> list[Samples | Mark]:
        """As `interrupt`.

        Returns:
            All that was dropped, in order: marks, and sound [T] at ``sample_rate``.
        """
        dropped = [each for utterance in self._utterances for each in utterance.drop()]
        speaking = self._utterances[0].stream if self._utterances else None
        self._utterances.clear()
        self._due = min(self._due, _now())
        self._news.set()
        if speaking is not None:
            await speaking.cancel()
        return dropped

    async def close(self) -> None:
        """End the stream."""
        self._closed = True
        await self.interrupt()
        if self._stream is not None:
            await self._stream.cancel()

    async def moments(self) -> AsyncGenerator[Moment | Mark, None]:
        """Moments and marks, in order, until `close`; to be called once.

        Raises:
            TalksplatError: see `AsyncClient.idle`; `say` raises it from then on.
        """
        try:
            self._stream = await self._client.idle(**self._look)
            self._stream.listening = self._listening
            self._due = _now()
            while not self._closed:
                if await self._wait(self._due, lambda: self._closed or self._ready()):
                    async for each in self._speak(self._stream):
                        yield each
                elif (frame := await anext(self._stream, None)) is not None:
                    yield self._moment(frame, None, False)
                else:  # somebody has closed the client, and hears so from the next stream
                    await self._switch(self._stream, None)
        except TalksplatError as error:
            self._error = error
            raise
        finally:
            if self._stream is not None:
                await self._stream.cancel()

    async def _speak(self, at_rest: AsyncStream) -> AsyncGenerator[Moment | Mark, None]:
        """The first utterance, if there is one, until it is out or dropped."""
        if not self._utterances:
            return
        utterance = self._utterances[0]
        if utterance.seconds:
            stream = utterance.stream = await self._switch(at_rest, utterance.packets(self._patience))
            start, begins = self._number, True
            while True:
                first, last = (self._samples(start, number) for number in (self._number, self._number + 1))
                for mark in utterance.passed(first):
                    yield mark
                utterance.wanted = True
                frame = await anext(stream, None)
                utterance.wanted = False
                if frame is None:
                    break
                await self._wait(self._due - (0.0 if begins else self._lead), lambda: utterance.dropped)
                if utterance.dropped:
                    break
                yield self._moment(frame, utterance.sound(first, last), begins)
                begins = False
            await self._switch(stream, None)  # before the next frame is due
            await self._wait(self._due, lambda: utterance.dropped)
        for mark in utterance.passed(math.inf):
            yield mark
        if not utterance.dropped:
            self._utterances.popleft()

    async def _switch(self, stream: AsyncStream, sound: AsyncIterator[Samples] | None) -> AsyncStream:
        """Go on from where the stream is with other sound, or at rest."""
        await stream.cancel()
        state = stream.state
        self._number = state.frame  # one that an interruption has dropped counts
        self._stream = await self._client.resume(sound, state)
        return self._stream

    def _ready(self) -> bool:
        """Whether to begin with the first utterance: its first chunk has all the sound it needs, or no more comes."""
        if not self._utterances:
            return False
        utterance = self._utterances[0]
        if utterance.stale > self._patience:
            utterance.end()
        window = self._clock.window(self._number // self._clock.chunk_frames)[1] / self._clock.sample_rate
        return utterance.ended or utterance.seconds >= window - self._number / self.fps + RUN_IN

    def _samples(self, start: int, number: int) -> int:
        """How many there are from one frame to another."""
        return math.ceil(number * self.sample_rate / self.fps) - math.ceil(start * self.sample_rate / self.fps)

    def _moment(self, frame: Frame, sound: Samples | None, begins: bool) -> Moment:
        self._number = frame.index + 1
        now, due = _now(), self._due
        if begins or now > due + LATE_FRAMES / self.fps:
            due = max(now, due)
        self._due = due + 1 / self.fps
        return Moment(frame, None if sound is None else _int16(sound), due)

    async def _wait(
        self,
        until: float,  # on the event loop's clock
        done: Callable[[], bool],
    ) -> bool:
        """Whether it was done before that time."""
        while not done():
            if (left := until - _now()) <= 0:
                return False
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._news.wait()
        return True


class _Utterance(Generic[Mark]):
    """Sound that is said without a pause, and what comes out between."""

    def __init__(
        self,
        sample_rate: int,  # of what is pushed, Hz
        target_rate: int,  # of what comes out, Hz
    ) -> None:
        self.sample_rate = sample_rate
        self._rate = target_rate
        self._track = Track(sample_rate, target_rate, round(BLOCK_SECONDS * target_rate))
        self._given = 0  # samples that the client has
        self._out = 0  # samples that have come out
        self._more = asyncio.Event()
        self._marks: deque[tuple[int, Mark]] = deque()  # each with the samples before it
        self._came = _now()
        self.stream: AsyncStream | None = None  # that speaks it
        self.wanted = False  # the next frame is waited for
        self.ended = self.dropped = False

    @property
    def seconds(self) -> float:
        """How long it is, so far."""
        return self._track.end / self._rate

    @property
    def stale(self) -> float:
        """Seconds since some of it came."""
        return _now() - self._came

    def push(self, samples: Samples) -> None:
        """More of it, at `sample_rate`."""
        self._track.push(samples)
        self._came = _now()
        self._more.set()

    def end(self) -> None:
        """It is complete."""
        if not self.ended:
            self.ended = True
            self._track.finish()
            self._more.set()

    def mark(self, mark: Mark) -> None:
        """Something that comes after what was pushed."""
        self._marks.append((self._track.end, mark))

    def drop(self) -> list[Samples | Mark]:
        """It is to be heard no more; returns what has not come out, sound and marks."""
        self.dropped = True
        self.end()
        dropped: list[Samples | Mark] = []
        for place, mark in self._marks:
            dropped += [*self._rest(place), mark]
        self._marks.clear()
        return [*dropped, *self._rest(self._track.end)]

    def _rest(self, end: int) -> Iterator[Samples]:
        """What has not come out up to there, once."""
        if end > self._out:
            yield self._track.read(self._out, end)
            self._out = end

    def passed(
        self,
        position: float,  # samples
    ) -> Iterator[Mark]:
        """The marks up to there, each once."""
        while self._marks and self._marks[0][0] <= position:
            yield self._marks.popleft()[1]

    async def packets(
        self,
        patience: float,  # seconds
    ) -> AsyncIterator[Samples]:  # [T], at the target rate
        """All of it, as it comes; it is complete when none has come for so long and a frame is waited for."""
        while not self.dropped:
            most = self._given + round(PACKET_SECONDS * self._rate)
            ready = int(min(self._track.ready, self._track.end, most))
            if ready > self._given:
                packet = self._track.read(self._given, ready)
                self._given = ready
                yield packet
            elif self.ended:
                return
            else:
                self._more.clear()
                try:
                    async with asyncio.timeout(patience):
                        await self._more.wait()
                except TimeoutError:
                    if self.wanted:
                        self.end()

    def sound(self, begin: int, end: int) -> Samples:  # [end - begin]
        """These samples, silence after the end; those before can't be had again."""
        samples = self._track.read(begin, end)
        self._out = end
        self._track.forget(min(end, self._given))
        return samples


def _int16(samples: Samples) -> npt.NDArray[np.int16]:
    return np.asarray(np.clip(np.rint(samples * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1), np.int16)


def _now() -> float:
    return asyncio.get_running_loop().time()
