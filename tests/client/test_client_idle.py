"""An avatar at rest, and the ways between resting and speaking."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_server import CLOCK, ScriptedServer, answer, inputs

from talksplat.server import Server
from talksplat_client import AsyncClient, Client, Clock, Frame, StreamState, read_audio
from talksplat_client import _protocol as protocol
from talksplat_client._audio import Samples
from talksplat_client._stream import StreamCore

THE_CLOCK = Clock(**CLOCK)
SPEECH = Path(__file__).resolve().parents[2] / "demo" / "speech.wav"
RATES = [8_000, 16_000, 24_000, 44_100, 12_345]


def noise(samples: int, seed: int = 0) -> Samples:
    return np.random.default_rng(seed).uniform(-0.9, 0.9, samples).astype(np.float32)


class Face:
    """A stand-in for the server that keeps no network: a frame is the window that it was asked for."""

    def __init__(self) -> None:
        self.models: list[str] = []

    def __call__(self, request: Any) -> Any:
        given = inputs(request)
        self.models.append(request.model_name)
        window = given["AUDIO"].tobytes() if "AUDIO" in given else bytes(4 * 14_720)
        frames = [window + bytes([number]) for number in range(THE_CLOCK.chunk_frames)]
        response = answer(FRAMES=np.array([frames], object), SPEECH=np.zeros((1, THE_CLOCK.chunk_frames)))
        response.model_name = request.model_name
        return response


def play(core: StreamCore, face: Callable[[Any], Any], count: float, audio: Samples | None = None) -> list[Frame]:
    if audio is not None:
        core.push(audio)
        core.finish()
    shown: list[Frame] = []
    while len(shown) < count and (request := core.next_request()) is not None:
        for frame in core.frames(request[0], face(request[1])):
            if len(shown) < count:
                core.shown(frame)
                shown.append(frame)
    return shown


def test_a_face_at_rest_is_asked_for_without_any_sound() -> None:
    face = Face()
    core = StreamCore(StreamState("ava", THE_CLOCK, 16_000), THE_CLOCK, rests=True)
    frames = play(core, face, 1000)
    assert [frame.index for frame in frames] == list(range(1000))
    assert set(face.models) == {"rasterizer"}
    assert core.state().position == 40


def test_long_silence_within_speech_costs_no_more_than_rest() -> None:
    face = Face()
    audio = np.concatenate([noise(16_000), np.zeros(64_000, np.float32), noise(16_000, 1)])
    frames = play(StreamCore(StreamState("ava", THE_CLOCK, 16_000), THE_CLOCK), face, 1000, audio)
    assert len(frames) == 150
    assert 19 <= face.models.count("rasterizer") <= 25
    always = play(StreamCore(StreamState("ava", THE_CLOCK, 16_000), THE_CLOCK), face, 1000, audio + 1e-9)
    assert [frame.index for frame in always] == [frame.index for frame in frames]


@settings(max_examples=40)
@given(
    rate=st.sampled_from(RATES[:-1]),  # those that have whole samples in a frame
    parts=st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.integers(0, 40_000)), min_size=1, max_size=6),
)
def test_speaking_begins_at_the_next_frame_and_frame_numbers_run_through(
    rate: int, parts: list[tuple[bool, int, int]]
) -> None:
    face = Face()
    state = StreamState("ava", THE_CLOCK, rate)
    index = 0
    for number, (rests, count, samples) in enumerate(parts):
        core = StreamCore(state if rests else state.cut(), THE_CLOCK, rests=rests)
        audio = None if rests else noise(samples, number)
        frames = play(core, face, count, audio)
        assert [frame.index for frame in frames] == list(range(index, index + len(frames)))
        assert len(frames) == (count if rests else min(count, -(-samples * 25 // rate)))
        index += len(frames)
        state = StreamState.from_bytes(core.state().to_bytes())
        assert state.frame == index
        assert state.samples.size < 2 * rate + samples
        if rests:
            assert state.position == pytest.approx(index / 25)


@settings(max_examples=30)
@given(rate=st.sampled_from(RATES), rested=st.integers(0, 60), samples=st.integers(1, 30_000))
def test_speech_after_rest_is_speech_after_silence(rate: int, rested: int, samples: int) -> None:
    audio, face = noise(samples), Face()
    new = StreamState("ava", THE_CLOCK, rate)
    resting = StreamCore(new, THE_CLOCK, rests=True)
    play(resting, face, rested)
    after_rest = play(StreamCore(resting.state(), THE_CLOCK), face, 1000, audio)
    silence = np.zeros(-(-rested * rate // 25), np.float32)
    at_once = play(StreamCore(new, THE_CLOCK), face, 1000, np.concatenate([silence, audio]))
    assert after_rest == at_once[rested:]


@settings(max_examples=30)
@given(rate=st.sampled_from(RATES), spoken=st.integers(0, 40), samples=st.integers(0, 30_000))
def test_rest_after_speech_is_silence_after_what_was_shown(rate: int, spoken: int, samples: int) -> None:
    audio, face = noise(samples), Face()
    new = StreamState("ava", THE_CLOCK, rate)
    speaking = StreamCore(new, THE_CLOCK)
    shown = play(speaking, face, spoken, audio)
    resting = StreamCore(speaking.state(), THE_CLOCK, rests=True)
    after = play(resting, face, 50)
    said = audio[: -(-len(shown) * rate // 25)]  # what nobody has seen spoken is not spoken any more
    quiet = np.concatenate([said, np.zeros(4 * rate, np.float32)])
    assert after == play(StreamCore(new, THE_CLOCK), face, len(shown) + 50, quiet)[len(shown) :]
    assert face.models[-1] == "rasterizer"  # the last sound is out of the window


def test_an_idle_stream_comes_as_fast_as_it_is_taken_and_hands_over_within_a_frame() -> None:
    with ScriptedServer() as server, Client(server.url) as client:
        stream = client.idle("ava", seed=3)
        frames = list(itertools.islice(stream, 30))
        assert server.count <= 13  # no more than is needed, three chunks ahead
        speaking = client.resume(noise(16_000), stream.state)
        stream.cancel()
        frames += list(speaking)
        frames += list(itertools.islice(client.resume(None, speaking.state), 10))
        assert [frame.index for frame in frames] == list(range(65))
        assert len({asked.metadata["x-talksplat-stream"] for asked in server.asked}) == 1


async def test_an_idle_stream_hands_over_within_a_frame_asyncio() -> None:
    with ScriptedServer() as server:
        async with AsyncClient(server.url) as client:
            frames: list[Frame] = []
            async with await client.idle("ava", seed=3) as stream:
                frames += [await anext(stream) for _ in range(30)]
            speaking = await client.resume(noise(16_000), stream.state)
            frames += [frame async for frame in speaking]
            async with await client.resume(None, speaking.state) as stream:
                frames += [await anext(stream) for _ in range(10)]
            assert [frame.index for frame in frames] == list(range(65))
            assert len({asked.metadata["x-talksplat-stream"] for asked in server.asked}) == 1


class Direct:
    """A server that is asked chunk by chunk, by hand."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def animate(self, state: StreamState, first: int, window: Samples) -> list[bytes]:
        request = protocol.animate(window, first, state)
        response = self._client._infer(request, 10).result()
        return [frame.data for frame in protocol.frames(response, first, state)]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Client]:
    with Client(server.grpc_url) as client:
        yield client


@pytest.mark.parametrize("avatar", ["red", "violet"])
@pytest.mark.parametrize("look", [{"seed": 5}, {"seed": 2, "size": 32, "format": "raw"}, {"quality": 40}])
def test_at_rest_the_server_draws_what_it_draws_of_silence(client: Client, avatar: str, look: dict[str, Any]) -> None:
    model = client.preload(avatar).model
    with client.idle(avatar, model=model, **look) as stream:
        rest = [next(stream) for _ in range(22)]
        state = stream.state
    silence = np.zeros(14_720, np.float32)
    direct = [data for first in range(0, 22, 4) for data in Direct(client).animate(state, first, silence)]
    assert [frame.data for frame in rest] == direct[:22]
    assert len({frame.data for frame in rest}) > 3  # it breathes
    assert {frame.speech for frame in rest} == {0}


def test_a_conversation_with_the_server_has_no_jump(client: Client) -> None:
    recording = read_audio(SPEECH)
    taken = np.concatenate(list(recording.packets))[: 2 * recording.sample_rate]
    audio = soxr.resample(taken, recording.sample_rate, 16_000)[16_000:]
    with client.idle("red", seed=1) as stream:
        frames = [next(stream) for _ in range(10)]
    with client.resume(audio, stream.state) as stream:
        frames += list(stream)
    with client.resume(None, stream.state) as stream:
        frames += [next(stream) for _ in range(40)]
    timeline = np.concatenate([np.zeros(6_400, np.float32), audio, np.zeros(40 * 640, np.float32)])
    at_once = list(client.animate(timeline, avatar="red", seed=1))
    # at rest nobody knew yet what would be said: the frames whose look-ahead holds it are the only ones to differ
    same = [*range(4), *range(10, 75)]
    assert [frames[index].data for index in same] == [at_once[index].data for index in same]
    assert max(frame.speech for frame in frames[10:35]) > 0.5 > max(frame.speech for frame in frames[60:])
    assert [frame.index for frame in frames] == list(range(75))


async def test_the_asyncio_twin_rests_the_same_way(server: Server, client: Client) -> None:
    with client.idle("red", seed=4) as stream:
        expected = await asyncio.to_thread(lambda: [next(stream) for _ in range(9)])
    async with AsyncClient(server.grpc_url) as twin, await twin.idle("red", seed=4) as resting:
        assert [await anext(resting) for _ in range(9)] == expected


def test_a_chunk_of_the_server_that_is_too_old_is_dropped_and_counted(client: Client) -> None:
    state = StreamState("red", client.clock(), 16_000, deadline=0.001)
    stream = client.resume(noise(32_000), replace(state))
    frames = list(stream)
    assert len(frames) + stream.dropped == 50
    assert stream.dropped > 0
    assert len(list(client.animate(noise(32_000), avatar="red", deadline=10))) == 50
