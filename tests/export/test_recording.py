"""Recordings of other rates and shapes come onto the project's clock."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import talking_head

from talksplat import clock
from talksplat_export.recording import Recording, RecordingError


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
