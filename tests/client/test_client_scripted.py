"""Both clients against a scripted stand-in for the server, over real gRPC: order, faults, cancelling, errors."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from scripted_server import CLOCK, Script, ScriptedServer

from talksplat_client import (
    AsyncClient,
    AvatarInfo,
    Client,
    DeadlineExceededError,
    Frame,
    InvalidAudioError,
    InvalidRequestError,
    Limits,
    OverloadedError,
    PermissionDeniedError,
    Preloaded,
    Retry,
    ServerError,
    ServerUnavailableError,
    StreamState,
    TalksplatError,
    Timeout,
    UnauthenticatedError,
    UnknownAvatarError,
    Utterance,
)
from talksplat_client._audio import Samples

IMPATIENT = Timeout(connect=1, chunk=0.5, recovery=0.3)
QUICK = Retry(first=0.01, longest=0.05)


def noise(seconds: float, seed: int = 0) -> Samples:
    return np.random.default_rng(seed).uniform(-0.9, 0.9, round(seconds * 16_000)).astype(np.float32)


class Outcome:
    """Frames that came, what ended them, and the state after them."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.error: BaseException | None = None
        self.state: StreamState | None = None
        self.dropped = 0


class Blocking:
    """Does with `Client` what `Asynchronous` does with `AsyncClient`."""

    def play(self, url: Any, audio: Any, *, take: int = 10**9, state: Any = None, **options: Any) -> Outcome:
        outcome = Outcome()
        settings = {key: options.pop(key) for key in ("timeout", "limits", "retry") if key in options}
        with Client(url, **settings) as client:
            try:
                stream = client.resume(audio, state) if state else client.animate(audio, avatar="ava", **options)
                with stream:
                    while len(outcome.frames) < take and (frame := next(stream, None)):
                        outcome.frames.append(frame)
                        outcome.dropped = stream.dropped
                outcome.dropped = stream.dropped
                outcome.state = stream.state
            except Exception as error:
                outcome.error = error
                outcome.state = getattr(error, "state", None)
        return outcome

    def ask(self, url: Any, method: str, *args: Any, timeout: Timeout = IMPATIENT, **options: Any) -> Any:
        with Client(url, timeout=timeout) as client:
            answer = getattr(client, method)(*args, **options)
            return list(answer) if isinstance(answer, Iterator) else answer


class Asynchronous:
    def play(self, url: Any, audio: Any, **options: Any) -> Outcome:
        return asyncio.run(self._play(url, audio, **options))

    def ask(self, url: Any, method: str, *args: Any, **options: Any) -> Any:
        return asyncio.run(self._ask(url, method, *args, **options))

    async def _play(self, url: Any, audio: Any, take: int = 10**9, state: Any = None, **options: Any) -> Outcome:
        outcome = Outcome()
        settings = {key: options.pop(key) for key in ("timeout", "limits", "retry") if key in options}
        async with AsyncClient(url, **settings) as client:
            try:
                opened = client.resume(audio, state) if state else client.animate(audio, avatar="ava", **options)
                async with await opened as stream:
                    while len(outcome.frames) < take and (frame := await anext(stream, None)):
                        outcome.frames.append(frame)
                        outcome.dropped = stream.dropped
                outcome.dropped = stream.dropped
                outcome.state = stream.state
            except Exception as error:
                outcome.error = error
                outcome.state = getattr(error, "state", None)
        return outcome

    async def _ask(self, url: Any, method: str, *args: Any, timeout: Timeout = IMPATIENT, **options: Any) -> Any:
        async with AsyncClient(url, timeout=timeout) as client:
            answer = await getattr(client, method)(*args, **options)
            return [each async for each in answer] if isinstance(answer, AsyncIterator) else answer


@pytest.fixture(params=[Blocking, Asynchronous], ids=["blocking", "asyncio"])
def user(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture
def server() -> Iterator[ScriptedServer]:  # in this file the scripted one
    with ScriptedServer() as server:
        yield server


def frames_of(audio: Any, **options: Any) -> list[Frame]:
    with ScriptedServer() as server:
        outcome = Blocking().play(server.url, audio, **options)
    assert outcome.error is None
    return outcome.frames


def failing(
    code: grpc.StatusCode, details: str, chunks: Iterable[int], times: int = 10**9, retry_after: str | None = None
) -> Script:
    wrong = set(chunks)

    def script(chunk: int, before: int, context: Any) -> None:
        if chunk in wrong and before < times:
            if retry_after is not None:
                context.set_trailing_metadata((("retry-after", retry_after),))
            context.abort(code, details)

    return script


def unused_url() -> str:
    with ScriptedServer() as server:
        return server.url


def test_frames_come_in_order_though_answers_do_not(user: Any) -> None:
    with ScriptedServer(delay=lambda chunk: 0.03 * (3 - chunk % 3)) as server:
        outcome = user.play(server.url, noise(2))
    assert outcome.error is None
    assert [frame.index for frame in outcome.frames] == list(range(50))
    assert [json.loads(frame.data)["index"] for frame in outcome.frames] == list(range(50))


@pytest.mark.parametrize("in_flight", [1, 3])
def test_as_many_requests_are_in_flight_as_allowed(user: Any, in_flight: int) -> None:
    with ScriptedServer(delay=lambda chunk: 0.02) as server:
        outcome = user.play(server.url, noise(2), limits=Limits(in_flight=in_flight))
        assert len(outcome.frames) == 50
        assert server.most_open == in_flight


def test_every_request_says_how_the_frames_are_to_be(user: Any, server: ScriptedServer) -> None:
    options: dict[str, Any] = {"seed": 5, "size": 256, "format": "raw", "quality": 70}
    outcome = user.play(server.url, noise(0.2), **options)
    for frame in outcome.frames:
        assert {key: json.loads(frame.data)[key] for key in options} == options
    assert {frame.format for frame in outcome.frames} == {"raw"}
    assert "size" not in json.loads(user.play(server.url, noise(0.2)).frames[0].data)  # the avatar's own


def generated(packets: list[Samples]) -> Iterator[Samples]:
    yield from packets


async def generated_asynchronously(packets: list[Samples]) -> AsyncIterator[Samples]:
    for packet in packets:
        await asyncio.sleep(0)
        yield packet


def test_audio_may_be_one_packet_a_list_or_an_iterator(user: Any) -> None:
    audio = noise(1.3)
    expected = frames_of(audio)
    parts = np.array_split(audio, 17)
    sources: list[Any] = [audio, [audio], parts, tuple(parts), generated(parts)]
    if isinstance(user, Asynchronous):
        sources.append(generated_asynchronously(parts))
    for source in sources:
        with ScriptedServer() as server:
            assert user.play(server.url, source).frames == expected


@pytest.mark.parametrize("audio", [[], b"", np.zeros(0, np.float32), [np.zeros(0, np.int16)] * 3])
def test_empty_audio_has_no_frames_and_costs_no_request(user: Any, server: ScriptedServer, audio: Any) -> None:
    outcome = user.play(server.url, audio)
    assert (outcome.frames, outcome.error, server.count) == ([], None, 0)
    assert user.ask(server.url, "transcribe", audio) == ""
    assert user.ask(server.url, "speech_to_animation", audio, avatar="ava") == []


def test_a_frame_that_is_ready_does_not_wait_for_a_source_that_blocks(server: ScriptedServer) -> None:
    stop = threading.Event()

    def synthesiser() -> Iterator[Samples]:  # gives a sentence, then thinks about the next one
        yield noise(1)
        stop.wait(20)

    with Client(server.url) as client:
        stream = client.animate(synthesiser(), avatar="ava")
        assert len([next(stream) for _ in range(20)]) == 20
        stop.set()
        assert len(list(stream)) == 5


def test_nothing_is_read_ahead_of_a_consumer_that_pauses(server: ScriptedServer) -> None:
    given = 0

    def endless() -> Iterator[Samples]:
        nonlocal given
        while True:
            given += 1
            yield noise(0.16)

    with Client(server.url, limits=Limits(in_flight=2)) as client, client.animate(endless(), avatar="ava") as stream:
        next(stream)
        time.sleep(0.3)
        assert given <= 6  # two in flight, one waiting, the look-ahead


def test_a_lost_server_costs_a_retry_and_no_frame(user: Any) -> None:
    audio = noise(2)
    script = failing(grpc.StatusCode.UNAVAILABLE, "Socket closed", [2, 3, 4, 7, 12], times=2)
    with ScriptedServer(script=script) as server:
        outcome = user.play(server.url, audio, retry=QUICK)
    assert outcome.error is None
    assert outcome.frames == frames_of(audio)


@pytest.mark.parametrize(
    ("code", "details"),
    [
        (grpc.StatusCode.INTERNAL, "in ensemble 'animate', Stub process 'rasterizer_0_0' is not healthy."),
        (grpc.StatusCode.CANCELLED, "server is stopping"),
    ],
)
def test_what_passes_is_tried_again(user: Any, code: grpc.StatusCode, details: str) -> None:
    with ScriptedServer(script=failing(code, details, [1, 2], times=2)) as server:
        outcome = user.play(server.url, noise(1), retry=QUICK)
    assert (outcome.error, len(outcome.frames)) == (None, 25)


def test_a_hung_server_is_given_up_for_the_next_one(user: Any) -> None:
    audio = noise(1)
    with ScriptedServer(delay=lambda chunk: 3 if chunk > 1 else 0) as hung, ScriptedServer() as sound:
        outcome = user.play([hung.url, sound.url], audio, timeout=Timeout(chunk=0.3), retry=QUICK)
        assert sound.count > 0
    assert outcome.error is None
    assert outcome.frames == frames_of(audio)


def test_the_next_replica_takes_over_when_one_dies_mid_stream(user: Any) -> None:
    audio = noise(3)
    with ScriptedServer(delay=lambda chunk: 0.01) as first, ScriptedServer() as second:

        def dying() -> Iterator[Samples]:
            for number, packet in enumerate(np.array_split(audio, 30)):
                if number == 15:
                    first.stop()
                yield packet

        outcome = user.play([first.url, second.url], dying(), retry=QUICK)
        assert first.count > 0
        assert second.count > 0
    assert outcome.error is None
    assert outcome.frames == frames_of(audio)


def test_a_replica_that_was_never_there_is_passed_over(user: Any, server: ScriptedServer) -> None:
    outcome = user.play([unused_url(), server.url], noise(0.5))
    assert (outcome.error, len(outcome.frames)) == (None, 13)


def test_no_server_at_all_is_said_at_once(user: Any) -> None:
    url = unused_url()
    began = time.monotonic()
    for method, args in (("avatars", ()), ("transcribe", (noise(1),)), ("preload", ("ava",)), ("clock", ())):
        with pytest.raises(ServerUnavailableError, match=f"{url}: Connection refused"):
            user.ask(url, method, *args, timeout=Timeout())
    outcome = user.play(url, noise(1))
    assert isinstance(outcome.error, ServerUnavailableError)
    assert time.monotonic() - began < 4


def test_when_no_server_is_left_the_error_carries_the_state_from_which_another_goes_on(user: Any) -> None:
    audio = noise(3)
    source = iter(np.array_split(audio, 50))
    with ScriptedServer() as server:

        def dying() -> Iterator[Samples]:
            for number, packet in enumerate(source):
                if number == 20:
                    server.stop()
                yield packet

        broken = user.play(server.url, dying(), timeout=IMPATIENT, retry=QUICK)
    assert isinstance(broken.error, ServerUnavailableError)
    assert broken.state is not None
    assert len(broken.frames) == broken.state.frame < 75
    with ScriptedServer() as other:
        rest = user.play(other.url, source, state=StreamState.from_bytes(broken.state.to_bytes()))
    assert rest.error is None
    assert broken.frames + rest.frames == frames_of(audio)


@pytest.mark.parametrize("take", [0, 1, 4, 6, 30])
def test_a_stream_cut_anywhere_goes_on_with_the_same_frames(user: Any, server: ScriptedServer, take: int) -> None:
    audio = noise(2)
    source = iter(np.array_split(audio, 40))
    begun = user.play(server.url, source, take=take, seed=3)
    assert len(begun.frames) == take
    rest = user.play(server.url, source, state=begun.state)
    assert begun.frames + rest.frames == frames_of(audio, seed=3)


@pytest.mark.parametrize(
    ("code", "details", "kind", "message"),
    [
        (
            "NOT_FOUND",
            "in ensemble 'animate', there is no avatar 'eve'",
            UnknownAvatarError,
            "^there is no avatar 'eve'$",
        ),
        ("NOT_FOUND", "Request for unknown model: 'animate' is not found", ServerError, "no talksplat server"),
        ("INVALID_ARGUMENT", "The parameter size is 3.", InvalidRequestError, "size is 3"),
        ("INTERNAL", "the bundle is damaged", ServerError, r"INTERNAL.*the bundle is damaged"),
        ("PERMISSION_DENIED", "not this path", PermissionDeniedError, "does not allow this: not this path"),
        ("UNAUTHENTICATED", "no key", UnauthenticatedError, "does not know the API key: no key"),
        ("DATA_LOSS", "gone", ServerError, "DATA_LOSS.*gone"),
        ("UNAVAILABLE", "Socket closed", ServerUnavailableError, "Socket closed"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", DeadlineExceededError, "in time"),
    ],
)
def test_every_status_has_its_error(
    user: Any, code: str, details: str, kind: type[TalksplatError], message: str
) -> None:
    script = failing(grpc.StatusCode[code], details, range(2, 1000))
    with ScriptedServer(script=script) as server:
        outcome = user.play(server.url, noise(2), timeout=IMPATIENT, retry=QUICK)
        assert type(outcome.error) is kind
        with pytest.raises(kind, match=message):
            raise outcome.error
        assert server.count < (1000 if kind.retryable else 8)  # what can't succeed is not repeated
    assert outcome.state is not None
    assert len(outcome.frames) == outcome.state.frame == 8


def test_a_new_stream_that_is_refused_is_told_when_to_ask_again_and_does_not_ask_itself(user: Any) -> None:
    script = failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "all streams are taken", range(1000), retry_after="1.5")
    with ScriptedServer(script=script) as server:
        outcome = user.play(server.url, noise(1), retry=QUICK)
        assert server.count == 1
    assert isinstance(outcome.error, OverloadedError)
    assert outcome.error.retry_after == 1.5
    assert "no room: all streams are taken" in str(outcome.error)
    silent = failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", range(1000), retry_after="soon")
    with ScriptedServer(script=silent) as server:
        assert user.play(server.url, noise(1)).error.retry_after is None


def test_a_running_stream_that_lost_its_place_asks_again_when_it_was_told_to(user: Any) -> None:
    audio = noise(2)
    script = failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", [4, 5, 6], times=1, retry_after="0.3")
    with ScriptedServer(script=script) as server:
        outcome = user.play(server.url, audio, retry=QUICK)
        refused, admitted = [asked.at for asked in server.asked if asked.chunk == 4]
        assert 0.3 <= admitted - refused < 3
        assert server.asked[-1].at - admitted < 0.3  # the chunks that were refused with it wait with it
    assert outcome.error is None
    assert outcome.frames == frames_of(audio)


def test_a_running_stream_that_gets_no_place_ends_with_the_state_to_resume_from(user: Any) -> None:
    script = failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", range(4, 1000), retry_after="0.05")
    with ScriptedServer(script=script) as server:
        outcome = user.play(server.url, noise(2), timeout=IMPATIENT, retry=QUICK)
        assert server.count < 40
    assert isinstance(outcome.error, OverloadedError)
    assert outcome.state is not None
    assert len(outcome.frames) == outcome.state.frame == 16


EXPIRED = "in ensemble 'animate', The chunk is 31200 ms old, beyond its deadline of 30000 ms."


def test_a_chunk_that_the_server_dropped_leaves_a_gap_and_the_stream_goes_on(user: Any) -> None:
    audio = noise(2)
    with ScriptedServer(script=failing(grpc.StatusCode.CANCELLED, EXPIRED, [2, 3, 12])) as server:
        outcome = user.play(server.url, audio, deadline=30)
        told = {asked.chunk: asked.deadline_ms for asked in server.asked}
        assert set(told) == set(range(13))
        assert all(20_000 < each <= 30_000 for each in told.values())  # what is left when it is sent
        assert server.count == 13  # nothing is rendered late
    assert outcome.error is None
    assert [frame.index for frame in outcome.frames] == [*range(8), *range(16, 48)]
    assert outcome.dropped == 10  # the last chunk has two frames
    assert outcome.state.frame == 50


def test_a_chunk_that_does_not_come_within_the_deadline_is_given_up(user: Any) -> None:
    with ScriptedServer(delay=lambda chunk: 3 if chunk in (2, 5) else 0) as server:
        began = time.monotonic()
        outcome = user.play(server.url, noise(2), deadline=0.4)
    assert time.monotonic() - began < 2.5
    assert (outcome.error, outcome.dropped) == (None, 8)
    assert [frame.index for frame in outcome.frames] == [*range(8), *range(12, 20), *range(24, 50)]


def test_within_the_deadline_a_lost_server_costs_a_retry_and_the_server_hears_what_is_left_of_it(user: Any) -> None:
    script = failing(grpc.StatusCode.UNAVAILABLE, "Socket closed", [2], times=1)
    with ScriptedServer(script=script) as server:
        outcome = user.play(server.url, noise(1), deadline=2, retry=Retry(first=0.2))
        first, second = [asked.deadline_ms for asked in server.asked if asked.chunk == 2]
    assert (outcome.error, outcome.dropped, len(outcome.frames)) == (None, 0, 25)
    assert second <= first - 200


def test_a_live_stream_ends_when_nothing_answers_for_longer_than_servers_take_to_come_back(user: Any) -> None:
    def live() -> Iterator[Samples]:
        while True:
            yield noise(0.16)
            time.sleep(0.05)

    script = failing(grpc.StatusCode.UNAVAILABLE, "Socket closed", range(3, 10**6))
    with ScriptedServer(script=script) as server:
        outcome = user.play(server.url, live(), deadline=0.1, timeout=Timeout(recovery=0.5), retry=QUICK)
    assert isinstance(outcome.error, ServerUnavailableError)
    assert outcome.state is not None
    assert outcome.state.frame > 12  # what was dropped until then is not waited for again


def test_recordings_have_no_deadline(user: Any, server: ScriptedServer) -> None:
    user.play(server.url, noise(1))
    assert {asked.deadline_ms for asked in server.asked} == {0}


def test_a_deadline_outlives_its_stream_in_the_state(user: Any, server: ScriptedServer) -> None:
    begun = user.play(server.url, noise(1), take=4, deadline=0.25)
    state = StreamState.from_bytes(begun.state.to_bytes())
    assert (state.deadline, state.id) == (0.25, begun.state.id)
    server.asked.clear()
    user.play(server.url, noise(1), state=state)
    assert {asked.deadline_ms for asked in server.asked} == {250}


def test_all_requests_of_a_stream_bear_its_id_and_their_frame(user: Any, server: ScriptedServer) -> None:
    begun = user.play(server.url, noise(1), take=6)
    user.play(server.url, noise(1), state=begun.state)
    assert {asked.metadata["x-talksplat-stream"] for asked in server.asked} == {begun.state.id}
    assert {asked.id for asked in server.asked} == {f"{begun.state.id}-{frame}" for frame in range(0, 50, 4)}
    assert all("authorization" not in asked.metadata for asked in server.asked)


def test_streams_at_a_time_are_counted_apart_and_those_that_follow_one_another_as_one(server: ScriptedServer) -> None:
    with Client(server.url) as client:
        client.preload("ava")
        first = client.animate(noise(1), avatar="ava")
        second = client.animate(noise(1), avatar="ava")
        assert first.state.id != second.state.id
        list(second)
        third = client.animate(noise(1), avatar="ava")
        assert third.state.id == second.state.id
        client.avatars()
        list(first), list(third)
        client.transcribe(noise(1))
        streams = [asked.metadata.get("x-talksplat-stream") for asked in server.asked]
        assert set(streams) == {None, first.state.id, second.state.id}
        assert [asked.model for asked in server.asked if "x-talksplat-stream" not in asked.metadata] == 2 * [
            "rasterizer"
        ]
        assert streams[-1] == third.state.id


async def test_streams_at_a_time_are_counted_apart_and_those_that_follow_one_another_as_one_asyncio(
    server: ScriptedServer,
) -> None:
    async with AsyncClient(server.url) as client:
        await client.preload("ava")
        first = await client.animate(noise(1), avatar="ava")
        second = await client.animate(noise(1), avatar="ava")
        await second.cancel()
        third = await client.animate(noise(1), avatar="ava")
        await client.avatars()
        assert first.state.id != second.state.id == third.state.id
        await client.transcribe(noise(1))
        streams = [asked.metadata.get("x-talksplat-stream") for asked in server.asked]
        assert set(streams) <= {None, first.state.id, second.state.id}
        assert [asked.model for asked in server.asked if "x-talksplat-stream" not in asked.metadata] == 2 * [
            "rasterizer"
        ]
        assert streams[-1] == third.state.id


def test_a_server_that_is_no_talksplat_server_is_named_so(user: Any) -> None:
    with ScriptedServer(clock={}) as server, pytest.raises(ServerError, match="'sample_rate'"):
        user.ask(server.url, "clock")


def test_bad_audio_ends_the_stream_after_the_frames_of_the_good(user: Any, server: ScriptedServer) -> None:
    good, bad = noise(1), np.array([np.nan], np.float32)
    outcome = user.play(server.url, [good, bad, good])
    assert isinstance(outcome.error, InvalidAudioError)
    assert outcome.state is not None
    assert outcome.state.position == 1
    assert len(outcome.frames) == outcome.state.frame == 20  # those whose look-ahead is there
    assert outcome.frames + user.play(server.url, [good], state=outcome.state).frames == frames_of([good, good])


def test_an_error_of_the_source_reaches_the_consumer_as_it_is(user: Any, server: ScriptedServer) -> None:
    def broken() -> Iterator[Samples]:
        yield noise(1)
        raise KeyError("my own")

    outcome = user.play(server.url, broken())
    assert isinstance(outcome.error, KeyError)
    assert len(outcome.frames) == 20


def threads_of_streams() -> int:
    return sum(thread.name == "talksplat-audio" for thread in threading.enumerate())


def eventually(condition: Callable[[], bool], seconds: float = 2) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


def test_cancelling_releases_a_waiting_consumer_and_the_server() -> None:
    with ScriptedServer(delay=lambda chunk: 5 if chunk > 2 else 0) as server, Client(server.url) as client:
        stream = client.animate(noise(5), avatar="ava")
        threading.Timer(0.3, stream.cancel).start()
        began = time.monotonic()
        frames = list(stream)
        assert time.monotonic() - began < 2
        assert len(frames) == 12
        assert list(stream) == []
        assert stream.state.frame == 12
        assert eventually(lambda: server.cancelled == 3)
        assert eventually(lambda: threads_of_streams() == 0)


async def test_cancelling_releases_a_waiting_consumer_and_the_server_asyncio() -> None:
    with ScriptedServer(delay=lambda chunk: 5 if chunk > 2 else 0) as server:
        async with AsyncClient(server.url) as client:
            stream = await client.animate(noise(5), avatar="ava")
            canceller = asyncio.create_task(asyncio.sleep(0.3))
            canceller.add_done_callback(lambda _: asyncio.ensure_future(stream.cancel()))
            began = time.monotonic()
            frames = [frame async for frame in stream]
            assert time.monotonic() - began < 2
            assert len(frames) == 12
            assert stream.state.frame == 12
            for _ in range(200):
                if server.cancelled == 3:
                    break
                await asyncio.sleep(0.01)
            assert server.cancelled == 3


async def test_a_consumer_that_gives_up_waiting_loses_no_frame() -> None:
    with ScriptedServer(delay=lambda chunk: 0.2) as server:
        async with AsyncClient(server.url) as client:
            stream = await client.animate(noise(1), avatar="ava")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(stream), 0.05)
            assert [frame.index async for frame in stream] == list(range(25))


async def test_streams_of_one_client_run_beside_each_other() -> None:
    with ScriptedServer(delay=lambda chunk: 0.02) as server:
        async with AsyncClient(server.url) as client:

            async def watch(seed: int) -> list[Frame]:
                return [f async for f in await client.animate(noise(1, seed), avatar="ava", seed=seed)]

            streams = await asyncio.gather(*map(watch, range(4)))
    for seed, frames in enumerate(streams):
        assert frames == frames_of(noise(1, seed), seed=seed)


def test_a_stream_that_is_dropped_leaves_no_thread_behind(server: ScriptedServer) -> None:
    with Client(server.url) as client:
        for _ in range(3):
            for _ in client.animate([noise(0.1)] * 100, avatar="ava"):
                break
        gc.collect()
        assert eventually(lambda: threads_of_streams() == 0)


def test_closing_the_client_ends_its_streams(server: ScriptedServer) -> None:
    client = Client(server.url)
    stream = client.animate([noise(0.1)] * 100, avatar="ava")
    next(stream)
    client.close()
    assert list(stream) == []


def test_operations(user: Any, server: ScriptedServer) -> None:
    assert user.ask(server.url, "avatars") == [AvatarInfo("ava", True), AvatarInfo("bob", False)]
    assert user.ask(server.url, "preload", "ava") == Preloaded("ava", "animate", False, 1.5, 512, 512)
    assert user.ask(server.url, "unload", "ava") is None
    with pytest.raises(UnknownAvatarError, match="'eve'"):
        user.ask(server.url, "preload", "eve")
    dead = unused_url()
    [alive, gone] = user.ask([server.url, dead], "health")
    assert (alive.url, alive.ready) == (server.url, True)
    assert (gone.url, gone.ready) == (dead, False)
    assert "Connection refused" in gone.detail


def test_a_long_recording_is_transcribed_piece_by_piece(user: Any, server: ScriptedServer) -> None:
    text = user.ask(server.url, "transcribe", [noise(1)] * 70)
    sizes = [int(word[1:-1]) for word in text.split()]
    assert sum(sizes) == 70 * 16_000
    assert 3 <= len(sizes) <= 4


def test_an_utterance_gives_its_text_and_all_its_frames(user: Any, server: ScriptedServer) -> None:
    [utterance] = user.ask(server.url, "speech_to_animation", noise(1.01), avatar="ava", seed=4)
    assert isinstance(utterance, Utterance)
    assert utterance.text == "[16160]"
    assert [frame.index for frame in utterance.frames] == list(range(26))
    assert json.loads(utterance.frames[0].data)["seed"] == 4
    utterances = user.ask(server.url, "speech_to_animation", [noise(1)] * 45, avatar="ava")
    assert len(utterances) == 2
    assert [frame.index for each in utterances for frame in each.frames] == list(range(45 * 25))


def test_an_hour_streams_in_constant_memory() -> None:
    # the server says what a chunk is: here four seconds, so that an hour takes seconds
    with ScriptedServer(clock={**CLOCK, "chunk_frames": 100}) as server, Client(server.url) as client:
        second, memory = noise(1), psutil.Process().memory_info
        list(client.animate([second] * 60, avatar="ava"))
        before = peak = memory().rss
        for frame in client.animate((second for _ in range(3600)), avatar="ava"):
            if frame.index % 1000 == 0:
                peak = max(peak, memory().rss)
    assert frame.index == 3600 * 25 - 1
    assert peak - before < 60e6  # the hour itself is 230 MB
