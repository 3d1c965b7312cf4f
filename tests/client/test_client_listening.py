"""A face that listens: how a stream turns to it, and back, without a jump."""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_server import CLOCK, ScriptedServer, answer

from talksplat.server import Server
from talksplat_client import AsyncClient, Client, Clock, Frame, InvalidRequestError, StreamState
from talksplat_client._stream import MOST_TURN, StreamCore

THE_CLOCK = Clock(**CLOCK)
NEW = StreamState("ava", THE_CLOCK, THE_CLOCK.sample_rate)
CHUNK = THE_CLOCK.chunk_frames
A_FRAME = MOST_TURN / CHUNK  # percent, at most


def levels(request: Any) -> list[float]:
    """How much the face listens at the end of each frame of the chunk that is asked for, percent."""
    before, after = (request.parameters[name].int64_param for name in ("listening_before", "listening"))
    return [before + (after - before) * (number + 1) / CHUNK for number in range(CHUNK)]


class Player:
    """Shows frames, with chunks requested ahead as the clients do."""

    def __init__(self, core: StreamCore) -> None:
        self._core = core
        self._frames: deque[tuple[Frame, float]] = (
            deque()
        )  # that have come and were not shown yet, how much each listens

    def play(self, frames: int, ahead: int = 0) -> list[float]:
        """Show so many; how much each of them listens."""
        shown: list[float] = []
        for _ in range(frames):
            while len(self._frames) <= ahead * CHUNK:
                self._request()
            frame, listening = self._frames.popleft()
            self._core.shown(frame)
            shown.append(listening)
        return shown

    def _request(self) -> None:
        asked = self._core.next_request()
        assert asked is not None
        response = answer(FRAMES=np.array([[b""] * CHUNK], object), SPEECH=np.zeros((1, CHUNK)))
        listening = levels(asked[1])
        self._frames += [(frame, listening[frame.index % CHUNK]) for frame in self._core.frames(asked[0], response)]


PARTS = st.lists(
    st.tuples(
        st.booleans(), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 13), st.integers(0, 3), st.integers(0, 13)
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=80)
@given(PARTS)
def test_listening_never_jumps_however_a_stream_is_cut_and_resumed(
    parts: Sequence[tuple[bool, float, int, int, int]],
) -> None:
    state, shown, target = NEW, [0.0], 0.0
    for rests, listening, count, ahead, more in parts:
        core = StreamCore(state if rests else state.cut(), THE_CLOCK, rests=rests)
        if not rests:
            core.push(np.full(40_000, 0.1, np.float32))
        assert core.listening == target
        player = Player(core)
        shown += player.play(count, ahead)
        core.listen(listening)
        shown += player.play(more)
        state, target = StreamState.from_bytes(core.state().to_bytes()), listening
    core = StreamCore(state, THE_CLOCK, rests=True)
    shown += Player(core).play(5 * CHUNK)
    assert max(map(abs, np.diff(shown))) <= A_FRAME + 1e-9
    assert shown[-1] == round(100 * target)


def test_a_stream_that_does_not_listen_asks_for_what_older_servers_know() -> None:
    core = StreamCore(NEW, THE_CLOCK, rests=True)
    asked = [core.next_request() for _ in range(2)]
    core.listen(0.2)
    core.listen(0)
    asked.append(core.next_request())
    for each in asked:
        assert each is not None
        assert set(each[1].parameters) == {"format", "quality", "seed"}


@pytest.mark.parametrize("wrong", [-0.01, 1.01, float("nan")])
def test_what_is_no_share_is_refused_and_changes_nothing(wrong: float) -> None:
    core = StreamCore(replace(NEW, listening=0.5), THE_CLOCK, rests=True)
    with pytest.raises(InvalidRequestError, match=r"listening is .*expected 0 to 1"):
        core.listen(wrong)
    assert core.listening == 0.5


def turns(frames: Sequence[Frame]) -> list[tuple[int, int]]:
    said = [json.loads(frame.data) for frame in frames[::CHUNK]]
    return [(each.get("listening_before", 0), each.get("listening", 0)) for each in said]


def after_the_first_requests(found: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Without those that were sent before the stream was told to turn."""
    return list(itertools.dropwhile(lambda turn: turn == (100, 100), found))


def test_a_running_stream_turns_to_listening_and_back() -> None:
    with ScriptedServer() as server, Client(server.url) as client:
        stream = client.idle("ava")
        frames = list(itertools.islice(stream, 20))
        stream.listening = 1.0
        frames += itertools.islice(stream, 40)
        stream.cancel()
        with client.resume(None, stream.state) as resumed:
            assert resumed.listening == 1.0
            resumed.listening = 0.0
            frames += itertools.islice(resumed, 40)
    found = turns(frames)
    assert found[0] == (0, 0)
    assert found[14] == (100, 100)
    assert after_the_first_requests(found[15:])[:3] == [(100, 50), (50, 0), (0, 0)]
    assert [a[1] for a in found[:-1]] == [b[0] for b in found[1:]]


async def test_the_asyncio_twin_turns_the_same_way() -> None:
    with ScriptedServer() as server:
        async with AsyncClient(server.url) as client:
            async with await client.idle("ava") as stream:
                frames = [await anext(stream) for _ in range(20)]
                stream.listening = 1.0
                frames += [await anext(stream) for _ in range(40)]
            async with await client.resume(None, stream.state) as resumed:
                assert resumed.listening == 1.0
                resumed.listening = 0.0
                frames += [await anext(resumed) for _ in range(40)]
    found = turns(frames)
    assert (found[0], found[14]) == ((0, 0), (100, 100))
    assert after_the_first_requests(found[15:])[:3] == [(100, 50), (50, 0), (0, 0)]


def test_the_server_draws_a_listener_otherwise_and_a_resumed_one_the_same(server: Server) -> None:
    with Client(server.grpc_url) as client:
        with client.idle("red", seed=3, format="raw", size=32) as stream:
            stream.listening = 1.0
            frames = list(itertools.islice(stream, 70))
            state = stream.state
        with client.idle("red", seed=3, format="raw", size=32) as stream:
            idle = list(itertools.islice(stream, 70))
        with client.resume(None, replace(state, frame=58, start=0)) as stream:
            resumed = list(itertools.islice(stream, 12))
    assert [frame.data for frame in resumed] == [frame.data for frame in frames[58:]]
    assert [frame.data for frame in frames[20:]] != [frame.data for frame in idle[20:]]
