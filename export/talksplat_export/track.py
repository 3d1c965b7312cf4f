"""Tracking: where the head is in every frame of a recording, what the mouth and the eyes do, and landmarks.

Two sources give the same `Track`: MediaPipe's FaceLandmarker (any recording) and a ground-truth file of a rendered
subject. Cameras are pinholes with +z forward and +y down; the head frame is in metres and rigid to the skull.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy.ndimage import median_filter
from scipy.signal import savgol_filter

from talksplat import clock
from talksplat.files import replacing
from talksplat_export._npz import Npz
from talksplat_export.recording import Recording

Float32 = npt.NDArray[np.float32]

LANDMARKER_URL = (
    "https://storage.googleapis.com/mediapipe-models/face_landmarker/face_landmarker/float16/1/face_landmarker.task"
)
LANDMARKER_SHA256 = "64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff"
MEDIAPIPE_FOV_DEG = 63.0  # vertical field of view that FaceLandmarker assumes for its pose
CENTIMETRE = 0.01  # both sources measure in centimetres

# The synthetic subject's camera and neck, in its mesh's units (centimetres, +y up, +z towards the camera).
SUBJECT_FOV_DEG, SUBJECT_DISTANCE, SUBJECT_HEIGHT = 18.0, 105.0, -2.5
SUBJECT_PIVOT = (0.0, -8.0, -3.0)

MOUTH_BLENDSHAPES = ("jaw", "mouth", "cheekPuff", "tongue")  # prefixes of ARKit's names
BLINK_BLENDSHAPES = ("eyeBlinkLeft", "eyeBlinkRight")
BLENDSHAPES = 52  # FaceLandmarker's
STEADY_ORDER = 2  # of the polynomial that a pose follows within a fifth of a second
MAX_MISSING = 0.2  # of the frames may be without a face
POSES = "poses.npz"  # beside the detections that are kept, see `registration.refine`


class TrackError(ValueError):
    """The recording can't be tracked or the track does not fit it; the message says why."""


@dataclass(frozen=True)
class Layout:
    """Which landmarks are which part of the face."""

    inner_lips: tuple[tuple[int, ...], tuple[int, ...]]  # upper and lower, pairwise opposite
    mouth: tuple[int, ...]
    eyes: tuple[tuple[int, ...], tuple[int, ...]]
    brows: tuple[int, ...]
    jaw: tuple[int, ...]  # ear to ear by way of the chin
    nose: tuple[int, ...]

    @property
    def face(self) -> tuple[int, ...]:
        """What spans it, from brows to chin and from ear to ear."""
        return (*self.brows, *self.jaw, *self.mouth)


def _range(start: int, stop: int) -> tuple[int, ...]:
    return tuple(range(start, stop))


LAYOUTS = {
    68: Layout(  # Multi-PIE / iBUG
        inner_lips=((61, 62, 63), (67, 66, 65)),
        mouth=_range(48, 68),
        eyes=(_range(36, 42), _range(42, 48)),
        brows=_range(17, 27),
        jaw=_range(0, 17),
        nose=_range(27, 36),
    ),
    478: Layout(  # MediaPipe's face mesh with irises
        inner_lips=((82, 13, 312), (87, 14, 317)),
        mouth=(
            *(61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40, 185),
            *(78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308, 415, 310, 311, 312, 13, 82, 81, 80, 191),
        ),
        eyes=(
            (33, 7, 163, 144, 145, 153, 154, 155, 133, 173, 157, 158, 159, 160, 161, 246),
            (263, 249, 390, 373, 374, 380, 381, 382, 362, 398, 384, 385, 386, 387, 388, 466),
        ),
        brows=(70, 63, 105, 66, 107, 55, 65, 52, 53, 46, 300, 293, 334, 296, 336, 285, 295, 282, 283, 276),
        jaw=(234, 93, 132, 58, 172, 136, 150, 149, 176, 148, 152, 377, 400, 378, 379, 365, 397, 288, 361, 323, 454),
        nose=(168, 6, 197, 195, 5, 4, 1, 19, 94, 2, 98, 327, 64, 294),
    ),
}


@dataclass(frozen=True, eq=False)
class Track(Npz):
    """What was found in each of T frames.

    Raises:
        TrackError: on construction, when the shapes do not fit together or values are not finite.
    """

    expression: Float32  # [T, C] what the mouth does; all 0 = closed-mouth rest
    blink: Float32  # [T] 0 open .. 1 shut
    viewmats: Float32  # [T, 4, 4] head frame -> camera
    K: Float32  # [3, 3] pixels
    landmarks: Float32  # [T, L, 2] pixels, as seen; L is a key of LAYOUTS
    seen: npt.NDArray[np.bool_]  # [T] whether there is a face; where not, everything else is guessed
    source: str

    def __post_init__(self) -> None:
        frames = len(self.expression)
        count = self.landmarks.shape[1] if self.landmarks.ndim == 3 else -1
        if count not in LAYOUTS:
            raise TrackError(
                f"landmarks are {list(self.landmarks.shape)}, expected [T, L, 2] with L one of {list(LAYOUTS)}."
            )
        expected = {
            "expression": (frames, self.expression.shape[-1]),
            "blink": (frames,),
            "viewmats": (frames, 4, 4),
            "K": (3, 3),
            "landmarks": (frames, count, 2),
            "seen": (frames,),
        }
        for name, shape in expected.items():
            array = getattr(self, name)
            if array.shape != shape:
                raise TrackError(f"{name} is {list(array.shape)}, expected {list(shape)}.")
            if not np.isfinite(array).all():
                raise TrackError(f"{name} holds NaN or infinity.")

    def __len__(self) -> int:
        return len(self.expression)

    @property
    def layout(self) -> Layout:
        """Names of the landmarks."""
        return LAYOUTS[self.landmarks.shape[1]]

    @property
    def lip_opening(self) -> Float32:
        """Distance of the inner lips, [T] pixels, signed along the face: below 0 where they overlap."""
        return lip_opening(self.landmarks)

    def __getitem__(self, frames: slice | npt.NDArray[np.int64]) -> Track:
        return replace(
            self,
            expression=self.expression[frames],
            blink=self.blink[frames],
            viewmats=self.viewmats[frames],
            landmarks=self.landmarks[frames],
            seen=self.seen[frames],
        )


def lip_opening(landmarks: Float32) -> Float32:  # [T, L, 2] -> [T]
    """Mean distance of opposite inner-lip landmarks along the face's own vertical, in pixels."""
    layout = LAYOUTS[landmarks.shape[1]]
    left, right = (landmarks[:, list(eye)].mean(1) for eye in layout.eyes)
    across = right - left
    down = np.stack([-across[:, 1], across[:, 0]], 1) / np.linalg.norm(across, axis=1, keepdims=True)
    upper, lower = (landmarks[:, list(lip)] for lip in layout.inner_lips)
    return np.asarray(np.einsum("tld,td->t", lower - upper, down) / len(layout.inner_lips[0]), np.float32)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of a command that needs a recording's audio and track."""
    parser.add_argument("--audio", type=Path, help="the recording's audio, where that is a separate file")
    parser.add_argument("--track", type=Path, metavar="NPZ", help="ground truth to read instead of tracking")
    parser.add_argument("--landmarker", type=Path, help="MediaPipe's face_landmarker.task (default: downloaded)")


def find(
    recording: Recording,
    source: Path | None,
    model: Path | None,
    advance: Callable[[int], object] = lambda done: None,
    kept: Path | None = None,
) -> Track:
    """Read the ground truth in ``source``, or track with the FaceLandmarker ``model`` and refine the poses.

    Args:
        advance: called with the number of frames done; detection is one half of a frame, refinement the other.
        kept: see `detect`; the poses are kept beside it.

    Raises:
        TrackError: see `from_ground_truth` and `from_mediapipe`.
    """
    if source is not None:
        return from_ground_truth(source, recording)
    from talksplat_export import registration  # which builds on this module

    tracked = from_mediapipe(recording, landmarker_file(model), lambda done: advance(done // 2), kept)
    poses = None if kept is None else kept.with_name(POSES)
    return registration.refine(recording, tracked, lambda done: advance((len(tracked) + done) // 2), poses)


def from_ground_truth(path: Path, recording: Recording) -> Track:
    """Read the exact parameters of a rendered subject.

    Args:
        path: .npz of ``blendshapes`` [T, C] (0 = rest), ``eye_blink`` [T], ``head_pose_deg`` [T, 3] and
            ``landmarks68_px`` [T, 68, 2] in pixels of the rendered frames, whose camera is centred.

    Raises:
        TrackError: the file lacks an array, has other shapes, or another number of frames than the recording.
    """
    expected: dict[str, tuple[int | None, ...]] = {
        "blendshapes": (None, None),
        "eye_blink": (None,),
        "head_pose_deg": (None, 3),
        "landmarks68_px": (None, 68, 2),
    }
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: np.asarray(data[name], np.float32) for name in expected}
    except (OSError, ValueError, KeyError) as error:
        raise TrackError(f"{path} is no ground truth: {error}. Expected an .npz of {', '.join(expected)}.") from error
    frames = len(arrays["blendshapes"])
    for name, shape in expected.items():
        found = arrays[name].shape
        wanted = (frames, *shape[1:])
        if len(found) != len(wanted) or any(b is not None and a != b for a, b in zip(found, wanted, strict=True)):
            text = ", ".join("C" if side is None else str(side) for side in wanted)
            raise TrackError(f"{name} of {path.name} is {list(found)}, expected [{text}].")
    if frames != recording.whole:
        raise TrackError(f"{path.name} describes {frames} frames, {recording.path.name} has {recording.whole}.")
    frames = recording.length
    arrays = {name: array[:frames] for name, array in arrays.items()}

    assert recording.square is not None
    size = recording.size
    focal = size / (2 * np.tan(np.radians(SUBJECT_FOV_DEG / 2)))
    turn = rotation_zyx(np.radians(arrays["head_pose_deg"].astype(np.float64)))
    pivot = np.array(SUBJECT_PIVOT)
    head = np.tile(np.eye(4), (frames, 1, 1))  # head frame -> world, centimetres
    head[:, :3, :3] = turn
    head[:, :3, 3] = pivot - turn @ pivot
    camera = np.diag([1.0, -1.0, -1.0, 1.0])
    camera[:3, 3] = 0, SUBJECT_HEIGHT, SUBJECT_DISTANCE
    viewmats = camera @ head
    viewmats[:, :3, 3] *= CENTIMETRE
    return Track(
        expression=arrays["blendshapes"],
        blink=arrays["eye_blink"],
        viewmats=viewmats.astype(np.float32),
        K=np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]], np.float32),
        landmarks=arrays["landmarks68_px"] * np.float32(size / recording.square.side),
        seen=np.ones(frames, bool),
        source=f"ground truth {path.name}",
    )


def rotation_zyx(angles: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:  # [..., 3] radians -> [..., 3, 3]
    """Rz Ry Rx of angles (rx, ry, rz)."""
    (cx, cy, cz), (sx, sy, sz) = np.moveaxis(np.cos(angles), -1, 0), np.moveaxis(np.sin(angles), -1, 0)
    rows = [
        [cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx],
        [sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx],
        [-sy, cy * sx, cy * cx],
    ]
    return np.moveaxis(np.array(rows), (0, 1), (-2, -1))


def landmarker_file(path: Path | None) -> Path:
    """The FaceLandmarker model: ``path``, or a cached download of it that matches its pinned SHA-256.

    Raises:
        TrackError: ``path`` does not exist, or the model can't be had.
    """
    if path is not None:
        if not path.is_file():
            raise TrackError(f"There is no FaceLandmarker model at {path}.")
        return path
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "talksplat" / "face_landmarker.task"
    if not cache.is_file():
        try:
            with urllib.request.urlopen(LANDMARKER_URL, timeout=30) as response:
                data = response.read()
        except (urllib.error.URLError, TimeoutError) as error:
            raise TrackError(
                f"Tracking needs MediaPipe's face_landmarker.task, which could not be downloaded ({error}). "
                f"Get it from {LANDMARKER_URL} and name it with --landmarker."
            ) from error
        if hashlib.sha256(data).hexdigest() != LANDMARKER_SHA256:
            raise TrackError(f"{LANDMARKER_URL} sent another file than the one this version was tried with.")
        with replacing(cache) as partial:
            partial.write_bytes(data)
    return cache


class Landmarker:
    """MediaPipe's FaceLandmarker over single frames; close it after use (a context manager).

    Args:
        faces: how many to look for.
    """

    def __init__(self, model: Path, faces: int = 1) -> None:
        # Imported here: it takes seconds and ground-truth fits do without.
        import mediapipe as mp
        from mediapipe.tasks.python import BaseOptions, vision

        self._mediapipe = mp
        options = vision.FaceLandmarkerOptions(
            base_options=BaseOptions(model_asset_path=str(model)),
            running_mode=vision.RunningMode.IMAGE,  # VIDEO mode smooths, which lags
            num_faces=faces,
            output_face_blendshapes=True,
            output_facial_transformation_matrixes=True,
        )
        try:
            with _silenced():
                self._landmarker = vision.FaceLandmarker.create_from_options(options)
        except (RuntimeError, ValueError) as error:
            raise TrackError(f"{model} is no FaceLandmarker model ({error}).") from error

    def __call__(self, frame: npt.NDArray[np.uint8]) -> tuple[Float32, dict[str, float], Float32] | None:
        """Landmarks [478, 2] in pixels, blendshapes by name, pose [4, 4] (centimetres); None without a face."""
        found = self._detect(frame)
        if not found.face_landmarks:
            return None
        scores = {category.category_name: float(category.score) for category in found.face_blendshapes[0]}
        pose = np.asarray(found.facial_transformation_matrixes[0], np.float32)
        return _pixels(found.face_landmarks[0], frame), scores, pose

    def every(self, frame: npt.NDArray[np.uint8]) -> list[Float32]:
        """Landmarks [478, 2] in pixels of every face that is found."""
        return [_pixels(face, frame) for face in self._detect(frame).face_landmarks]

    def _detect(self, frame: npt.NDArray[np.uint8]) -> Any:
        mp = self._mediapipe
        return self._landmarker.detect(mp.Image(image_format=mp.ImageFormat.SRGB, data=np.ascontiguousarray(frame)))

    def __enter__(self) -> Landmarker:
        return self

    def __exit__(self, *_: object) -> None:
        self._landmarker.close()


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Without the dozen lines that MediaPipe writes to standard error whatever its log level; errors it raises."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _pixels(face: Any, frame: npt.NDArray[np.uint8]) -> Float32:
    height, width = frame.shape[:2]
    return np.array([(point.x * width, point.y * height) for point in face], np.float32)


@dataclass(eq=False)
class Detections(Npz):
    """What FaceLandmarker found in T frames, as far as it got; a frame without a face has zeros."""

    done: int  # frames that were looked at
    names: tuple[str, ...]  # of the blendshapes
    seen: npt.NDArray[np.bool_]  # [T] whether there is a face
    landmarks: Float32  # [T, 478, 2] pixels
    scores: Float32  # [T, 52] of the blendshapes
    poses: Float32  # [T, 4, 4] centimetres

    @classmethod
    def none(cls, frames: int) -> Detections:
        """Of a recording of so many frames, before the first."""
        shapes = (frames, max(LAYOUTS), 2), (frames, BLENDSHAPES), (frames, 4, 4)
        return cls(0, (), np.zeros(frames, bool), *(np.zeros(shape, np.float32) for shape in shapes))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        found = super().load(path)
        found.names = tuple(map(str, found.names))
        return found


def detect(
    recording: Recording, model: Path, advance: Callable[[int], object] = lambda done: None, kept: Path | None = None
) -> Detections:
    """Run FaceLandmarker over every frame.

    Args:
        advance: called with the number of frames done.
        kept: a file (.npz) of detections in this very recording to go on from; it is written twice a minute and on
            an interrupt.
    """
    found = Detections.load(kept) if kept is not None and kept.exists() else Detections.none(recording.length)
    with found.kept(kept) as keep, Landmarker(model) as landmarker:
        for index, frame in enumerate(recording.frames(found.done), found.done):
            face = landmarker(frame)
            if face is not None:
                found.landmarks[index], scores, found.poses[index] = face
                found.names, found.scores[index] = tuple(scores), list(scores.values())
                found.seen[index] = True
            found.done = index + 1
            advance(found.done)
            keep()
    return found


def from_mediapipe(
    recording: Recording, model: Path, advance: Callable[[int], object] = lambda done: None, kept: Path | None = None
) -> Track:
    """Track with FaceLandmarker.

    The poses are the tracker's own, steadied; `registration.refine` makes them exact. Since blendshape scores are
    weak on pressed lips, the lips' distance and the mouth's width from the landmarks join them.

    Args:
        advance, kept: see `detect`.

    Raises:
        TrackError: no face in more than a fifth of the frames.
    """
    found = detect(recording, model, advance, kept)
    seen = np.flatnonzero(found.seen)
    frames = len(found.seen)
    if len(seen) < (1 - MAX_MISSING) * frames:
        raise TrackError(f"A face was found in {len(seen)} of {frames} frames only.")

    def fill(array: Float32) -> npt.NDArray[np.float64]:
        """With what lies between the neighbours that have a face, where a frame has none."""
        columns = array[seen].reshape(len(seen), -1).T
        whole = [np.interp(np.arange(frames), seen, column) for column in columns]
        return np.stack(whole, 1).reshape(array.shape)

    landmarks = fill(found.landmarks)
    scores = fill(found.scores[:, [name.startswith(MOUTH_BLENDSHAPES) for name in found.names]])
    blink = fill(found.scores[:, [found.names.index(name) for name in BLINK_BLENDSHAPES]]).mean(1)
    pose = fill(found.poses)

    viewmats = np.diag([1.0, -1.0, -1.0, 1.0]) @ pose
    viewmats[:, :3, 3] *= CENTIMETRE
    viewmats[:, :3] = median_filter(viewmats[:, :3], (3, 1, 1))
    viewmats = steadied(viewmats)

    layout = LAYOUTS[landmarks.shape[1]]
    left, right = (landmarks[:, list(eye)].mean(1) for eye in layout.eyes)
    unit = np.linalg.norm(right - left, axis=1)
    corners = landmarks[:, layout.mouth[0]], landmarks[:, layout.mouth[10]]
    width = np.linalg.norm(corners[1] - corners[0], axis=1) / unit
    opening = lip_opening(landmarks.astype(np.float32)) / unit
    expression = np.concatenate([scores, opening[:, None] * 3, width[:, None]], 1)
    expression -= _rest(expression, opening)
    low, high = np.percentile(blink, [20, 99.5])
    focal = recording.size / (2 * np.tan(np.radians(MEDIAPIPE_FOV_DEG / 2)))
    return Track(
        expression=expression.astype(np.float32),
        blink=np.clip((blink - low) / max(high - low, 1e-3), 0, 1).astype(np.float32),
        viewmats=viewmats.astype(np.float32),
        K=np.array([[focal, 0, recording.size / 2], [0, focal, recording.size / 2], [0, 0, 1]], np.float32),
        landmarks=landmarks.astype(np.float32),
        seen=found.seen,
        source="mediapipe FaceLandmarker",
    )


def steadied(
    viewmats: npt.NDArray[np.float64],  # [T, 4, 4]
    window: int = clock.FPS // 5,  # frames, odd
) -> npt.NDArray[np.float64]:
    """Smoothed over a fifth of a second: a head moves slower than what tracks it trembles."""
    smooth = viewmats.copy()
    window = min(window, len(viewmats) - (len(viewmats) + 1) % 2)
    if window > STEADY_ORDER:
        smooth[:, :3] = savgol_filter(viewmats[:, :3], window, STEADY_ORDER, axis=0)
    u, _, vt = np.linalg.svd(smooth[:, :3, :3])
    smooth[:, :3, :3] = u @ vt
    return smooth


def _rest(expression: npt.NDArray[np.float64], opening: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The closed-mouth rest: where the lips are nearly shut and hold still for a fifth of a second."""
    half = clock.FPS // 10
    padded = np.pad(expression, ((half, half), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1, axis=0)
    motion = windows.std(-1).sum(1)
    shut = opening <= np.percentile(opening, 30)
    still = motion <= np.percentile(motion[shut], 20)
    return np.asarray(np.median(expression[shut & still], axis=0))
