"""What a stream does, without I/O: the blocking and the asyncio client drive the same objects."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import numpy as np

from . import _protocol as protocol
from ._audio import Pcm, Samples, Track, to_mono
from ._clock import Clock
from ._exceptions import InvalidStateError, ServerError
from ._frame import Frame
from ._state import StreamState
from ._transport import Terms

REST_SECONDS = 0.1  # a stream that ends waits so long for a packet that its source is about to give
MOST_TURN = 50  # percent by which listening changes within a chunk, at most
PAUSE_FRAMES = 8  # a cut goes through the middle of the quietest stretch of this length


class StreamCore:
    """Packets of audio in, requests out; answers in, frames out.

    Args:
        state: to go on from.
        clock: of the server.
        rests: there will be no audio, but silence without end.

    Raises:
        InvalidStateError: the state belongs to a server with another clock.
    """

    def __init__(self, state: StreamState, clock: Clock, *, rests: bool = False) -> None:
        if state.clock != clock:
            raise InvalidStateError(f"the stream began on a server with {state.clock}, this one has {clock}")
        self._lock = threading.Lock()  # the blocking client pushes in one thread and takes frames in another
        self._rests = rests
        state = state.cut() if rests else state
        self._initial = state
        self.id = state.id
        self._clock = clock
        self._frame = state.frame
        self._chunk = state.frame // clock.chunk_frames  # the next to be requested
        self._frames = math.inf  # of the whole stream, once that is known
        self._running = state.frame > 0
        self.dropped = 0  # frames
        self.listening = state.listening
        begun = state.frame % clock.chunk_frames > 0  # the chunk, so it has to end as it was drawn
        self._turns = {self._chunk: (state.listening_before, state.listening_after)} if begun else {}  # by chunk
        self._listened = state.listening_before  # percent, at the start of the next chunk to be requested
        self._track = Track(state.sample_rate, clock.sample_rate, clock.samples_per_frame, state.start)
        self._track.push(state.samples)

    def push(self, packet: Pcm) -> None:
        """Take the next audio.

        Raises:
            InvalidAudioError: see `to_mono`; nothing of the packet is taken.
        """
        samples = to_mono(packet)
        with self._lock:
            self._track.push(samples)

    def finish(self) -> None:
        """The audio has ended: its last frames have silence after them."""
        if self._rests:
            return
        with self._lock:
            self._track.finish()
            self._frames = math.ceil(self._track.end / self._clock.samples_per_frame)

    def listen(self, share: float) -> None:
        """Turn to listening so much, 0 to 1, with the chunks that are requested from now on.

        Raises:
            InvalidRequestError: it is not 0 to 1.
        """
        self.listening = replace(self._initial, listening=share).listening

    def next_request(self) -> tuple[int, protocol.Request] | None:
        """First frame and request of the next chunk whose window is complete."""
        with self._lock:
            first = self._chunk * self._clock.chunk_frames
            begin, end = self._clock.window(self._chunk)
            while self._rests and end > self._track.ready:
                self._track.push(np.zeros(self._initial.sample_rate // self._clock.fps, np.float32))
            if first >= self._frames or end > self._track.ready:
                return None
            turn = self._turns.setdefault(self._chunk, self._turn())
            self._listened = turn[1]
            self._chunk += 1
            window = self._track.read(begin, end)
            if not window.any():  # nothing to hear, nothing to compute
                return first, protocol.idle(first, self._initial, turn)
            return first, protocol.animate(window, first, self._initial, turn)

    def terms(
        self,
        timeout: float,  # seconds, each attempt
    ) -> Terms:
        """Under which the next request is tried."""
        return Terms(timeout, self._initial.id, self._initial.deadline, self._running)

    def frames(self, first: int, response: protocol.Response) -> list[Frame]:
        """The answer's frames that belong to this stream and were not shown yet.

        Raises:
            ServerError: the answer is malformed.
        """
        chunk = protocol.frames(response, first, self._initial)
        if len(chunk) != self._clock.chunk_frames:
            raise ServerError(f"the server answered with {len(chunk)} frames, expected {self._clock.chunk_frames}")
        self._running = True
        return [frame for frame in chunk if self._frame <= frame.index < self._frames]

    def skip(self, first: int) -> None:
        """The chunk that begins with this frame was dropped; all before it were shown."""
        with self._lock:
            end = int(min(first + self._clock.chunk_frames, self._frames))
            self.dropped += end - self._frame
            self._frame = end
            self._forget()

    def shown(self, frame: Frame) -> None:
        """The consumer has this frame: a resumed stream begins after it."""
        with self._lock:
            self._frame = frame.index + 1
            self._forget()

    def state(self) -> StreamState:
        """Where the stream is, with all audio that was taken and is still needed."""
        with self._lock:
            start, samples = self._track.tail(self._context())
            before, after = self._turns.get(self._frame // self._clock.chunk_frames, (self._listened,) * 2)
            state = replace(
                self._initial,
                listening=self.listening,
                listening_before=before,
                listening_after=after,
                frame=self._frame,
                start=start,
                samples=samples,
            )
            return state.cut() if self._rests else state

    def _turn(self) -> tuple[int, int]:
        """How much the face listens at the next chunk's start and at its end, percent."""
        step = round(100 * self.listening) - self._listened
        return self._listened, self._listened + max(-MOST_TURN, min(step, MOST_TURN))

    def _forget(self) -> None:
        """What nobody needs any more who resumes here."""
        self._track.forget(self._context())
        current = self._frame // self._clock.chunk_frames
        self._turns = {chunk: turn for chunk, turn in self._turns.items() if chunk >= current}

    def _context(self) -> int:
        return self._clock.window(self._frame // self._clock.chunk_frames)[0]


class UtteranceCutter:
    """Audio of any length in, pieces that fit one request out.

    Longer audio is cut in its pauses: in the middle of the quietest 0.32 s of the last third of what one request may
    hold, between two frames. Silence may thus be cut anywhere; speech without any pause is cut where it is softest.
    """

    def __init__(self, sample_rate: int, clock: Clock) -> None:
        self._clock = clock
        self._longest = clock.max_utterance_seconds * clock.sample_rate
        self._track = Track(sample_rate, clock.sample_rate, clock.samples_per_frame)
        self._begin = 0
        self._finished = False

    def push(self, packet: Pcm) -> None:
        """Take the next audio.

        Raises:
            InvalidAudioError: see `to_mono`.
        """
        self._track.push(to_mono(packet))

    def finish(self) -> None:
        """The audio has ended."""
        self._track.finish()
        self._finished = True

    def next_piece(self) -> tuple[int, Samples] | None:
        """First frame and samples of the next piece that is complete."""
        left = self._track.end - self._begin
        if left > self._longest and self._track.ready >= self._begin + self._longest:
            count = self._quietest(self._track.read(self._begin, self._begin + self._longest))
        elif self._finished and left:
            count = left
        else:
            return None
        first, piece = self._begin // self._clock.samples_per_frame, self._track.read(self._begin, self._begin + count)
        self._begin += count
        self._track.forget(self._begin)
        return first, piece

    def frames(self, samples: Samples) -> int:
        """How many frames a piece has."""
        return math.ceil(samples.size / self._clock.samples_per_frame)

    def _quietest(self, samples: Samples) -> int:
        frames = samples.size // self._clock.samples_per_frame
        energy = np.square(samples.reshape(frames, -1), dtype=np.float64).sum(axis=1)
        searched = energy[frames * 2 // 3 :]
        softest = int(np.convolve(searched, np.ones(PAUSE_FRAMES), "valid").argmin())
        return (frames * 2 // 3 + softest + PAUSE_FRAMES // 2) * self._clock.samples_per_frame
