"""Moments: frames with their sound as time passes, in simulated time."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from presence import wait_until
from scripted_server import ScriptedServer
from simulated_server import THE_CLOCK, SimulatedServer, brightness, simulate

from talksplat_client import AsyncClient, InvalidAudioError, InvalidRequestError, TalksplatError
from talksplat_client._live import LiveStream, Moment

RATE = 24_000
FRAME = 1 / THE_CLOCK.fps
CHUNK = THE_CLOCK.chunk_frames * FRAME


def steps(seconds: float, rate: int = RATE) -> np.ndarray[Any, np.dtype[np.int16]]:
    """Sound that is constant for the time of a frame, and another level in each."""
    levels = np.random.default_rng(5).integers(-20_000, 20_000, 1 + int(seconds / FRAME))
    return np.repeat(levels, rate // THE_CLOCK.fps)[: round(seconds * rate)].astype(np.int16)


class Viewer:
    """Takes what a stream gives, and notes when."""

    def __init__(self, stream: LiveStream[str]) -> None:
        self.stream = stream
        self.taken: list[tuple[float, Moment | str]] = []
        self.task = asyncio.create_task(self._take())

    async def _take(self) -> None:
        async for each in self.stream.moments():
            self.taken.append((asyncio.get_running_loop().time(), each))

    @property
    def moments(self) -> list[Moment]:
        return [each for _, each in self.taken if isinstance(each, Moment)]

    @property
    def spoken(self) -> list[Moment]:
        return [moment for moment in self.moments if moment.sound is not None]

    def heard(self) -> np.ndarray[Any, np.dtype[np.int16]]:
        return np.concatenate([moment.sound for moment in self.spoken if moment.sound is not None])

    async def close(self) -> None:
        await self.stream.close()
        await self.task


async def watch(server: SimulatedServer, lead: float = 0.0, rate: int = RATE) -> Viewer:
    stream = await LiveStream[str].open(server.client(), "ava", sample_rate=rate, lead=lead, format="raw")
    return Viewer(stream)


def in_step(moment: Moment) -> bool:
    """Whether the picture is that of the sound beside it."""
    level = 0.0 if moment.sound is None else moment.sound[moment.sound.size // 2] / 32768
    return abs(moment.frame.data[0] - brightness(float(level))) <= 1


def test_an_avatar_rests_speaks_and_rests_again_with_every_frame_beside_its_sound() -> None:
    async def work() -> Viewer:
        viewer = await watch(SimulatedServer())
        await asyncio.sleep(1)
        viewer.stream.say(steps(2), RATE)
        viewer.stream.finish()
        await asyncio.sleep(4)
        await viewer.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return viewer

    viewer = simulate(work())
    assert [moment.frame.index for moment in viewer.moments] == list(range(len(viewer.moments)))
    assert (viewer.heard() == steps(2)).all()
    first = viewer.moments.index(viewer.spoken[0])
    assert 1 <= first * FRAME <= 1 + 2 * FRAME
    assert viewer.moments[first : first + 2 * THE_CLOCK.fps] == viewer.spoken  # without a gap
    assert all(map(in_step, viewer.moments))
    times = np.array([time for time, _ in viewer.taken])
    assert np.diff(times[2:]) == pytest.approx(FRAME)  # after the first, which are waited for
    assert [moment.due for moment in viewer.moments[2:]] == pytest.approx(times[2:])


@pytest.mark.parametrize("lead", [0.0, 0.08, np.inf])
def test_only_speech_comes_before_it_is_due_and_by_no_more_than_the_lead(lead: float) -> None:
    async def work() -> Viewer:
        viewer = await watch(SimulatedServer(), lead)
        await asyncio.sleep(1)
        viewer.stream.say(steps(2), RATE)
        viewer.stream.finish()
        await asyncio.sleep(4)
        await viewer.close()
        return viewer

    viewer = simulate(work())
    start, begins = next(
        (time, each) for time, each in viewer.taken if isinstance(each, Moment) and each.sound is not None
    )
    for time, each in viewer.taken:
        assert isinstance(each, Moment)
        due = start + (each.frame.index - begins.frame.index) * FRAME
        if each.sound is not None and each is not begins:
            assert time == pytest.approx(due - lead if lead < 1 else start, abs=CHUNK)
            assert time >= due - lead - 1e-6
        elif each.frame.index > begins.frame.index:
            assert time == pytest.approx(due)


def test_sound_that_comes_as_fast_as_it_is_spoken_is_one_utterance() -> None:
    async def work() -> Viewer:
        viewer = await watch(SimulatedServer())
        for packet in np.split(steps(10), 500):  # of 20 ms
            viewer.stream.say(packet, RATE)
            await asyncio.sleep(0.02)
        await asyncio.sleep(1)
        await viewer.close()
        return viewer

    viewer = simulate(work())
    assert (viewer.heard() == steps(10)).all()
    indices = [moment.frame.index for moment in viewer.spoken]
    assert indices == list(range(indices[0], indices[0] + 250))


def test_where_sound_fails_to_come_the_avatar_rests_and_nothing_is_lost() -> None:
    async def work() -> Viewer:
        viewer = await watch(SimulatedServer())
        for piece in np.split(steps(3), 3):
            viewer.stream.say(piece, RATE)
            await asyncio.sleep(2)
        await viewer.close()
        return viewer

    viewer = simulate(work())
    assert (viewer.heard() == steps(3)).all()
    spoken = [moment.sound is not None for moment in viewer.moments]
    assert sum(before < after for before, after in itertools.pairwise([False, *spoken])) == 3
    assert all(map(in_step, viewer.moments))


def test_a_word_shorter_than_a_chunk_is_spoken_though_nothing_follows() -> None:
    async def work() -> Viewer:
        viewer = await watch(SimulatedServer())
        await asyncio.sleep(1)
        viewer.stream.say(steps(0.1), RATE)
        await asyncio.sleep(1)
        await viewer.close()
        return viewer

    viewer = simulate(work())
    assert (viewer.heard() == np.pad(steps(0.1), (0, RATE // 50))).all()  # to the end of a frame
    [start] = [time for time, each in viewer.taken if each is viewer.spoken[0]]
    assert start < 1 + 2 * CHUNK


def test_an_interruption_silences_at_once_and_frees_the_server() -> None:
    async def work() -> tuple[Viewer, SimulatedServer, float, list[str]]:
        server = SimulatedServer(0.12)
        viewer = await watch(server, lead=0.08)
        await asyncio.sleep(0.5)
        viewer.stream.say(steps(10), RATE)
        viewer.stream.mark("after")
        viewer.stream.say(steps(10), RATE)
        await asyncio.sleep(1.5)
        interrupted = asyncio.get_running_loop().time()
        dropped = await viewer.stream.interrupt()
        assert asyncio.get_running_loop().time() - interrupted < 0.01
        await asyncio.sleep(1)
        await viewer.close()
        return viewer, server, interrupted, dropped

    viewer, server, interrupted, dropped = simulate(work())
    assert dropped == ["after"]
    assert "after" not in [each for _, each in viewer.taken]
    assert server.cancelled
    after = [each for time, each in viewer.taken if time > interrupted]
    assert len(after) >= 20
    assert all(isinstance(each, Moment) and each.sound is None for each in after)
    assert [moment.frame.index for moment in viewer.moments] == pytest.approx(range(len(viewer.moments)), abs=1)


@pytest.mark.parametrize("lead", [0.0, 0.08, np.inf])
@pytest.mark.parametrize("after", [0.0, 0.1, 0.3, 0.46, 0.48, 0.5, 0.52, 0.54, 0.56, 0.6, 0.65])
def test_an_interruption_may_come_at_any_moment(after: float, lead: float) -> None:
    async def work() -> tuple[Viewer, float]:
        viewer = await watch(SimulatedServer(), lead)
        await asyncio.sleep(0.5)
        viewer.stream.say(steps(0.5), RATE)  # which is heard from 0.52 s on, or a little later
        viewer.stream.finish()
        await asyncio.sleep(after)
        interrupted = asyncio.get_running_loop().time()
        await viewer.stream.interrupt()
        await asyncio.sleep(0.5)
        viewer.stream.say(steps(1), RATE)
        viewer.stream.finish()
        await asyncio.sleep(2)
        await viewer.close()
        return viewer, interrupted

    viewer, interrupted = simulate(work())
    after_it = [each for time, each in viewer.taken if time > interrupted and isinstance(each, Moment)]
    assert np.diff([interrupted, *(moment.due for moment in after_it)]).max() <= 2 * FRAME  # it goes on
    said = [moment.sound for moment in after_it if moment.sound is not None]
    assert (np.concatenate(said) == steps(1)).all()


def test_live_sound_is_one_utterance_though_the_server_is_late() -> None:
    async def work() -> Viewer:
        server = SimulatedServer()
        viewer = await watch(server, lead=0.1)
        for number, packet in enumerate(np.split(steps(6), 300)):  # of 20 ms
            server.seconds = 0.5 if 100 < number < 125 else 0.03
            viewer.stream.say(packet, RATE)
            await asyncio.sleep(0.02)
        await asyncio.sleep(2)
        await viewer.close()
        return viewer

    assert simulate(work()).heard().tolist() == steps(6).tolist()


async def test_a_face_whose_client_is_closed_ends_and_whoever_speaks_is_told_why() -> None:
    with ScriptedServer() as server:
        for seconds in (0, 10):  # of speech
            client = AsyncClient(server.url)
            stream = await LiveStream[str].open(client, "ava", sample_rate=RATE, lead=0.1, size=8, format="raw")
            viewer = Viewer(stream)
            stream.say(steps(seconds), RATE)
            await wait_until(lambda viewer=viewer: len(viewer.taken) > 10)  # type: ignore[misc]
            await client.close()
            with pytest.raises(TalksplatError, match="the client is closed"):
                await viewer.task
            with pytest.raises(TalksplatError, match="the client is closed"):
                stream.say(steps(1), RATE)
            await stream.close()


def test_an_interruption_waits_for_no_answer_of_a_stuck_server() -> None:
    async def work() -> list[float]:
        server = SimulatedServer()
        viewer = await watch(server)
        viewer.stream.say(steps(10), RATE)
        await asyncio.sleep(1)
        server.seconds = 100
        await asyncio.sleep(2)
        server.seconds = 0.03
        await viewer.stream.interrupt()
        await asyncio.sleep(0.5)
        await viewer.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return [time for time, _ in viewer.taken if time > 3]

    assert len(simulate(work())) >= 10


def test_after_an_interruption_the_next_utterance_is_whole() -> None:
    async def work() -> Viewer:
        viewer = await watch(SimulatedServer())
        viewer.stream.say(steps(5), RATE)
        await asyncio.sleep(1)
        before = len(viewer.moments)
        await viewer.stream.interrupt()
        viewer.stream.say(steps(1), RATE)
        viewer.stream.finish()
        viewer.stream.mark("end")
        await asyncio.sleep(2)
        await viewer.close()
        viewer.taken = viewer.taken[before:]
        return viewer

    viewer = simulate(work())
    assert (viewer.heard() == steps(1)).all()
    assert [each for _, each in viewer.taken].count("end") == 1


def test_a_slow_server_delays_sound_and_picture_together() -> None:
    async def work() -> Viewer:
        server = SimulatedServer()
        viewer = await watch(server)
        viewer.stream.say(steps(4), RATE)
        viewer.stream.finish()
        await asyncio.sleep(1)
        server.seconds = 1.0
        await asyncio.sleep(2)
        server.seconds = 0.03
        await asyncio.sleep(6)
        await viewer.close()
        return viewer

    viewer = simulate(work())
    assert (viewer.heard() == steps(4)).all()
    assert all(map(in_step, viewer.moments))
    gaps = np.diff([time for time, _ in viewer.taken])
    assert gaps.max() > 0.1
    assert gaps.min() > 0.9 * FRAME  # what is late moves the rest: nothing hurries after it
    assert [moment.due for moment in viewer.moments] == pytest.approx([time for time, _ in viewer.taken])


def test_a_slow_consumer_gets_every_sound_in_order_only_later() -> None:
    async def work() -> list[Moment]:
        stream = await LiveStream[str].open(
            SimulatedServer().client(), "ava", sample_rate=RATE, lead=0.08, format="raw"
        )
        stream.say(steps(2), RATE)
        stream.finish()
        stream.mark("end")
        taken: list[Moment] = []
        async for each in stream.moments():
            if isinstance(each, str):
                break
            taken.append(each)
            await asyncio.sleep(0.1)
        await stream.close()
        return taken

    taken = simulate(work())
    assert (np.concatenate([moment.sound for moment in taken if moment.sound is not None]) == steps(2)).all()
    assert all(map(in_step, taken))
    assert np.diff([moment.due for moment in taken][1:]).min() > 0.9 * FRAME


@settings(max_examples=40)
@given(
    rate=st.sampled_from([8_000, 16_000, 22_050, 24_000, 48_000]),
    cuts=st.lists(st.integers(0, 1000), max_size=8),
    pauses=st.lists(st.sampled_from([0.0, 0.0, 0.01, 0.1, 0.3]), min_size=9, max_size=9),
    slow=st.sampled_from([0.001, 0.03, 0.2]),
    lead=st.sampled_from([0.0, 0.08, np.inf]),
)
def test_however_sound_comes_all_of_it_is_heard_in_order_and_marks_are_where_they_were_set(
    rate: int, cuts: list[int], pauses: list[float], slow: float, lead: float
) -> None:
    said = steps(1, rate)

    async def work() -> Viewer:
        viewer = await watch(SimulatedServer(slow), lead, rate)
        for number, (packet, pause) in enumerate(
            zip(np.split(said, sorted(cut * rate // 1000 for cut in cuts)), pauses, strict=False)
        ):
            viewer.stream.say(packet, rate)
            viewer.stream.mark(f"{number}")
            await asyncio.sleep(pause)
        viewer.stream.finish()
        await asyncio.sleep(6)
        await viewer.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return viewer

    viewer = simulate(work())
    assert [each for _, each in viewer.taken if isinstance(each, str)] == [
        f"{number}" for number in range(len(cuts) + 1)
    ]
    heard = viewer.heard()
    assert heard[heard != 0].tolist() == said[said != 0].tolist()  # what is padded is silence
    out = 0
    ends = [*sorted(cut * rate // 1000 for cut in cuts), said.size]
    for _, each in viewer.taken:
        if isinstance(each, Moment) and each.sound is not None:
            out += int((each.sound != 0).sum())
        elif isinstance(each, str):
            assert out >= int((said[: ends[int(each)]] != 0).sum())
    indices = [moment.frame.index for moment in viewer.moments]
    assert indices == list(range(len(indices)))


def test_sound_at_another_rate_comes_out_at_the_streams() -> None:
    async def work() -> Viewer:
        viewer = await watch(SimulatedServer())
        for rate in (48_000, 16_000):
            viewer.stream.say(steps(1, rate), rate)
        viewer.stream.finish()
        await asyncio.sleep(4)
        await viewer.close()
        return viewer

    viewer = simulate(work())
    assert viewer.heard().size == 2 * RATE
    assert all(map(in_step, viewer.spoken))


def test_unusable_sound_is_refused_at_the_door_and_the_avatar_lives_on() -> None:
    async def work() -> Viewer:
        viewer = await watch(SimulatedServer())
        with pytest.raises(InvalidAudioError, match="NaN"):
            viewer.stream.say(np.full(100, np.nan), RATE)
        with pytest.raises(InvalidRequestError, match="sample rate"):
            viewer.stream.say(steps(1), 5)
        viewer.stream.say(steps(1), RATE)
        await asyncio.sleep(3)
        await viewer.close()
        return viewer

    assert (simulate(work()).heard() == steps(1)).all()


def test_who_listens_goes_on_listening_when_it_has_spoken() -> None:
    async def work() -> None:
        viewer = await watch(SimulatedServer())
        viewer.stream.listening = 1.0
        viewer.stream.say(steps(1), RATE)
        await asyncio.sleep(3)
        assert viewer.stream.listening == 1.0
        assert viewer.stream._stream is not None
        assert viewer.stream._stream.listening == 1.0
        with pytest.raises(InvalidRequestError, match="0 to 1"):
            viewer.stream.listening = 2
        await viewer.close()

    simulate(work())
