"""Pipecat's own pipeline, runner and output transport, with talksplat's real server."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from pipecat.frames.frames import (
    BotStartedSpeakingFrame,
    BotStoppedSpeakingFrame,
    ErrorFrame,
    Frame,
    InterruptionFrame,
    OutputAudioRawFrame,
    OutputImageRawFrame,
    StartFrame,
    TTSAudioRawFrame,
    TTSStartedFrame,
    TTSStoppedFrame,
    TTSTextFrame,
    UserStartedSpeakingFrame,
    UserStoppedSpeakingFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.tests.utils import SleepFrame, run_test
from pipecat.transports.base_output import BaseOutputTransport
from pipecat.transports.base_transport import TransportParams
from pipecat.workers.runner import WorkerRunner
from presence import Sound, flashes, loud, no_leaks, skews, speech, wait_until
from scripted_server import ScriptedServer
from simulated_server import SIDE, SimulatedServer
from webrtc_viewer import Viewer

from talksplat.server import Ports, Server
from talksplat_client import AsyncClient, ServerUnavailableError, Timeout, UnknownAvatarError
from talksplat_client.pipecat import TalksplatVideoService

RATE = 24_000  # Hz, Pipecat's
FRAME = 0.04
BUFFER = 0.04  # seconds of sound that the recording transport takes ahead


def spoken(sound: Sound, text: str = "word") -> list[Frame]:
    """What a synthesiser gives: two texts, each before its half, in packets of 20 ms."""
    halves = [
        [TTSAudioRawFrame(packet.tobytes(), RATE, 1) for packet in np.split(half, range(480, half.size, 480))]
        for half in np.split(sound, 2)
    ]
    texts = [TTSTextFrame(f"{text}{number}", text_type="word") for number in range(2)]
    return [TTSStartedFrame(), texts[0], *halves[0], texts[1], *halves[1], TTSStoppedFrame()]


async def through(service: TalksplatVideoService, frames: Sequence[Frame]) -> tuple[list[Frame], list[Frame]]:
    """What comes out downstream and upstream."""
    down, up = await asyncio.wait_for(run_test(service, frames_to_send=frames, start_timeout=10), 30)
    return list(down), list(up)


def said(frames: Sequence[Frame]) -> Sound:
    return np.frombuffer(b"".join(frame.audio for frame in frames if isinstance(frame, TTSAudioRawFrame)), np.int16)


def pts(frames: Sequence[Frame], kind: type[Frame]) -> list[int]:  # ns
    return [frame.pts for frame in frames if isinstance(frame, kind) and frame.pts is not None]


def screen(size: int) -> TransportParams:
    """As the service wants them."""
    return TransportParams(
        audio_out_enabled=True,
        audio_out_end_silence_secs=0,
        video_out_enabled=True,
        video_out_is_live=True,
        video_out_framerate=25,
        video_out_width=size,
        video_out_height=size,
    )


class RecordingTransport(BaseOutputTransport):
    """Pipecat's output transport, with a screen and a loudspeaker that write down what they are given, and when."""

    def __init__(self, size: int) -> None:
        super().__init__(screen(size))
        self.pictures: list[tuple[float, bytes]] = []
        self.sounds: list[tuple[float, Sound]] = []  # when each is heard, and 10 ms of it
        self._heard = 0.0  # all until then

    async def start(self, frame: StartFrame) -> None:
        await super().start(frame)
        await self.set_transport_ready(frame)

    async def write_video_frame(self, frame: OutputImageRawFrame) -> bool:
        self.pictures.append((time.monotonic(), frame.image))
        return True

    async def write_audio_frame(self, frame: OutputAudioRawFrame) -> bool:
        self._heard = max(self._heard, time.monotonic())
        for piece in np.split(np.frombuffer(frame.audio, np.int16), frame.num_frames // (RATE // 100)):
            self.sounds.append((self._heard, piece))
            self._heard += 0.01
        await asyncio.sleep(self._heard - time.monotonic() - BUFFER)
        return True


@asynccontextmanager
async def pipeline(*processors: FrameProcessor) -> AsyncIterator[PipelineWorker]:
    worker = PipelineWorker(Pipeline(list(processors)), cancel_on_idle_timeout=False, enable_rtvi=False)
    started = asyncio.Event()
    worker.add_event_handler("on_pipeline_started", lambda *_: started.set())
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)
    running = asyncio.create_task(runner.run())
    await asyncio.wait_for(started.wait(), 20)
    try:
        yield worker
    finally:
        await worker.cancel()
        await asyncio.wait_for(running, 20)


async def test_an_avatar_rests_between_turns_and_every_frame_comes_with_its_sound(server: Server) -> None:
    turns = [speech(1, RATE), speech(0.6, RATE)[::-1].copy()]
    async with no_leaks(), AsyncClient(server.grpc_url) as client:
        frames = [SleepFrame(0.5), *spoken(turns[0], "a"), SleepFrame(1.8), *spoken(turns[1], "b"), SleepFrame(1.5)]
        down, up = await through(TalksplatVideoService(client, "red"), frames)
    assert up == []
    assert (said(down) == np.concatenate(turns)).all()
    letters = {OutputImageRawFrame: "i", TTSAudioRawFrame: "a", TTSTextFrame: "t", TTSStartedFrame: "<"}
    order = "".join(letters.get(type(frame), ">") for frame in down)
    assert re.fullmatch(r"i{9,}<t(ia){12,13}t(ia){12,13}>i{9,}<t(ia){7,8}t(ia){7,8}>i{9,}", order)
    for picture, sound in itertools.pairwise(down):
        if isinstance(sound, TTSAudioRawFrame):
            assert sound.pts == picture.pts
            assert (sound.sample_rate, sound.num_channels) == (RATE, 1)
    gaps = np.diff(pts(down, OutputImageRawFrame)) / 1e9
    assert gaps.min() > 0.9 * FRAME  # in order, and no two for one moment
    assert np.median(gaps) == pytest.approx(FRAME)
    pictures = [frame for frame in down if isinstance(frame, OutputImageRawFrame)]
    assert {(frame.size, frame.format, len(frame.image)) for frame in pictures} == {((64, 64), "RGB", 64 * 64 * 3)}
    assert len({frame.image for frame in pictures}) > 20  # it moves


async def test_what_is_shown_and_what_is_heard_stay_together_in_pipecats_transport() -> None:
    transport = RecordingTransport(SIDE)
    server = SimulatedServer()
    async with (
        no_leaks(),
        server.client() as client,
        pipeline(TalksplatVideoService(client, "ava"), transport) as worker,
    ):
        apart: list[float] = []
        for seconds in (0.03, 0.1):
            server.seconds = seconds
            heard, seen = len(transport.sounds), len(transport.pictures)
            await worker.queue_frames(spoken(flashes(6, RATE)))
            await asyncio.sleep(2)
            levels = [(when, float(image[0])) for when, image in transport.pictures[seen:]]
            found = skews(transport.sounds[heard:], levels)
            assert found.size >= 5
            apart.extend(found)
        assert np.median(apart) <= 0.06  # of which up to 0.04 is the transport's own pace


async def test_an_interruption_silences_the_transport_at_once_and_the_next_turn_is_whole(server: Server) -> None:
    transport, speaking = RecordingTransport(64), Upstream()
    async with (
        no_leaks(),
        AsyncClient(server.grpc_url) as client,
        pipeline(speaking, TalksplatVideoService(client, "red"), transport) as worker,
    ):
        await worker.queue_frames(spoken(speech(8, RATE)))
        await wait_until(lambda: len(loud(transport.sounds)) > 80)
        assert BotStartedSpeakingFrame in speaking.kinds
        interrupted = time.monotonic()
        await worker.queue_frame(InterruptionFrame())
        await wait_until(lambda: BotStoppedSpeakingFrame in speaking.kinds)
        await asyncio.sleep(0.8)
        assert loud(transport.sounds)[-1] < interrupted + 0.5
        pictures = [when for when, _ in transport.pictures if when > interrupted]
        assert len(pictures) > 8  # it rests
        before = len(transport.sounds)
        await worker.queue_frames(spoken(speech(0.6, RATE)))
        await asyncio.sleep(1.5)
        heard = np.concatenate([sound for _, sound in transport.sounds[before:]])
        assert (np.trim_zeros(heard) == np.trim_zeros(speech(0.6, RATE))).all()


async def test_pipecats_own_webrtc_carries_the_avatar_to_a_viewer_and_an_interruption_too() -> None:
    smallwebrtc = pytest.importorskip("pipecat.transports.smallwebrtc.transport", reason="it wants OpenCV")
    viewer = Viewer()
    async with no_leaks(), SimulatedServer().client() as client:
        connection = smallwebrtc.SmallWebRTCConnection()
        await connection.initialize(**await viewer.offer())
        transport = smallwebrtc.SmallWebRTCTransport(connection, screen(SIDE))
        async with pipeline(TalksplatVideoService(client, "ava"), transport.output()) as worker:
            await viewer.accept(connection.get_answer())
            await connection.connect()
            await wait_until(lambda: len(viewer.pictures) > 5)
            assert not loud(viewer.sounds)
            await worker.queue_frames(spoken(speech(8, RATE)))
            await wait_until(lambda: len(loud(viewer.sounds)) > 20)
            interrupted = time.monotonic()
            await worker.queue_frame(InterruptionFrame())
            await asyncio.sleep(1.5)
            assert loud(viewer.sounds)[-1] < interrupted + 1
            assert {(picture.width, picture.height) for picture in viewer.pictures} == {(SIDE, SIDE)}
        await connection.disconnect()
        await viewer.close()


async def test_what_stands_after_an_interrupted_word_never_comes_unless_it_may_not_be_lost() -> None:
    kept = TTSTextFrame("kept", text_type="word")
    kept.interruptible = False
    async with no_leaks(), SimulatedServer().client() as client:
        frames = [*spoken(speech(4, RATE)), kept, SleepFrame(0.8), InterruptionFrame(), SleepFrame(0.5)]
        down, _ = await through(TalksplatVideoService(client, "ava"), frames)
    assert [frame.text for frame in down if isinstance(frame, TTSTextFrame)] == ["word0", "kept"]
    assert not any(isinstance(frame, TTSStoppedFrame) for frame in down)
    assert said(down).size < 1.2 * RATE


async def test_the_pipeline_ends_when_all_is_said() -> None:
    async with no_leaks(), SimulatedServer().client() as client:
        down, _ = await through(TalksplatVideoService(client, "ava"), spoken(speech(1, RATE)))  # then EndFrame, at once
    assert (said(down) == speech(1, RATE)).all()
    assert isinstance(down[-1], TTSStoppedFrame)


async def test_the_face_listens_while_the_user_speaks() -> None:
    async with SimulatedServer().client() as client:
        service = TalksplatVideoService(client, "ava")
        async with pipeline(service) as worker:
            stream = service._stream
            assert stream is not None
            await worker.queue_frame(UserStartedSpeakingFrame())
            await wait_until(lambda: stream.listening == 1)
            await worker.queue_frame(UserStoppedSpeakingFrame())
            await wait_until(lambda: stream.listening == 0)


@pytest.mark.parametrize("avatar", ["nobody", "red"])
async def test_without_a_face_the_voice_goes_on_and_the_pipeline_is_told_why(server: Server, avatar: str) -> None:
    url = server.grpc_url if avatar == "nobody" else f"127.0.0.1:{Ports.free().grpc}"
    async with no_leaks(), AsyncClient(url, timeout=Timeout(connect=0.5)) as client:
        service = TalksplatVideoService(client, avatar)
        errors = Upstream()
        async with pipeline(errors, service):
            await wait_until(lambda: ErrorFrame in errors.kinds)
        [error] = [frame for frame in errors.frames if isinstance(frame, ErrorFrame)]
        assert isinstance(error.exception, UnknownAvatarError if avatar == "nobody" else ServerUnavailableError)
        assert not service.is_usable
        down, _ = await through(TalksplatVideoService(client, avatar), spoken(speech(0.4, RATE)))
    assert (said(down) == speech(0.4, RATE)).all()
    assert [type(frame) for frame in down] == [type(frame) for frame in spoken(speech(0.4, RATE))]


async def test_a_server_that_is_lost_takes_the_face_and_leaves_the_voice() -> None:
    with ScriptedServer() as server:
        async with no_leaks(), AsyncClient(server.url, timeout=Timeout(recovery=0.2)) as client:
            service, errors, transport = TalksplatVideoService(client, "ava", size=8), Upstream(), RecordingTransport(8)
            async with pipeline(errors, service, transport) as worker:
                server.stop()
                await wait_until(lambda: ErrorFrame in errors.kinds)
                assert isinstance(errors.frames[-1].exception, ServerUnavailableError)
                await worker.queue_frames(spoken(speech(0.4, RATE)))
                await wait_until(lambda: len(loud(transport.sounds)) > 10)


class Upstream(FrameProcessor):
    """Before the others, sees what comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[Any] = []

    @property
    def kinds(self) -> list[type]:
        return [type(frame) for frame in self.frames]

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if direction is FrameDirection.UPSTREAM:
            self.frames.append(frame)
        await self.push_frame(frame, direction)
