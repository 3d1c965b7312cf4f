"""LiveKit's own runner, sources, synchroniser and session, with talksplat's real server; the room alone is a fake.

LiveKit's server, without which there is no room, is a program in Go that no package carries.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from livekit import rtc
from livekit.agents import Agent, AgentSession, ErrorEvent
from livekit.agents.voice.avatar import AudioSegmentEnd, AvatarRunner, QueueAudioOutput
from presence import Sound, flashes, loud, no_leaks, skews, speech, wait_until
from scripted_server import ScriptedServer
from simulated_server import SimulatedServer, simulate

from talksplat.server import Ports, Server
from talksplat_client import AsyncClient, ServerUnavailableError, Timeout, UnknownAvatarError
from talksplat_client.livekit import SAMPLE_RATE, AvatarSession, VideoGenerator

FRAME = 0.04


class FakeRoom(rtc.EventEmitter[Any]):
    """A room with nobody else in it: tracks are published to a viewer and a listener in this process."""

    name = "fake"

    def __init__(self) -> None:
        super().__init__()
        self.local_participant = FakeParticipant(self)
        self.remote_participants: dict[str, Any] = {}

    def isconnected(self) -> bool:
        return True


class FakeParticipant:
    identity = "agent"
    kind = rtc.ParticipantKind.PARTICIPANT_KIND_AGENT

    def __init__(self, room: FakeRoom) -> None:
        self._room = room
        self.track_publications: dict[str, FakePublication] = {}
        self.pictures: list[tuple[float, rtc.VideoFrame]] = []  # when, and what
        self.sounds: list[tuple[float, Sound]] = []  # 10 ms each
        self._tasks: list[asyncio.Task[None]] = []

    async def publish_track(self, track: Any, options: rtc.TrackPublishOptions) -> FakePublication:
        if track.kind == rtc.TrackKind.KIND_VIDEO:
            assert options.source == rtc.TrackSource.SOURCE_CAMERA
            self._tasks.append(asyncio.create_task(self._look(rtc.VideoStream.from_track(track=track))))
        else:
            assert options.source == rtc.TrackSource.SOURCE_MICROPHONE
            stream = rtc.AudioStream.from_track(track=track, sample_rate=SAMPLE_RATE, num_channels=1)
            self._tasks.append(asyncio.create_task(self._listen(stream)))
        publication = self.track_publications[str(track.kind)] = FakePublication(track)
        self._room.emit("local_track_published", publication, track)
        return publication

    async def leave(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _look(self, stream: rtc.VideoStream) -> None:
        try:
            async for event in stream:
                self.pictures.append((time.monotonic(), event.frame))
        finally:
            await stream.aclose()

    async def _listen(self, stream: rtc.AudioStream) -> None:
        try:
            async for event in stream:
                self.sounds.append((time.monotonic(), np.array(event.frame.data)))
        finally:
            await stream.aclose()


class FakePublication:
    def __init__(self, track: Any) -> None:
        self.track, self.kind, self.sid = track, track.kind, str(track.kind)

    async def wait_for_subscription(self) -> None:
        pass


async def stream(sound: Sound) -> AsyncIterator[rtc.AudioFrame]:
    for packet in packets(sound):
        yield packet


def packets(sound: Sound) -> list[rtc.AudioFrame]:  # of 20 ms
    size = SAMPLE_RATE // 50
    return [
        rtc.AudioFrame(sound[begin : begin + size].tobytes(), SAMPLE_RATE, 1, sound[begin : begin + size].size)
        for begin in range(0, sound.size, size)
    ]


async def test_an_agent_speaks_through_its_face_is_interrupted_and_speaks_again(server: Server) -> None:
    room = FakeRoom()
    me = room.local_participant
    async with no_leaks(), AsyncClient(server.grpc_url) as client:
        session = AgentSession[None]()
        face = AvatarSession(client, "red")
        await face.start(session, room)  # type: ignore[arg-type]  # the fake
        await face.wait_for_join(timeout=20)
        assert face.avatar_identity == me.identity
        assert session.output.audio is not None
        await session.start(Agent(instructions=""))
        events: list[tuple[float, Any]] = []
        session.output.audio.on("playback_started", lambda event: events.append((time.monotonic(), event)))
        session.output.audio.on("playback_finished", lambda event: events.append((time.monotonic(), event)))

        await wait_until(lambda: len(me.pictures) >= 12)
        assert not events
        assert not loud(me.sounds)
        first = session.say("hello", audio=stream(speech(1.5, SAMPLE_RATE)))
        await first
        assert not first.interrupted
        [(started, _), (finished, event)] = events
        assert (event.playback_position, event.interrupted) == (pytest.approx(1.5, abs=FRAME), False)
        assert started <= loud(me.sounds)[0] + 0.1
        assert loud(me.sounds)[-1] <= finished + 0.1

        events.clear()
        resting = len(me.pictures)
        second = session.say("hello", audio=stream(flashes(50, SAMPLE_RATE)))
        await wait_until(lambda: len(events) == 1 and loud(me.sounds)[-1] > events[0][0] + 0.5)
        interrupted = time.monotonic()
        await session.interrupt()
        await second
        assert second.interrupted
        [_, (_, event)] = events
        assert event.interrupted
        assert 0.4 < event.playback_position < 5
        await asyncio.sleep(0.8)
        assert loud(me.sounds)[-1] < interrupted + 0.5  # silence

        before = len(loud(me.sounds))
        await session.say("hello", audio=stream(speech(0.5, SAMPLE_RATE)))
        await asyncio.sleep(0.2)
        assert len(loud(me.sounds)) > before
        pictures = len(me.pictures)
        await wait_until(lambda: len(me.pictures) > pictures + 3)  # it rests again
        assert np.median(np.diff([when for when, _ in me.pictures[:resting]])) == pytest.approx(FRAME, abs=0.01)
        assert {(picture.width, picture.height) for _, picture in me.pictures} == {(64, 64)}
        await session.aclose()
        await face.aclose()
        await me.leave()


async def test_what_is_seen_and_what_is_heard_stay_together_though_the_server_is_late() -> None:
    room = FakeRoom()
    me = room.local_participant
    server = SimulatedServer()
    async with no_leaks(), server.client() as client:
        generator = await VideoGenerator.open(client, "ava")
        voice = QueueAudioOutput(sample_rate=SAMPLE_RATE, wait_playback_start=True)
        runner = AvatarRunner(
            room,  # type: ignore[arg-type]  # the fake
            audio_recv=voice,
            video_gen=generator,
            options=generator.options,
        )
        generator.av_sync = runner.av_sync
        await runner.start()
        apart: list[float] = []
        for seconds in (0.03, 0.1, 0.2, 0.03):
            server.seconds = seconds
            heard, seen = len(me.sounds), len(me.pictures)
            for packet in packets(flashes(6, SAMPLE_RATE)):
                await voice.capture_frame(packet)
            voice.flush()
            await voice.wait_for_playout()
            await asyncio.sleep(0.2)
            levels = [(when, float(picture.data[0])) for when, picture in me.pictures[seen:]]
            found = skews(me.sounds[heard:], levels)
            assert found.size >= 5
            apart.extend(found)
        assert np.median(apart) <= 0.045
        await runner.aclose()
        await generator.aclose()
        await me.leave()


def test_each_frame_comes_before_its_sound_and_a_segment_ends_after_its_last() -> None:
    said = flashes(6, SAMPLE_RATE)

    async def work() -> list[Any]:
        generator = await VideoGenerator.open(SimulatedServer().client(), "ava")
        outputs: list[Any] = []

        async def take() -> None:
            outputs.extend([output async for output in generator])

        taking = asyncio.create_task(take())
        for _ in range(2):  # in a row
            for packet in packets(said):
                await generator.push_audio(packet)
            await generator.push_audio(AudioSegmentEnd())
        await asyncio.sleep(4)
        await generator.aclose()
        await taking
        return outputs

    outputs = simulate(work())
    ends = [number for number, output in enumerate(outputs) if isinstance(output, AudioSegmentEnd)]
    assert len(ends) == 2
    for begin, end in itertools.pairwise([0, *ends]):
        sounds = [number for number in range(begin, end) if isinstance(outputs[number], rtc.AudioFrame)]
        assert all(isinstance(outputs[number - 1], rtc.VideoFrame) for number in sounds)
        assert (np.concatenate([np.array(outputs[number].data) for number in sounds]) == said).all()
        assert sounds[-1] == end - 1
        assert np.diff(sounds).tolist() == [2] * (len(sounds) - 1)
    pictures = [output for output in outputs if isinstance(output, rtc.VideoFrame)]
    assert {picture.type for picture in pictures} == {rtc.VideoBufferType.RGB24}
    assert isinstance(outputs[-1], rtc.VideoFrame)


class FakeSynchronizer:
    """Keeps what it is given, after a moment. When a test says that it is full, pictures wait until it is cleared."""

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.room = asyncio.Event()
        self.room.set()

    async def push(self, output: Any) -> None:
        if isinstance(output, rtc.VideoFrame):
            await self.room.wait()
        else:
            await asyncio.sleep(0.001)
        self.kept.append(output)

    async def clear_queue(self) -> None:
        self.kept.clear()
        asyncio.get_running_loop().call_later(0.001, self.room.set)


def test_nothing_of_what_was_interrupted_is_heard_after_it_also_not_what_was_waiting_for_room() -> None:
    async def work() -> None:
        generator = await VideoGenerator.open(SimulatedServer().client(), "ava")
        synchronizer = FakeSynchronizer()
        generator.av_sync = synchronizer  # type: ignore[assignment]  # the fake

        async def take() -> None:
            async for output in generator:
                await synchronizer.push(output)

        taking = asyncio.create_task(take())
        for packet in packets(flashes(20, SAMPLE_RATE)):
            await generator.push_audio(packet)
        await asyncio.sleep(1)
        assert any(isinstance(output, rtc.AudioFrame) for output in synchronizer.kept)
        synchronizer.room.clear()
        await asyncio.sleep(0.2)
        await generator.clear_buffer()
        await asyncio.sleep(0.2)
        assert synchronizer.kept
        assert not any(isinstance(output, rtc.AudioFrame) for output in synchronizer.kept)
        await generator.aclose()
        await taking

    simulate(work())


def test_after_an_interruption_there_are_pictures_for_all_the_time_though_the_server_is_late() -> None:
    async def work() -> float:
        server = SimulatedServer()
        generator = await VideoGenerator.open(server.client(), "ava")
        generator.av_sync = FakeSynchronizer()  # type: ignore[assignment]  # the fake
        pictures = 0

        async def take() -> None:
            nonlocal pictures
            async for output in generator:
                pictures += isinstance(output, rtc.VideoFrame)

        taking = asyncio.create_task(take())
        for packet in packets(flashes(20, SAMPLE_RATE)):
            await generator.push_audio(packet)
        await asyncio.sleep(1)
        await generator.clear_buffer()
        shown = pictures
        server.seconds = 0.25
        await asyncio.sleep(2)
        await generator.aclose()
        await taking
        return (pictures - shown) * FRAME

    assert simulate(work()) == pytest.approx(2, abs=1.1 * FRAME)


async def test_sound_in_stereo_and_at_another_rate_comes_out_as_announced() -> None:
    server = SimulatedServer(0.001)
    async with server.client() as client:
        generator = await VideoGenerator.open(client, "ava")
        stereo = np.full((48_000 // 5, 2), 5_000, np.int16)
        await generator.push_audio(rtc.AudioFrame(stereo.tobytes(), 48_000, 2, len(stereo)))
        await generator.push_audio(AudioSegmentEnd())
        sounds: list[rtc.AudioFrame] = []
        async for output in generator:
            if isinstance(output, AudioSegmentEnd):
                break
            if isinstance(output, rtc.AudioFrame):
                sounds.append(output)
        await generator.aclose()
    assert {(sound.sample_rate, sound.num_channels) for sound in sounds} == {(SAMPLE_RATE, 1)}
    assert sum(sound.duration for sound in sounds) == pytest.approx(0.2)


async def test_an_unknown_avatar_and_an_absent_server_are_told_at_the_start(server: Server) -> None:
    session = AgentSession[None]()
    async with AsyncClient(server.grpc_url) as client:
        with pytest.raises(UnknownAvatarError):
            await AvatarSession(client, "nobody").start(session, FakeRoom())  # type: ignore[arg-type]
    async with AsyncClient(f"127.0.0.1:{Ports.free().grpc}", timeout=Timeout(connect=0.5)) as client:
        with pytest.raises(ServerUnavailableError):
            await AvatarSession(client, "red").start(session, FakeRoom())  # type: ignore[arg-type]
    assert session.output.audio is None


async def test_an_agent_whose_face_is_taken_away_waits_for_nothing() -> None:
    room = FakeRoom()
    async with no_leaks(), SimulatedServer().client() as client:
        session = AgentSession[None]()
        face = AvatarSession(client, "ava")
        await face.start(session, room)  # type: ignore[arg-type]
        await session.start(Agent(instructions=""))
        speaking = session.say("hello", audio=stream(speech(8, SAMPLE_RATE)))
        await wait_until(lambda: len(loud(room.local_participant.sounds)) > 10)
        await face.aclose()
        await asyncio.wait_for(speaking.wait_for_playout(), 4)
        await asyncio.wait_for(session.say("hello", audio=stream(speech(2, SAMPLE_RATE))).wait_for_playout(), 4)
        await session.aclose()
        await room.local_participant.leave()


async def test_an_agent_whose_server_is_lost_is_told_and_waits_for_nothing() -> None:
    room = FakeRoom()
    with ScriptedServer() as server:
        async with no_leaks(), AsyncClient(server.url, timeout=Timeout(recovery=0.3)) as client:
            session = AgentSession[None]()
            face = AvatarSession(client, "ava", size=8)
            await face.start(session, room)  # type: ignore[arg-type]
            await session.start(Agent(instructions=""))
            errors: list[ErrorEvent] = []
            session.on("error", errors.append)
            server.stop()
            await asyncio.wait_for(session.say("hello", audio=stream(speech(2, SAMPLE_RATE))).wait_for_playout(), 20)
            await wait_until(lambda: bool(errors))
            assert isinstance(errors[0].error, ServerUnavailableError)
            assert errors[0].source is face
            await session.aclose()
            await face.aclose()
            await room.local_participant.leave()
