"""Recordings of other rates and shapes come onto the project's clock."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import talking_head

from talksplat import clock
from talksplat_export import recording as recording_module
from talksplat_export.recording import Recording, RecordingError, Square


def grey_frames(count: int, width: int = 96, height: int = 96) -> list[npt.NDArray[np.uint8]]:
    """Frame i is as bright as i."""
    return [np.full((height, width, 3), 2 * i, np.uint8) for i in range(count)]


@pytest.mark.parametrize(("fps", "expected"), [(50, 20), (25, 40), (10, 100)])
def test_frames_come_at_the_clocks_rate(tmp_path: Path, fps: int, expected: int) -> None:
    talking_head.write_video(tmp_path / "v.mp4", grey_frames(40), fps)
    frames = list(Recording(tmp_path / "v.mp4").frames())
    assert len(frames) == expected == Recording(tmp_path / "v.mp4").length
    shown = np.floor(np.arange(expected) * fps / clock.FPS + 1e-6)
    np.testing.assert_allclose([frame.mean() / 2 for frame in frames], shown, atol=1)


def test_a_part_is_the_same_as_that_part_of_the_whole(tmp_path: Path) -> None:
    talking_head.write_video(tmp_path / "v.mp4", grey_frames(20))
    recording = Recording(tmp_path / "v.mp4")
    np.testing.assert_array_equal(list(recording.frames(5, 9)), list(recording.frames())[5:9])


def test_a_wide_frame_is_cut_to_its_middle_and_scaled(tmp_path: Path) -> None:
    wide = np.zeros((96, 160, 3), np.uint8)
    wide[:, 32:128] = 200
    talking_head.write_video(tmp_path / "v.mp4", [wide] * 3)
    frame = next(Recording(tmp_path / "v.mp4", size=64).frames())
    assert frame.shape == (64, 64, 3)
    assert frame[:, 2:-2].min() > 180


def test_a_square_beside_the_middle_can_be_asked_for(tmp_path: Path) -> None:
    wide = np.zeros((96, 200, 3), np.uint8)
    wide[8:88, 110:190] = 200
    talking_head.write_video(tmp_path / "v.mp4", [wide] * 3)
    frame = next(Recording(tmp_path / "v.mp4", square=Square(110, 8, 80)).frames())
    assert frame.shape == (80, 80, 3)
    assert frame[2:-2, 2:-2].min() > 180
    with pytest.raises(RecordingError, match="not inside the picture of 200 x 96"):
        Recording(tmp_path / "v.mp4", square=Square(121, 8, 80))


@pytest.fixture(scope="module")
def moving() -> list[npt.NDArray[np.uint8]]:
    """150 frames, each its own."""
    noise = np.random.default_rng(0).integers(0, 255, (150 + 64, 80, 3), np.uint8)  # scrolls by
    return [noise[i : i + 64] for i in range(150)]


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("v.mp4", "libx264", {"g": "30", "bf": "3"}),
        ("open.mkv", "libx264", {"g": "30", "bf": "3", "x264-params": "open-gop=1"}),
        ("v.mov", "mpeg4", {"g": "25", "bf": "2"}),
        ("v.webm", "libvpx-vp9", {"g": "40", "deadline": "realtime", "cpu-used": "8"}),
    ],
)
def test_frames_after_a_jump_are_those_of_a_full_decode(
    tmp_path: Path, moving: list[npt.NDArray[np.uint8]], name: str, codec: str, options: dict[str, str]
) -> None:
    talking_head.write_video(tmp_path / name, moving, codecs=(codec, "aac"), options=options)
    recording = Recording(tmp_path / name)
    whole = list(recording.frames())
    assert len(whole) == 150
    for start in (1, 29, 30, 31, 59, 75, 119, 149):
        np.testing.assert_array_equal(list(recording.frames(start, start + 3)), whole[start : start + 3])


def test_a_jump_does_not_decode_from_the_start(
    tmp_path: Path, moving: list[npt.NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch
) -> None:
    talking_head.write_video(tmp_path / "v.mp4", moving, options={"g": "30"})
    recording = Recording(tmp_path / "v.mp4")
    decoded = 0
    decode = recording_module._decode

    def counted(*arguments: Any) -> Iterator[Any]:
        nonlocal decoded
        for frame in decode(*arguments):
            decoded += 1
            yield frame

    monkeypatch.setattr(recording_module, "_decode", counted)
    assert len(list(recording.frames(125, 128))) == 3
    assert decoded <= 60  # the group of pictures and, in some containers, the one before


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_a_rotated_phone_video_stands_upright(tmp_path: Path, rotation: int) -> None:
    upright = np.zeros((160, 96, 3), np.uint8)
    upright[:40, :40] = 200  # a mark at the top left
    stored = np.rot90(upright, -round(rotation / 90))
    talking_head.write_video(tmp_path / "v.mov", [stored] * 3, rotation=rotation)
    recording = Recording(tmp_path / "v.mov", square=Square(0, 0, 96))
    assert recording.picture == (96, 160)
    frame = next(recording.frames())
    assert frame[4:36, 4:36].min() > 150
    assert frame[44:].max() < 60
    assert frame[:, 44:].max() < 60


def test_a_variable_frame_rate_is_shown_at_its_own_times(tmp_path: Path) -> None:
    times = np.cumsum(np.random.default_rng(0).choice([1, 2, 3], 60)) / 30
    times -= times[0]
    talking_head.write_video(tmp_path / "v.mp4", grey_frames(60), times=list(times))
    frames = list(Recording(tmp_path / "v.mp4").frames())
    ticks = np.arange(len(frames)) / clock.FPS
    shown = np.searchsorted(times, ticks + 1e-3, "right") - 1
    np.testing.assert_allclose([frame.mean() / 2 for frame in frames], shown, atol=1)


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
@pytest.mark.parametrize("begins", [0.0, 0.48])
def test_sound_that_begins_later_than_the_picture_stays_in_step(tmp_path: Path, name: str, begins: float) -> None:
    click = np.zeros(2 * clock.SAMPLE_RATE, np.float32)
    click[8000:8400] = 0.5
    talking_head.write_video(tmp_path / name, grey_frames(75), audio=click, audio_begins=begins)
    audio = Recording(tmp_path / name).audio
    assert int(np.argmax(np.abs(audio) > 0.2)) / clock.SAMPLE_RATE == pytest.approx(0.5 + begins, abs=0.005)


@pytest.mark.parametrize("delay", [0.2, -0.12])
def test_a_delay_of_the_sound_is_made_up_for(tmp_path: Path, delay: float) -> None:
    click = np.zeros(2 * clock.SAMPLE_RATE, np.float32)
    click[16000:16400] = 0.5
    talking_head.write_video(tmp_path / "v.mp4", grey_frames(50), audio=click)
    audio = Recording(tmp_path / "v.mp4", delay=delay).audio
    assert int(np.argmax(np.abs(audio) > 0.2)) / clock.SAMPLE_RATE == pytest.approx(1 - delay, abs=0.005)


def test_only_the_asked_for_seconds_are_used(tmp_path: Path) -> None:
    talking_head.write_video(tmp_path / "v.mp4", grey_frames(50))
    recording = Recording(tmp_path / "v.mp4", seconds=1.2)
    assert recording.length == len(list(recording.frames())) == 30


@pytest.mark.parametrize(("name", "options"), [("v.mkv", {}), ("v.mp4", {"movflags": "faststart"})])
def test_a_file_that_breaks_off_says_how_much_is_lost(
    tmp_path: Path, moving: list[npt.NDArray[np.uint8]], name: str, options: dict[str, str]
) -> None:
    whole = tmp_path / name
    talking_head.write_video(whole, moving, container_options=options)
    assert Recording(whole).lost < 0.1
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert Recording(whole).lost > 1.5


def test_a_picture_that_stands_still_is_found(tmp_path: Path) -> None:
    times = [*np.arange(20) / 25, *(2 + np.arange(20) / 25)]
    talking_head.write_video(tmp_path / "v.mp4", grey_frames(40), times=times)
    np.testing.assert_allclose(Recording(tmp_path / "v.mp4").gaps(0.5), [(0.76, 2.0)], atol=1e-3)


def test_audio_of_any_rate_becomes_16_khz_mono(tmp_path: Path) -> None:
    time = np.arange(44100) / 44100
    tone = 0.5 * np.sin(2 * np.pi * 440 * time)
    soundfile.write(tmp_path / "a.wav", np.stack([tone, tone], 1), 44100)
    talking_head.write_video(tmp_path / "v.mp4", grey_frames(3))
    audio = Recording(tmp_path / "v.mp4", tmp_path / "a.wav").audio
    assert audio.dtype == np.float32
    assert abs(len(audio) - clock.SAMPLE_RATE) < 50
    assert np.argmax(np.abs(np.fft.rfft(audio[: clock.SAMPLE_RATE // 2]))) == 220


def test_what_can_not_be_used_is_refused_with_the_reason(tmp_path: Path) -> None:
    video = tmp_path / "v.mp4"
    talking_head.write_video(video, grey_frames(3))
    with pytest.raises(RecordingError, match="does not exist"):
        Recording(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(RecordingError, match="can't be opened"):
        Recording(tmp_path / "text.mp4")
    with pytest.raises(RecordingError, match="multiple of 8"):
        Recording(video, size=100)
    with pytest.raises(RecordingError, match="no audio"):
        _ = Recording(video).audio
    soundfile.write(tmp_path / "a.wav", np.zeros(100), 16000)
    with pytest.raises(RecordingError, match="no video"):
        Recording(tmp_path / "a.wav")
