"""What is said about recordings: fabricated looks and tracks, real speech, and small videos."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import talking_head

from talksplat import clock
from talksplat_export import augment, checks
from talksplat_export.checks import Finding, Looks, RefusedError, Severity
from talksplat_export.geometry import project
from talksplat_export.recording import Recording, RecordingError, Square
from talksplat_export.track import Track, rotation_zyx

Float32 = npt.NDArray[np.float32]
NOTE, WARNING, REFUSAL = Severity.NOTE, Severity.WARNING, Severity.REFUSAL


def fabricated_looks(count: int = 100, picture: tuple[int, int] = (1280, 720)) -> Looks:
    """Of a face 240 pixels high on the right of the picture; nothing is wrong with it. No tracker was asked."""
    box = np.array([900, 180, 1100, 420], np.float32) * (picture[1] / 720)
    return Looks(
        picture=np.array(picture),
        faces=np.ones(count, int),
        boxes=np.tile(box, (count, 1)),
        second=np.full(count, np.nan, np.float32),
        sharpness=np.full(count, 0.1, np.float32),
        luma=np.full(count, 130, np.float32),
        burnt=np.zeros(count, np.float32),
    )


def changed(name: str, value: float, first: int = 0, last: int = 100) -> Looks:
    looks = fabricated_looks()
    values = getattr(looks, name).copy()
    values[first:last] = value
    return replace(looks, **{name: values})


def faceless(first: int, last: int) -> Looks:
    looks = fabricated_looks()
    for name in ("boxes", "sharpness", "luma", "burnt"):
        looks = replace(looks, **{name: getattr(looks, name).copy()})
        getattr(looks, name)[first:last] = np.nan
    looks.faces[first:last] = 0
    return looks


def worst(findings: list[Finding]) -> Finding:
    return max(findings, key=lambda finding: list(Severity).index(finding.severity))


# --- the picture -------------------------------------------------------------------------------------------------


def test_a_good_picture_has_no_finding() -> None:
    assert checks.of_picture(fabricated_looks()) == []


@pytest.mark.parametrize(
    ("looks", "severity", "words"),
    [
        (faceless(0, 100), REFUSAL, "There is no face in the recording"),
        (faceless(60, 100), REFUSAL, r"no face in 40 % of the recording \(at 0:28.8-0:48.0\)"),
        (faceless(10, 14), WARNING, r"no face in 4 % of the recording \(at 0:04.8-0:06.7\)"),
        (changed("second", 0.8, 50), REFUSAL, "two faces in 50 %"),
        (replace(changed("faces", 2, 5, 7), second=changed("second", 0.2, 5, 7).second), WARNING, "a second face"),
        (changed("sharpness", 0.02), WARNING, "not sharp: focus"),
        (changed("sharpness", 0.04, 20, 23), WARNING, r"not sharp \(at 0:09.6-0:11.0\)"),
        (changed("luma", 30), WARNING, "too dark"),
        (changed("luma", 230), WARNING, "too bright"),
        (changed("burnt", 0.2, 0, 9), WARNING, "burnt out"),
        (changed("luma", 190, 70, 80), WARNING, "light on the face changes"),
    ],
)
def test_what_is_wrong_with_a_picture_is_said_with_its_time(looks: Looks, severity: Severity, words: str) -> None:
    found = checks.of_picture(looks)
    assert worst(found).severity == severity
    assert [finding for finding in found if re.search(words, str(finding))]


@pytest.mark.parametrize(("height", "severity"), [(30, REFUSAL), (80, WARNING)])
def test_a_face_that_is_small_in_the_picture(height: int, severity: Severity) -> None:
    looks = fabricated_looks()
    boxes = np.tile(np.array([600, 300, 600 + 0.8 * height, 300 + height], np.float32), (100, 1))
    assert worst(checks.of_picture(replace(looks, boxes=boxes))).severity == severity


def test_the_square_follows_the_face_and_shows_head_and_shoulders() -> None:
    square = checks.square(fabricated_looks())
    assert 2 * 240 <= square.side <= 2.4 * 240
    assert square.left <= 900 - 50
    assert square.left + square.side >= 1100 + 50
    assert square.top <= 100  # room for the hair
    assert square.top + square.side >= 420 + 120  # and for the shoulders


def test_a_face_at_the_edge_leaves_the_square_inside_the_picture() -> None:
    looks = fabricated_looks()
    square = checks.square(replace(looks, boxes=looks.boxes + np.array([170, -170, 170, -170], np.float32)))
    assert square.top == 0
    assert square.left + square.side == 1280


def test_a_picture_that_is_all_head_and_shoulders_is_not_cut() -> None:
    looks = fabricated_looks(picture=(512, 512))
    boxes = np.tile(np.array([140, 80, 369, 333], np.float32), (100, 1))
    assert checks.square(replace(looks, boxes=boxes)) == Square(0, 0, 512)


def test_a_face_that_walks_out_of_the_square_is_found() -> None:
    looks = fabricated_looks()
    looks.boxes[40:42] -= [800, 0, 800, 0]
    assert any("leaves the square" in str(finding) for finding in checks.of_picture(looks))


def test_looks_come_back_from_a_file(tmp_path: Path) -> None:
    looks = faceless(3, 5)
    looks.save(tmp_path / "looks.npz")
    back = Looks.load(tmp_path / "looks.npz")
    for name, values in vars(looks).items():
        np.testing.assert_array_equal(getattr(back, name), values)


# --- the sound ---------------------------------------------------------------------------------------------------


def test_clean_speech_has_no_finding(speech: Float32) -> None:
    assert checks.of_sound(speech, len(speech) / clock.SAMPLE_RATE) == []


def test_what_is_wrong_with_a_sound_is_said(speech: Float32) -> None:
    seconds = len(speech) / clock.SAMPLE_RATE
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(len(speech)).astype(np.float32)
    for audio, severity, words in (
        (np.zeros_like(speech), REFUSAL, "is silent"),
        (0.05 * noise, REFUSAL, "s of speech in the sound"),
        (0.01 * speech, WARNING, "voice is quiet"),
        (np.clip(20 * speech, -1, 1), WARNING, "clipped (at"),
        (augment.mix(speech, noise, 6.0), WARNING, "There is noise"),
        (speech[: 9 * clock.SAMPLE_RATE], WARNING, "sound ends before the picture (at 0:09.0-0:12.1)"),
    ):
        finding = worst(checks.of_sound(audio, seconds))
        assert finding.severity == severity, words
        assert any(words in str(finding) for finding in checks.of_sound(audio, seconds)), words


# --- the file ----------------------------------------------------------------------------------------------------


def video(path: Path, seconds: float, fps: int = 25, **options: object) -> Recording:
    frames = [np.full((64, 64, 3), i % 250, np.uint8) for i in range(round(seconds * fps))]
    talking_head.write_video(path, frames, fps, **options)  # type: ignore[arg-type]
    return Recording(path)


@pytest.mark.parametrize(
    ("seconds", "fps", "severity", "words"),
    [
        (5, 25, REFUSAL, r"5.0 s long: 10 s are needed"),
        (12, 25, WARNING, r"12.0 s long"),
        (61, 30, NOTE, r"The file has 30.0 frames a second: 25 a second are taken from it."),
        (61, 10, WARNING, r"10.0 frames a second"),
    ],
)
def test_length_and_rate(tmp_path: Path, seconds: float, fps: int, severity: Severity, words: str) -> None:
    found = checks.of_file(video(tmp_path / "v.mp4", seconds, fps))
    assert [finding.severity for finding in found] == [severity]
    assert words in str(found[0])


def test_uneven_frames_are_noted(tmp_path: Path) -> None:
    times = np.cumsum(np.random.default_rng(0).choice([1, 1, 2], 30)) / 30
    talking_head.write_video(tmp_path / "v.mp4", [np.zeros((64, 64, 3), np.uint8)] * 30, times=list(times))
    found = checks.of_file(Recording(tmp_path / "v.mp4"))
    assert any("unevenly spaced" in str(finding) for finding in found)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.mkv"
    video(path, 30)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(RefusedError, match="The file breaks off: it promises 1"):
        checks.require(checks.of_file(Recording(path)))


def test_a_refusal_is_a_recording_error_with_all_findings() -> None:
    findings = [Finding(WARNING, "It is dark."), Finding(REFUSAL, "It is empty.", ((1.0, 2.5),))]
    with pytest.raises(RecordingError) as caught:
        checks.require(findings)
    assert str(caught.value) == "It is empty (at 0:01.0-0:02.5)."
    assert isinstance(caught.value, RefusedError)
    assert [finding.severity for finding in caught.value.findings] == [REFUSAL, WARNING]
    checks.require(findings[:1])


def test_many_times_are_told_by_the_longest() -> None:
    spans = [(float(i), i + 0.1 * (i + 1)) for i in range(10)]
    text = checks.times(spans, most=2)
    assert text == "at 0:08.0-0:08.9, 0:09.0-0:10.0 and 8 more"


# --- the track ---------------------------------------------------------------------------------------------------


def speaking(opening: npt.NDArray[np.float64]) -> Track:
    """A fabricated track of the tests' head that parts its lips as told, 0..1, and blinks once."""
    track, points = talking_head.make_track(len(opening))
    still = np.tile(track.viewmats[:1], (len(opening), 1, 1))
    landmarks = np.stack([project(points[0] + o * points[1], still[0], track.K) for o in opening])
    blink = np.zeros(len(opening), np.float32)
    blink[10:14] = 1
    return replace(track, viewmats=still, landmarks=landmarks[..., :2].astype(np.float32), blink=blink)


def test_a_good_track_says_when_the_mouth_rests() -> None:
    opening = np.abs(np.sin(np.arange(250) / 3))
    opening[100:120] = 0
    found = checks.of_track(speaking(opening))
    assert [finding.severity for finding in found] == [NOTE]
    assert str(found[0]) == "The mouth was found closed and at rest (at 0:04.0-0:04.8)."


def test_what_a_track_lacks_is_said() -> None:
    busy = speaking(0.6 + 0.4 * np.sin(np.arange(250) / 1.5))
    assert "never rests closed" in str(worst(checks.of_track(busy)))
    sleepless = replace(busy, blink=np.zeros(250, np.float32))
    assert any("never blink" in str(finding) for finding in checks.of_track(sleepless))
    assert any("hardly part" in str(finding) for finding in checks.of_track(speaking(np.zeros(250))))
    seen = np.ones(250, bool)
    seen[50:75] = False
    assert any("(at 0:02.0-0:03.0)" in str(finding) for finding in checks.of_track(replace(busy, seen=seen)))
    turned = busy.viewmats.copy()
    turned[100:125, :3, :3] = rotation_zyx(np.array([0, 0.9, 0])) @ turned[100:125, :3, :3]
    found = checks.of_track(replace(busy, viewmats=turned.astype(np.float32)))
    assert any("turned by more than 35 degrees (at 0:04.0-0:05.0)" in str(finding) for finding in found)


# --- sound against picture ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lips(speech: Float32) -> Track:
    """A fabricated track whose lips follow the loudness of twice `speech`."""
    twice = np.tile(speech, 2)
    frames = len(twice) // clock.SAMPLES_PER_FRAME
    loud = np.sqrt(np.mean(twice[: frames * clock.SAMPLES_PER_FRAME].reshape(frames, -1) ** 2, 1))
    opening = np.convolve(loud / loud.max(), [0.25, 0.5, 0.25], "same")
    return speaking(opening + 0.02 * np.random.default_rng(0).standard_normal(frames))


@pytest.mark.parametrize("late", [0.0, 0.2, -0.28])
def test_a_shift_of_the_sound_is_estimated(speech: Float32, lips: Track, late: float) -> None:
    shifted = np.roll(np.tile(speech, 2), round(late * clock.SAMPLE_RATE))
    found = checks.offset(shifted, lips)
    assert found.is_sure
    assert found.seconds == pytest.approx(late, abs=0.02)
    assert found.delay == (pytest.approx(late, abs=0.02) if late else 0)
    assert ("is corrected" in str(found.finding)) == bool(late)


def test_lips_that_do_not_follow_the_sound_correct_nothing(speech: Float32) -> None:
    rng = np.random.default_rng(1)
    opening = np.convolve(rng.uniform(0, 1, 600), np.ones(4) / 4, "same")
    found = checks.offset(np.tile(speech, 2), speaking(opening))
    assert not found.is_sure
    assert found.delay == 0
    assert found.finding.severity == WARNING


def test_frames_without_a_face_do_not_vote(speech: Float32, lips: Track) -> None:
    landmarks, seen = lips.landmarks.copy(), lips.seen.copy()
    seen[200:225] = False
    landmarks[200:225] += np.random.default_rng(0).normal(0, 20, landmarks[200:225].shape)
    found = checks.offset(np.tile(speech, 2), replace(lips, landmarks=landmarks.astype(np.float32), seen=seen))
    assert found.is_sure
    assert abs(found.seconds) < 0.05
