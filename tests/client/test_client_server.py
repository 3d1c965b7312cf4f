"""The client against the real server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr
from make_avatar import write_avatar

from talksplat.server import Ports, Server
from talksplat_client import (
    AsyncClient,
    Client,
    Frame,
    InvalidAudioError,
    InvalidRequestError,
    Retry,
    ServerUnavailableError,
    StreamState,
    Timeout,
    UnknownAvatarError,
    read_audio,
)
from talksplat_client._audio import Samples

RATE = 16_000
SPEECH = Path(__file__).resolve().parents[2] / "demo" / "speech.wav"
AVATAR = "red"


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    """A client; whatever the test sent, the server is healthy after it."""
    with Client(server.grpc_url) as client:
        yield client
        [health] = client.health()
        assert health.ready, health.detail
        assert len(list(client.animate(np.zeros(640, np.float32), avatar=AVATAR))) == 1


@pytest.fixture(scope="module")
def speech() -> Samples:
    """Three seconds of the demo's recording, 16 kHz."""
    recording = read_audio(SPEECH)
    samples = np.concatenate(list(recording.packets))
    return np.asarray(soxr.resample(samples, recording.sample_rate, RATE)[: 3 * RATE], np.float32)


@pytest.fixture(scope="module")
def frames(server: Server, speech: Samples) -> list[Frame]:
    """What `speech` looks like."""
    with Client(server.grpc_url) as client:
        return list(client.animate(speech, avatar=AVATAR))


def test_speech_becomes_pictures_in_which_the_mouth_moves(frames: list[Frame]) -> None:
    assert [frame.index for frame in frames] == list(range(75))
    assert all(frame.to_array().shape == (64, 64, 3) for frame in frames)
    assert max(frame.speech for frame in frames) > 0.5
    assert len({frame.data for frame in frames}) > 50


@pytest.mark.parametrize("size", [160, 999, 7_000])
def test_other_packet_sizes_give_the_same_frames(
    client: Client, speech: Samples, frames: list[Frame], size: int
) -> None:
    packets = (speech[i : i + size] for i in range(0, speech.size, size))
    assert list(client.animate(packets, avatar=AVATAR)) == frames


@pytest.mark.parametrize("cut", [1, 4, 30, 74])
def test_a_stream_that_is_cut_goes_on_elsewhere_with_the_same_frames(
    server: Server, speech: Samples, frames: list[Frame], cut: int
) -> None:
    source = iter(np.array_split(speech, 50))
    with Client(server.grpc_url) as client, client.animate(source, avatar=AVATAR) as stream:
        before = [next(stream) for _ in range(cut)]
        stream.cancel()
        state = stream.state.to_bytes()
    with Client(server.grpc_url) as fresh:
        assert before + list(fresh.resume(source, StreamState.from_bytes(state))) == frames


async def test_the_asyncio_twin_gives_the_same(server: Server, speech: Samples, frames: list[Frame]) -> None:
    async with AsyncClient(server.grpc_url) as client:
        assert [frame async for frame in await client.animate(speech, avatar=AVATAR)] == frames
        assert AVATAR in {avatar.id for avatar in await client.avatars()}
        with pytest.raises(UnknownAvatarError):
            await client.preload("nobody")
        many = await asyncio.gather(*(_watch(client, speech[:RATE]) for _ in range(3)))
    assert many == [many[0]] * 3


async def _watch(client: AsyncClient, audio: Samples) -> list[Frame]:
    return [frame async for frame in await client.animate(audio, avatar=AVATAR)]


def test_frames_look_as_asked(client: Client, speech: Samples) -> None:
    audio = speech[:RATE]
    [raw, *_] = client.animate(audio, avatar=AVATAR, format="raw")
    assert raw.to_array().shape == (64, 64, 3)
    [small, *_] = client.animate(audio, avatar=AVATAR, size=32)
    assert small.to_array().shape == (32, 32, 3)
    [coarse, *_], [fine, *_] = (client.animate(audio, avatar=AVATAR, quality=quality) for quality in (10, 95))
    assert len(coarse.data) < len(fine.data)
    assert list(client.animate(audio, avatar=AVATAR, seed=1)) != list(client.animate(audio, avatar=AVATAR, seed=3))


def as_rate(speech: Samples, rate: int) -> Samples:
    return np.asarray(soxr.resample(speech, RATE, rate), np.float32)


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_sound_of_any_rate_is_animated(client: Client, speech: Samples, frames: list[Frame], rate: int) -> None:
    packets = np.array_split(as_rate(speech, rate), 20)
    found = list(client.animate(packets, avatar=AVATAR, sample_rate=rate))
    assert len(found) == len(frames)
    assert [frame.speech for frame in found] == pytest.approx([frame.speech for frame in frames], abs=0.5)


def test_int16_stereo_and_bytes_are_animated(client: Client, speech: Samples, frames: list[Frame]) -> None:
    whole = np.round(speech * 32767).astype(np.int16)
    found = [
        list(client.animate(audio, avatar=AVATAR))
        for audio in (whole, whole.tobytes(), np.stack([whole, whole], axis=1))
    ]
    assert found[1:] == [found[0]] * 2
    assert [frame.index for frame in found[0]] == [frame.index for frame in frames]


def test_clipped_sound_is_animated(client: Client, speech: Samples) -> None:
    loud = speech / np.abs(speech).max() * 4
    clipped = np.clip(loud, -1, 1)
    assert list(client.animate(loud, avatar=AVATAR)) == list(client.animate(clipped, avatar=AVATAR))


@pytest.mark.parametrize(("seconds", "count"), [(0, 0), (0.01, 1), (0.04, 1), (0.041, 2)])
def test_shortest_sound(client: Client, speech: Samples, seconds: float, count: int) -> None:
    audio = speech[: round(seconds * RATE)]
    assert len(list(client.animate(audio, avatar=AVATAR))) == count
    assert isinstance(client.transcribe(audio), str)
    utterances = list(client.speech_to_animation(audio, avatar=AVATAR))
    assert sum(len(utterance.frames) for utterance in utterances) == count


def test_nan_is_refused(client: Client, speech: Samples) -> None:
    bad = speech.copy()
    bad[5_000] = np.nan
    with pytest.raises(InvalidAudioError, match="NaN"):
        list(client.animate(bad, avatar=AVATAR))
    with pytest.raises(InvalidAudioError, match="NaN"):
        client.transcribe(bad)


def test_an_unknown_avatar_is_an_error_of_its_own(client: Client, speech: Samples) -> None:
    with pytest.raises(UnknownAvatarError, match="nobody") as caught:
        list(client.animate(speech, avatar="nobody"))
    assert caught.value.state is not None
    assert caught.value.state.frame == 0
    for wrong in ("nobody", "../red", "a/b", "x" * 100):
        with pytest.raises(UnknownAvatarError):
            client.preload(wrong)
        with pytest.raises(UnknownAvatarError):
            list(client.speech_to_animation(speech, avatar=wrong))


@pytest.mark.parametrize("options", [{"size": 12}, {"size": 4096}])
def test_what_only_the_server_can_judge_is_refused_by_it(
    client: Client, speech: Samples, options: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequestError, match="size"):
        list(client.animate(speech, avatar=AVATAR, **options))


def test_avatars_are_listed_loaded_and_unloaded(client: Client) -> None:
    def loaded() -> dict[str, bool]:
        return {avatar.id: avatar.loaded for avatar in client.avatars()}

    client.preload("green")
    assert loaded()["green"]
    report = client.preload("green")
    assert (report.cached, report.width, report.height) == (True, 64, 64)
    client.unload("green")
    assert not loaded()["green"]


def test_speech_has_its_words(client: Client) -> None:
    recording = read_audio(SPEECH)
    packets = list(recording.packets)
    text = client.transcribe(packets, sample_rate=recording.sample_rate)
    [utterance] = client.speech_to_animation(packets, avatar=AVATAR, sample_rate=recording.sample_rate)
    assert len(text.split()) > 5
    assert utterance.text == text
    direct = list(client.animate(packets, avatar=AVATAR, sample_rate=recording.sample_rate))
    # the same windows, there in one large batch; the stream asks nobody whether its digital silence is speech
    assert [(frame.index, frame.data) for frame in utterance.frames] == [(frame.index, frame.data) for frame in direct]
    heard = [frame.speech for frame in utterance.frames]
    assert [frame.speech for frame in direct] == pytest.approx(heard, abs=0.02)


def test_cancelling_ends_at_once(client: Client, speech: Samples) -> None:
    with client.animate([speech] * 20, avatar=AVATAR) as stream:
        next(stream)
        began = time.monotonic()
        stream.cancel()
        assert list(stream) == []
    assert time.monotonic() - began < 1


def test_a_server_that_goes_mid_stream_leaves_a_state_from_which_another_goes_on(
    server: Server, speech: Samples, frames: list[Frame], tmp_path: Path
) -> None:
    write_avatar(tmp_path / "avatars", AVATAR)
    source = iter(np.array_split(speech, 30))
    before: list[Frame] = []
    with Server(avatars=tmp_path / "avatars", ports=Ports.free(), run_dir=tmp_path / "run") as doomed:
        timeout = Timeout(recovery=0.5)
        with Client(doomed.grpc_url, timeout=timeout, retry=Retry(longest=0.1)) as client:
            stream = client.animate(source, avatar=AVATAR)
            before += [next(stream) for _ in range(13)]
            doomed.kill()
            with pytest.raises(ServerUnavailableError) as caught:
                before.extend(stream)
    state = caught.value.state
    assert state is not None
    assert state.frame == len(before)
    with Client(server.grpc_url) as client:
        assert before + list(client.resume(source, state)) == frames
