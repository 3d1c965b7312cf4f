"""aiortc's own connections with talksplat's real server, and ten minutes of drifting clocks in simulated time."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from aiortc.mediastreams import MediaStreamError
from simulated_server import THE_CLOCK, SimulatedServer, simulate

from talksplat_client.webrtc import SAMPLE_RATE, AvatarTracks

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
        time = asyncio.get_running_loop().time  # the frames' clock
        tracks = await AvatarTracks.load(SimulatedServer().client(), "ava")
        heard: list[tuple[float, float, float]] = []  # when, pts, and how loud
        seen: list[tuple[float, float, float]] = []  # when, pts, and how bright

        async def speak() -> None:  # live, by the clock of some far microphone
            for number, packet in enumerate(np.split(said, 10 * 60 * minutes)):
                await asyncio.sleep(max(0.0, 0.1 * number * (1 - drift) - time()))
                tracks.say(packet, SAMPLE_RATE)

        async def listen() -> None:  # by the clock of a loudspeaker
            for number in range(round((60 * minutes + 2) / PACKET)):
                await asyncio.sleep(max(0.0, number * PACKET * (1 + drift) - time()))
                packet = await tracks.audio.recv()
                assert packet.pts is not None
                heard.append((time(), packet.pts / SAMPLE_RATE, packet.to_ndarray()[0, packet.samples // 2]))

        async def look() -> None:
            while True:
                picture = await tracks.video.recv()
                assert picture.time is not None
                seen.append((time(), picture.time, bytes(picture.planes[0])[0]))

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
    assert np.diff(heard[:, 1]) == pytest.approx(PACKET)  # no sound is missing
    levels = np.interp(seen[:, 1], heard[:, 1], heard[:, 2]) / 32768
    shown = (seen[:, 2] - 16) / 219 * 2 - 1  # limited range
    assert np.abs(levels - shown).max() < 0.03  # each frame is that of its sound
    assert np.count_nonzero(heard[:, 2]) >= 0.999 * np.count_nonzero(said[480::960])
    drifted = abs(heard[-1, 0] - heard[-1, 1]) - abs(heard[50, 0] - heard[50, 1])
    assert drift < 0 or drifted > 0.04  # a loudspeaker that is late would be 60 ms behind frames by themselves
