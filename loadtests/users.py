"""Locust users: each is one viewer of one avatar and uses the product's own client, as a caller would.

What stands in locust's table, in milliseconds:

=====================  ===============================================================================================
preload                the server's answer that the avatar is loaded; once a user
first frame            of an utterance, from when its first request was due, see `loadtests.slo`
chunk                  every later chunk of four frames, from when its request was due
idle chunk             of a face at rest, from when the viewer wanted it; the client asks ahead
barge-in to silence    from an interruption until frames of a face at rest are here
chunk, flat out        from one chunk's frames to the next one's, asked for as soon as the one before it is here
=====================  ===============================================================================================
"""

from __future__ import annotations

import itertools
import os
import random
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar

from locust import User, tag, task

import talksplat_client
from loadtests import slo
from loadtests.conversation import Samples, Voice, chunks, endless, pause_seconds, samples, speech, turn_seconds
from loadtests.faces import Faces
from loadtests.gate import TALLY, Failure, Kind, Stretch
from talksplat import clock
from talksplat.server import HOST, Ports
from talksplat_client import Frame, Limits, OverloadedError, Stream, StreamState, TalksplatError, Tls
from talksplat_client.cli import API_KEY

STRETCH_CHUNKS = 12  # after which a flat-out user reports
DEADLINE = slo.Slo().first_frame_p95_ms / 1e3  # seconds after which a viewer has no use for a chunk
RETRY_SECONDS = 1.0  # after a failure, where the server does not say when
BARGE_IN_SHARE = 0.2  # of all utterances

# Of the first chunk of a stretch, and of the others.
NAMES: dict[Kind, tuple[str, str]] = {
    "speech": ("first frame", "chunk"),
    "idle": ("idle chunk", "idle chunk"),
    "flat out": ("chunk, flat out", "chunk, flat out"),
}


def connect(host: str, ca: str | None, limits: Limits) -> talksplat_client.Client:
    """A client of ``grpc://host:port``, or ``grpcs://host:port`` with TLS; the API key is the environment's.

    Raises:
        InvalidRequestError: another scheme, or see `talksplat_client.Client`.
    """
    scheme, _, address = host.rpartition("://")
    if scheme not in ("grpc", "grpcs"):
        raise talksplat_client.InvalidRequestError(
            f"the host is {host!r}, expected grpc://host:port, or grpcs://host:port for TLS"
        )
    tls = Tls(ca) if scheme == "grpcs" else None
    return talksplat_client.Client(address, api_key=os.environ.get(API_KEY), tls=tls, limits=limits)


class AvatarUser(User):
    """A viewer with a connection and an avatar."""

    abstract = True
    host = f"grpc://{HOST}:{Ports().grpc}"
    limits: ClassVar[Limits] = Limits()
    deadline: ClassVar[float | None] = DEADLINE

    _client: talksplat_client.Client | None = None
    _stream: Stream | None = None  # that is left open between two tasks
    _resume_from: StreamState | None = None
    _position = 0  # of the stream's next frame

    _connected: ClassVar[dict[Limits, list[talksplat_client.Client]]] = {}
    _started: ClassVar[int] = 0
    _faces: ClassVar[Faces] = Faces()

    def on_start(self) -> None:
        """Connect and preload, however often it takes."""
        self.options = self.environment.parsed_options
        self.rng = random.Random()
        self._number = AvatarUser._started
        AvatarUser._started += 1
        while not self._prepare():
            pass

    def on_stop(self) -> None:
        """Leave the connection to the next user: closing it can stall those that still run."""
        self._leave_stream()
        if self._client is not None:
            self._connected.setdefault(self.limits, []).append(self._client)

    def speak(self, count: int, barge_in: int | None = None) -> float | None:
        """Say something of ``count`` chunks; somebody interrupts soon after so many. When that was."""
        begin = self.rng.randrange(len(speech()) - samples(count))
        start = time.perf_counter()
        voice = Voice(speech()[begin : begin + samples(count)], start, 2 * DEADLINE)
        interrupted = None
        with self._stretch("speech", start, barge_in or count) as stretch:
            try:
                with self._open(voice) as stream:
                    self._watch(stream, stretch, barge_in or count)
                    if barge_in:
                        time.sleep(self.rng.uniform(0, slo.CHUNK_SECONDS))  # at any moment, with a request under way
                        interrupted = time.perf_counter()
            finally:
                voice.hush()
                stretch.late = voice.late
            self._keep(stream)
        return interrupted

    def rest(self, count: int, since: float | None = None) -> None:
        """Be silent for ``count`` chunks, after an interruption at the time ``since`` if there was one."""
        start = time.perf_counter() if since is None else since
        with self._stretch("idle", start - slo.FIRST_DUE_SECONDS, count) as stretch:
            with self._open(None) as stream:
                self._watch(stream, stretch, count)
            self._keep(stream)
        if since is not None and stretch.arrivals and stretch.arrivals[0] is not None:
            silence = 1e3 * (stretch.arrivals[0] - since)
            TALLY.interrupts.append((stretch.arrivals[0], silence))
            self._fire("barge-in to silence", silence)

    def rush(self) -> None:
        """Ask for some chunks, each as soon as the one before it is here."""
        with self._stretch("flat out", time.perf_counter(), STRETCH_CHUNKS) as stretch:
            if self._stream is None:
                self._stream = self._open(endless(self.rng))
            self._watch(self._stream, stretch, STRETCH_CHUNKS)

    def _prepare(self) -> bool:
        begin = time.perf_counter()
        try:
            if self._client is None:
                pool = self._connected.get(self.limits)
                self._client = pool.pop() if pool else connect(self.host or "", self.options.ca, self.limits)
            avatars = self.options.avatars or [each.id for each in self._client.avatars()]
            if not avatars:
                raise TalksplatError("the server has no avatar")
            begin = time.perf_counter()
            preloaded = self._client.preload(avatars[self._number % len(avatars)])
        except TalksplatError as error:
            self._fail("preload", begin, error)
            return False
        self._avatar, self._model = preloaded.avatar, preloaded.model
        self._fire("preload", 1e3 * (time.perf_counter() - begin))
        return True

    def _open(self, audio: Iterable[Samples] | None) -> Stream:
        """The user's one stream, from where it was left."""
        assert self._client is not None
        if self._resume_from is not None:
            return self._client.resume(audio, self._resume_from)
        size, model, deadline = self.options.size, self._model, self.deadline
        if audio is None:
            return self._client.idle(self._avatar, size=size, model=model, deadline=deadline)
        return self._client.animate(audio, avatar=self._avatar, size=size, model=model, deadline=deadline)

    def _keep(self, stream: Stream) -> None:
        """What follows begins at the next frame, with none of the sound that ran ahead of the frames."""
        self._resume_from = stream.state.cut()
        self._position = self._resume_from.frame

    def _leave_stream(self) -> None:
        if self._stream is not None:
            self._stream.cancel()
        self._stream = self._resume_from = None
        self._position = 0

    @contextmanager
    def _stretch(self, kind: Kind, start: float, count: int) -> Iterator[Stretch]:
        """Tally what comes of ``count`` chunks; after a failure, noted here, the next stream is a new one."""
        stretch = Stretch(kind, start)
        failure: TalksplatError | None = None
        try:
            yield stretch
        except TalksplatError as error:
            failure = error
        finally:
            was_refused = isinstance(failure, OverloadedError) and not stretch.arrivals
            if not was_refused:  # who is let in has a right to frames
                stretch.close(count, time.perf_counter(), failed=failure is not None)
                TALLY.stretches.append(stretch)
        if failure is not None:
            self._leave_stream()
            self._fail(NAMES[kind][len(stretch.arrivals) > 0], start, failure)

    def _watch(self, stream: Stream, stretch: Stretch, count: int) -> None:
        """Take ``count`` chunks as they come, or at the pace at which a face at rest is looked at."""
        base = self._position
        self._position += count * clock.CHUNK_FRAMES
        while frames := list(itertools.islice(stream, 1)):
            now = time.perf_counter()
            frames += itertools.islice(stream, clock.CHUNK_FRAMES - 1)  # of the same answer
            chunk = (frames[0].index - base) // clock.CHUNK_FRAMES
            for _ in range(min(chunk, count) - len(stretch.arrivals)):
                stretch.arrivals.append(None)
                TALLY.failures["expired"] += 1
                self._fire("chunk", None, failure="expired: dropped after its deadline")
            if chunk >= count:
                return
            stretch.arrivals.append(now)
            self._fire(NAMES[stretch.kind][chunk > 0], self._latency(stretch), sum(len(each.data) for each in frames))
            self._look_at(self.rng.choice(frames))
            if chunk == count - 1:
                return
            if stretch.kind == "idle":
                self._wait(stretch)

    def _latency(self, stretch: Stretch) -> float:
        """Milliseconds that the chunk which came last took."""
        *before, last = stretch.arrivals
        assert last is not None
        if stretch.kind != "flat out":
            return 1e3 * (last - slo.due(stretch.start, len(before)))
        asked = before[-1] if before else stretch.start
        return 1e3 * (last - (asked or last))

    def _wait(self, stretch: Stretch) -> None:
        """Until the viewer wants the next chunk."""
        due = slo.due(stretch.start, len(stretch.arrivals))
        if (left := due - time.perf_counter()) > 0:
            time.sleep(left)
            stretch.late = max(stretch.late, time.perf_counter() - due)

    def _look_at(self, frame: Frame) -> None:
        TALLY.checked += 1
        if self._faces.is_foreign(self._avatar, frame.data):
            TALLY.foreign += 1
            self._fire("chunk", None, failure="another avatar's face")

    def _fail(self, name: str, start: float, error: TalksplatError) -> None:
        """Note what went wrong, and let some time pass."""
        kind: Failure = "refused" if isinstance(error, OverloadedError) else "error"
        TALLY.failures[kind] += 1
        sentence = re.sub(r"\d+(\.\d+)? (m?s)\b", r"# \2", str(error))  # so that the same failure is one line
        self._fire(name, 1e3 * (time.perf_counter() - start), failure=f"{kind}: {type(error).__name__}: {sentence}")
        time.sleep(getattr(error, "retry_after", None) or RETRY_SECONDS)

    def _fire(self, name: str, milliseconds: float | None, size: int = 0, *, failure: str | None = None) -> None:
        self.environment.events.request.fire(
            request_type="grpc",
            name=name,
            response_time=milliseconds,
            response_length=size,
            exception=failure,
            context={},
        )


class ConversationUser(AvatarUser):
    """An avatar in conversation: it speaks, is interrupted now and then, and rests while the other one speaks."""

    weight = 3

    @tag("conversation")
    @task
    def turn(self) -> None:
        """An utterance and the pause after it."""
        count = chunks(turn_seconds(self.rng))
        barge_in = self.rng.randrange(1, count) if count > 1 and self.rng.random() < BARGE_IN_SHARE else None
        self.rest(chunks(pause_seconds(self.rng)), self.speak(count, barge_in))


class SpeakerUser(AvatarUser):
    """An avatar that never stops to speak: what `loadtests.capacity` counts as a stream."""

    weight = 1

    @tag("speaker")
    @task
    def utterance(self) -> None:
        """One utterance; the next one follows at once."""
        self.speak(chunks(turn_seconds(self.rng)))


class IdleUser(AvatarUser):
    """An avatar that listens."""

    weight = 1

    @tag("idle")
    @task
    def pause(self) -> None:
        """Some seconds of rest."""
        self.rest(chunks(pause_seconds(self.rng)))


class FlatOutUser(AvatarUser):
    """One request after the other, one at a time: how much the server can do, not how it feels."""

    weight = 1
    limits = Limits(in_flight=1)
    deadline = None

    @tag("flat-out")
    @task
    def some_chunks(self) -> None:
        """The next chunks of a stream without end."""
        self.rush()
