"""aiortc's own connections with talksplat's real server, and ten minutes of drifting clocks in simulated time."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from typing import Any

import numpy as np
import pytest
from aiortc import MediaStreamTrack, RTCPeerConnection
from aiortc.contrib.media import MediaBlackhole
from aiortc.mediastreams import MediaStreamError
from presence import loud, no_leaks, wait_until
from scripted_server import ScriptedServer
from simulated_server import THE_CLOCK, SimulatedServer, simulate
from webrtc_viewer import Viewer

from talksplat.server import Ports, Server
from talksplat_client import AsyncClient, ServerUnavailableError, Timeout, UnknownAvatarError
from talksplat_client.webrtc import SAMPLE_RATE, AvatarTracks, prefer_h264

FRAME = 1 / THE_CLOCK.fps
PACKET = 0.02


Table = np.ndarray[Any, np.dtype[np.float64]]


def steps(seconds: float) -> np.ndarray[Any, np.dtype[np.int16]]:
    """Sound that is constant for the time of a frame, and another level in each."""
    levels = np.random.default_rng(5).integers(-20_000, 20_000, round(seconds / FRAME))
    return np.repeat(levels, SAMPLE_RATE // THE_CLOCK.fps).astype(np.int16)


@pytest.mark.parametrize(("minutes", "drift"), [(10, 100e-6), (1, -1000e-6)])  # 60 ms in the end
def test_sound_and_picture_stay_together_for_ten_minutes_though_their_clocks_drift_apart(
    minutes: int, drift: float
) -> None:
    said = steps(60 * minutes)

    async def work() -> tuple[Table, Table]:
        now = asyncio.get_running_loop().time  # the frames' clock
        tracks = await AvatarTracks.load(SimulatedServer().client(), "ava")
        heard: list[tuple[float, float, float]] = []  # when, pts, and how loud
        seen: list[tuple[float, float, float]] = []  # when, pts, and how bright

        async def speak() -> None:  # live, by the clock of some far microphone
            for number, packet in enumerate(np.split(said, 10 * 60 * minutes)):
                await asyncio.sleep(max(0.0, 0.1 * number * (1 - drift) - now()))
                tracks.say(packet, SAMPLE_RATE)

        async def listen() -> None:  # by the clock of a loudspeaker, which begins when speech is under way
            begin = 0.0
            for number in range(-50, round((60 * minutes + 1) / PACKET)):
                begin = begin if number > 0 else now()
                await asyncio.sleep(max(0.0, begin + max(0, number) * PACKET * (1 + drift) - now()))
                packet = await tracks.audio.recv()
                assert packet.pts is not None
                heard.append((now(), packet.pts / SAMPLE_RATE, packet.to_ndarray()[0, packet.samples // 2]))

        async def look() -> None:
            while True:
                picture = await tracks.video.recv()
                assert picture.time is not None
                seen.append((now(), picture.time, bytes(picture.planes[0])[0]))

        looking = asyncio.create_task(look())
        await asyncio.gather(speak(), listen())
        await tracks.close()
        with pytest.raises(MediaStreamError):
            await looking
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return np.array(heard), np.array(seen)

    heard, seen = simulate(work())
    assert len(seen) >= 60 * minutes * THE_CLOCK.fps
    playing = np.interp(seen[:, 0], heard[:, 0], heard[:, 1])  # the position in the sound as each frame is shown
    assert np.abs(playing - seen[:, 1]).max() <= 0.045
    assert np.allclose(np.diff(heard[:, 1]), PACKET)  # no sound is missing
    levels = np.interp(seen[:, 1], heard[:, 1], heard[:, 2]) / 32768
    shown = (seen[:, 2] - 16) / 219 * 2 - 1  # limited range
    assert np.abs(levels - shown).max() < 0.03  # each frame is that of its sound
    assert np.count_nonzero(heard[:, 2]) >= 0.999 * np.count_nonzero(said[480::960])
    drifted = abs(heard[-1, 0] - heard[-1, 1]) - abs(heard[50, 0] - heard[50, 1])
    assert drift < 0 or drifted > 0.04  # a loudspeaker that is late would be 60 ms behind frames by themselves


async def connect(tracks: AvatarTracks, viewer: Viewer) -> RTCPeerConnection:
    """The sending end."""
    sending = RTCPeerConnection()
    sending.addTrack(tracks.video)
    sending.addTrack(tracks.audio)
    prefer_h264(sending)
    await sending.setLocalDescription(await sending.createOffer())
    await viewer.connection.setRemoteDescription(sending.localDescription)
    await viewer.connection.setLocalDescription(await viewer.connection.createAnswer())
    await sending.setRemoteDescription(viewer.connection.localDescription)
    return sending


async def play(track: MediaStreamTrack) -> None:
    while True:
        await track.recv()


async def test_a_viewer_gets_h264_with_growing_pts_and_the_sound_that_was_said(server: Server) -> None:
    tone = (8_000 * np.sin(2 * np.pi * 440 / SAMPLE_RATE * np.arange(SAMPLE_RATE))).astype(np.int16)  # a second
    async with no_leaks(), AsyncClient(server.grpc_url) as client:
        tracks, viewer = await AvatarTracks.load(client, "red"), Viewer()
        sending = await connect(tracks, viewer)
        payload = re.search(r"^m=video \d+ \S+ (\d+)", viewer.connection.localDescription.sdp, re.MULTILINE)
        assert payload is not None
        assert f"a=rtpmap:{payload[1]} H264/90000" in viewer.connection.localDescription.sdp

        await wait_until(lambda: len(viewer.pictures) > 5)
        assert not loud(viewer.sounds)
        tracks.say(tone, SAMPLE_RATE)
        tracks.finish()
        await wait_until(lambda: len(loud(viewer.sounds)) >= 50)  # packets of 20 ms
        await asyncio.sleep(0.5)
        assert len(loud(viewer.sounds)) <= 53  # Opus rings a little

        for _ in range(20):
            tracks.say(tone, SAMPLE_RATE)
        await wait_until(lambda: len(loud(viewer.sounds)) > 80)
        interrupted = time.monotonic()
        await tracks.interrupt()
        await asyncio.sleep(1.5)
        assert loud(viewer.sounds)[-1] < interrupted + 1

        pts = [picture.pts for picture in viewer.pictures if picture.pts is not None]
        assert np.diff(pts).min() > 0
        assert np.median(np.diff(pts)) == 90_000 / THE_CLOCK.fps
        assert {(picture.width, picture.height, picture.format.name) for picture in viewer.pictures} == {
            (64, 64, "yuv420p")
        }
        red, green, blue = viewer.pictures[-1].to_ndarray(format="rgb24")[24:40, 24:40].mean((0, 1))
        assert red > 1.5 * max(green, blue)
        await tracks.close()
        await sending.close()
        await viewer.close()
        with pytest.raises(MediaStreamError):
            await tracks.video.recv()
        with pytest.raises(MediaStreamError):
            await tracks.audio.recv()


async def test_an_unknown_avatar_and_an_absent_server_are_told_at_once(server: Server) -> None:
    async with AsyncClient(server.grpc_url) as client:
        with pytest.raises(UnknownAvatarError):
            await AvatarTracks.load(client, "nobody")
    async with AsyncClient(f"127.0.0.1:{Ports.free().grpc}", timeout=Timeout(connect=0.5)) as client:
        with pytest.raises(ServerUnavailableError):
            await AvatarTracks.load(client, "red")


async def test_tracks_end_when_the_server_is_lost_and_who_speaks_is_told_why() -> None:
    with ScriptedServer() as server:
        async with AsyncClient(server.url, timeout=Timeout(recovery=0.2)) as client:
            tracks = await AvatarTracks.load(client, "ava", size=8)
            await tracks.audio.recv()
            server.stop()
            with pytest.raises(MediaStreamError):
                await asyncio.wait_for(play(tracks.audio), 10)
            assert tracks.video.readyState == "ended"
            with pytest.raises(ServerUnavailableError):
                tracks.say(steps(1), SAMPLE_RATE)
            await tracks.close()


def test_a_recv_that_is_cancelled_loses_nothing_and_the_tracks_live_on() -> None:
    async def work() -> tuple[list[int], list[int]]:
        tracks = await AvatarTracks.load(SimulatedServer().client(), "ava")
        tracks.say(steps(2), SAMPLE_RATE)
        tracks.finish()
        blackhole = MediaBlackhole()  # stops by a cancellation, as a wait_for that is out of time
        blackhole.addTrack(tracks.video)
        await blackhole.start()
        heard: list[Any] = []
        while len(heard) < 150:
            with contextlib.suppress(TimeoutError):
                heard.append(await asyncio.wait_for(tracks.audio.recv(), 0.007))
            if len(heard) == 100:
                await blackhole.stop()
        assert (await tracks.video.recv()).pts is not None
        await tracks.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        loud = np.concatenate([packet.to_ndarray()[0] for packet in heard])
        return [packet.pts or 0 for packet in heard], np.trim_zeros(loud).tolist()

    pts, loud = simulate(work())
    assert np.diff(pts).tolist() == [PACKET * SAMPLE_RATE] * 149
    assert loud == steps(2).tolist()


def test_the_stream_ends_when_its_connection_stops_the_tracks() -> None:
    async def work() -> None:
        tracks = await AvatarTracks.load(SimulatedServer().client(), "ava")
        tracks.say(steps(2), SAMPLE_RATE)
        for _ in range(50):
            await tracks.audio.recv()
        tracks.audio.stop()  # as aiortc's sender does at its end
        await asyncio.sleep(0.1)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    simulate(work())


def test_frames_that_nobody_takes_in_time_are_left_out() -> None:
    async def work() -> float:
        tracks = await AvatarTracks.load(SimulatedServer().client(), "ava")
        for _ in range(100):  # two seconds
            await tracks.audio.recv()
        picture = await tracks.video.recv()
        await tracks.close()
        return float(picture.time or 0)

    assert 1.9 < simulate(work()) < 2
