"""Recordings that no avatar can come of: one clear sentence, and nothing is written. And odd ones that are fine."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
import soundfile
import talking_head
from scipy.ndimage import find_objects, label

from talksplat import avatar as bundle
from talksplat import clock
from talksplat_export import checks, fit, report, stage_b, track
from talksplat_export.recording import Recording
from talksplat_export.track import Detections, Landmarker

Float32 = npt.NDArray[np.float32]
Image = npt.NDArray[np.uint8]

SECONDS = 10.4
FRAMES = round(SECONDS * clock.FPS)


class FabricatedLandmarker(Landmarker):
    """Says that every bright patch is a face: landmark results that no tracker made."""

    def __init__(self, model: Path, faces: int = 1) -> None:
        self._faces = faces

    def every(self, frame: Image) -> list[Float32]:
        boxes = find_objects(label(frame.mean(-1) > 150)[0])
        faces = []
        for rows, columns in boxes[: self._faces]:
            unit = np.random.default_rng(0).uniform(0, 1, (478, 2))
            unit[:2] = (0, 0), (1, 1)
            corner, size = np.array([columns.start, rows.start]), np.array([columns.stop, rows.stop])
            faces.append((corner + unit * (size - corner)).astype(np.float32))
        return faces

    def __call__(self, frame: Image) -> tuple[Float32, dict[str, float], Float32] | None:
        found = self.every(frame)
        scores = {name: float(frame.mean()) for name in ("eyeBlinkLeft", "eyeBlinkRight", "jawOpen")}
        others = {f"more{i}": 0.0 for i in range(track.BLENDSHAPES - len(scores))}
        return (found[0], {**scores, **others}, np.eye(4, dtype=np.float32)) if found else None

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def fabricated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No model, and the landmarker that needs none."""
    for module in (track, checks, fit):
        monkeypatch.setattr(module, "Landmarker", FabricatedLandmarker)
    model = tmp_path / "fabricated.task"
    model.write_bytes(b"")
    return model


def patches(*places: tuple[int, int], frames: int = FRAMES, start: int = 0, stop: int = FRAMES) -> list[Image]:
    """A wide grey picture with bright patches, 60 pixels high, at columns and rows in some of the frames."""
    picture = np.full((120, 200, 3), 90, np.uint8)
    rng = np.random.default_rng(0)
    shown = picture.copy()
    for column, row in places:
        shown[row : row + 60, column : column + 48] = rng.integers(180, 220, (60, 48, 1))
    return [shown if start <= index < stop else picture for index in range(frames)]


def run_fit(video: Path, folder: Path, *more: object) -> int:
    parser = ArgumentParser()
    fit.add_parser(parser.add_subparsers())
    folders = ("--out", folder / "avatars" / "head", "--work", folder / "work")
    args = parser.parse_args(["fit", str(video), *map(str, (*folders, *more))])
    return int(args.run(args))


def refusal(video: Path, folder: Path, capsys: pytest.CaptureFixture[str], *more: object) -> str:
    """The sentence of a fit that is refused; nothing is left of a bundle."""
    assert run_fit(video, folder, *more) == 1
    assert not (folder / "avatars").exists()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


# --- faces -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (patches(), "There is no face in the recording"),
        (patches((20, 30), (130, 30)), "There are two faces in 100 % of the recording"),
        (patches((130, 30), stop=FRAMES // 2), "no face in 50 % of the recording (at 0:05.3-0:10.6)"),
    ],
    ids=["no face", "two faces", "the face leaves"],
)
def test_faces(
    frames: list[Image],
    words: str,
    tmp_path: Path,
    fabricated: Path,
    speech: Float32,
    capsys: pytest.CaptureFixture[str],
) -> None:
    talking_head.write_video(tmp_path / "v.mp4", frames, audio=speech)
    assert words in refusal(tmp_path / "v.mp4", tmp_path, capsys, "--landmarker", fabricated)


def test_a_face_beside_the_middle_of_a_wide_picture_is_in_the_square(tmp_path: Path, fabricated: Path) -> None:
    talking_head.write_video(tmp_path / "v.mp4", patches((150, 30), frames=50))
    looks = checks.look(Recording(tmp_path / "v.mp4"), fabricated)
    square = checks.square(looks)
    assert square.left <= 146
    assert square.left + square.side == 200


def test_a_face_that_is_found_twice_is_one(tmp_path: Path, fabricated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = FabricatedLandmarker.every
    monkeypatch.setattr(FabricatedLandmarker, "every", lambda *a: [face + d for face in once(*a) for d in (0, 2)])
    talking_head.write_video(tmp_path / "v.mp4", patches((150, 30), frames=50))
    assert set(checks.look(Recording(tmp_path / "v.mp4"), fabricated).faces) == {1}


def test_a_face_that_is_small_in_the_picture_is_searched_in_its_parts(
    tmp_path: Path, fabricated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = FabricatedLandmarker.every

    def short_sighted(self: FabricatedLandmarker, frame: Image) -> list[Float32]:
        return [face for face in every(self, frame) if np.ptp(face[:, 1]) > 0.3 * len(frame)]

    monkeypatch.setattr(FabricatedLandmarker, "every", short_sighted)
    frames = [
        np.pad(frame, ((60, 60), (0, 200), (0, 0)), constant_values=90) for frame in patches((120, 20), frames=50)
    ]
    talking_head.write_video(tmp_path / "v.mp4", frames)
    looks = checks.look(Recording(tmp_path / "v.mp4"), fabricated)
    assert set(looks.faces) == {1}
    np.testing.assert_allclose(looks.boxes[-1], [120, 80, 168, 140], atol=2)


def test_tracking_goes_on_where_it_was_interrupted(
    tmp_path: Path, fabricated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = patches((70, 30), frames=60, start=10)
    for index, frame in enumerate(frames):
        frames[index] = frame - np.uint8(index % 7)
    talking_head.write_video(tmp_path / "v.mp4", frames)
    recording, kept = Recording(tmp_path / "v.mp4"), tmp_path / "kept.npz"
    straight = track.detect(recording, fabricated)
    assert straight.seen.tolist() == [False] * 10 + [True] * 50

    asked: list[int] = []

    def interrupted(done: int) -> None:
        asked.append(done)
        if done == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        track.detect(recording, fabricated, interrupted, kept)
    assert Detections.load(kept).done == 40
    resumed = track.detect(recording, fabricated, asked.append, kept)
    assert asked == [*range(1, 61)]
    for name, values in vars(straight).items():
        np.testing.assert_array_equal(getattr(resumed, name), values)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("none", "There is no face"),
        ("two", "There are two faces"),
        ("leaves", "There is no face in 44 %"),
        ("wide", ""),
        ("rotated", ""),
    ],
)
def test_faces_as_mediapipe_sees_them(case: str, words: str, tmp_path: Path, shared_data: Path) -> None:
    with av.open(str(shared_data / "faces" / "subject_a.mp4")) as container:
        frames = [
            np.asarray(frame.reformat(256, 256).to_ndarray(format="rgb24"), np.uint8)
            for frame, _ in zip(container.decode(video=0), range(100), strict=False)
        ]
    empty = np.full_like(frames[0], 90)
    rotation = 0
    if case == "none":
        frames = [empty] * 100
    elif case == "two":
        frames = [np.concatenate([frame, frame[:, ::-1]], 1) for frame in frames]
    elif case == "leaves":
        frames[50:] = [empty] * 50
    elif case == "wide":
        frames = [np.concatenate([empty, empty[:, :128], frame], 1) for frame in frames]
    else:
        frames, rotation = [np.rot90(frame) for frame in frames], -90
    talking_head.write_video(tmp_path / "v.mp4", frames, rotation=rotation)
    recording = Recording(tmp_path / "v.mp4")
    looks = checks.look(recording, shared_data / "models" / "face_landmarker.task")
    findings = checks.of_picture(looks)
    if words:
        with pytest.raises(checks.RefusedError, match=words):
            checks.require(findings)
        return
    checks.require(findings)
    square = checks.square(looks)
    assert square.left + square.side == recording.picture[0]
    assert square.side == 256


# --- sound and file ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain() -> list[Image]:
    return patches((70, 30))


@pytest.mark.parametrize(
    ("audio", "words"),
    [
        (None, "holds no audio: name a file with --audio."),
        (np.zeros(round(SECONDS * clock.SAMPLE_RATE), np.float32), "The sound is silent."),
    ],
    ids=["none", "silent"],
)
def test_sound(
    plain: list[Image],
    audio: Float32 | None,
    words: str,
    tmp_path: Path,
    fabricated: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    talking_head.write_video(tmp_path / "v.mp4", plain, audio=audio)
    assert words in refusal(tmp_path / "v.mp4", tmp_path, capsys, "--landmarker", fabricated)


def damaged(kind: str, frames: list[Image], speech: Float32, folder: Path) -> Path:
    """A file that is not what it should be."""
    path = folder / "v.mp4"
    if kind == "five seconds":
        talking_head.write_video(path, frames[:125], audio=speech)
        return path
    if kind == "sound only":
        soundfile.write(folder / "v.wav", speech, clock.SAMPLE_RATE)
        return folder / "v.wav"
    options = {} if kind == "without an end" else {"movflags": "faststart"}
    talking_head.write_video(path, frames, audio=speech, container_options=options)
    data = path.read_bytes()
    if kind == "unknown codec":
        data = data.replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC")
    elif kind in ("cut off", "without an end"):
        data = data[: len(data) * 2 // 3]
    elif kind == "text":
        data = b"This is no video."
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("five seconds", "The recording is 5.0 s long: 10 s are needed."),
        ("cut off", "The file breaks off: it promises"),
        ("without an end", "or it is cut off"),
        ("unknown codec", "in a format that FFmpeg can't decode"),
        ("text", "it is no video or sound file that FFmpeg reads"),
        ("sound only", "holds no video"),
    ],
)
def test_files(
    kind: str,
    words: str,
    plain: list[Image],
    tmp_path: Path,
    fabricated: Path,
    speech: Float32,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = damaged(kind, plain, speech, tmp_path)
    assert words in refusal(path, tmp_path, capsys, "--landmarker", fabricated)


# --- odd, but fine -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def upright(tmp_path_factory: pytest.TempPathFactory, speech: Float32) -> dict[str, Path]:
    paths: dict[str, Path] = talking_head.make(tmp_path_factory.mktemp("upright"), speech, FRAMES)
    return paths


def test_a_rotated_video_of_variable_frame_rate_is_fitted_like_any_other(
    upright: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speech: Float32
) -> None:
    monkeypatch.setattr(stage_b, "STEPS", 10)
    monkeypatch.setattr(report, "write", lambda done, *_: done.folder / report.NAME)
    with av.open(str(upright["video"])) as container:
        frames = [np.asarray(frame.to_ndarray(format="rgb24"), np.uint8) for frame in container.decode(video=0)]
    early = np.random.default_rng(0).uniform(0, 0.03, FRAMES)
    early[0] = 0
    times = np.arange(FRAMES) / clock.FPS - early
    talking_head.write_video(
        tmp_path / "phone.mov", [np.rot90(frame) for frame in frames], times=list(times), rotation=-90, audio=speech
    )
    arguments: tuple[Any, ...] = ("--track", upright["track"], "--gaussians", 300, "--steps", 10, "--plates", 5)
    assert run_fit(tmp_path / "phone.mov", tmp_path, *arguments) == 0
    avatar = bundle.read(tmp_path / "avatars", "head")
    first, last = avatar.provenance["plate_frames"]
    assert 4 <= len(avatar.plates) == last - first <= 5
    for plate, frame in zip(avatar.plates, frames[first:last], strict=True):
        assert np.abs(simplejpeg.decode_jpeg(plate).astype(int) - frame).mean() < 6
