"""The pose that pixels agree about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from talking_head import SIZE, Float32, landmarks_3d, make_track

from talksplat import splat
from talksplat_export import geometry, registration
from talksplat_export.recording import Recording
from talksplat_export.track import Track, rotation_zyx

FRAMES = 40


@dataclass
class Painted:
    """Pictures that a recording would yield."""

    images: npt.NDArray[np.uint8]  # [T, S, S, 3]
    size: int = SIZE

    def frames(self, start: int = 0, stop: int | None = None, step: int = 1) -> Iterator[npt.NDArray[np.uint8]]:
        return iter(self.images[start:stop:step])


def nodding() -> Track:
    """The tests' head, turning smoothly."""
    track, points = make_track(FRAMES)
    time = np.arange(FRAMES) / 25
    turns = rotation_zyx(np.stack([0.05 * np.sin(5 * time), 0.12 * np.sin(3 * time), 0.04 * np.cos(2 * time)], 1))
    viewmats = np.tile(np.eye(4, dtype=np.float32), (FRAMES, 1, 1))
    viewmats[:, :3, :3] = np.diag([1.0, -1.0, -1.0]) @ turns
    viewmats[:, 2, 3] = 1
    views = [geometry.project(points[0], view, track.K)[:, :2] for view in viewmats]
    return replace(track, viewmats=viewmats, landmarks=np.stack(views).astype(np.float32))


def painted(track: Track) -> Painted:
    """A speckled shell through the landmarks, as the track's poses see it, under light that changes."""
    rng = np.random.default_rng(0)
    places = rng.uniform((-9, -9), (9, 8), (6000, 2))
    low, high = landmarks_3d().min(0)[:2] - 2, landmarks_3d().max(0)[:2] + 2
    places = places[((places > low) & (places < high)).all(1)]
    means = np.concatenate([places, 9 - 0.06 * (places**2).sum(1, keepdims=True)], 1).astype(np.float32) / 100
    count = len(means)
    colors, _ = splat.render(
        means,
        np.tile(np.array([1, 0, 0, 0], np.float32), (count, 1)),
        np.full((count, 3), 0.0025, np.float32),
        np.full(count, 0.9, np.float32),
        np.repeat(rng.uniform(0.1, 0.8, (count, 1)), 3, 1).astype(np.float32),
        track.viewmats,
        np.tile(track.K, (len(track), 1, 1)),
        SIZE,
        SIZE,
    )
    light = rng.uniform(0.8, 1.1, (len(track), 1, 1, 1))
    return Painted((colors * light * 255).clip(0, 255).astype(np.uint8))


def trembling(track: Track) -> Track:
    """The track with poses that are off by a pixel or two."""
    rng = np.random.default_rng(1)
    off = np.tile(np.eye(4), (len(track), 1, 1))
    off[:, :3, :3] = rotation_zyx(rng.normal(0, 0.015, (len(track), 3)))
    off[:, :3, 3] = rng.normal(0, 0.002, (len(track), 3))
    return replace(track, viewmats=(track.viewmats @ off).astype(np.float32))


def swimming(track: Track) -> float:
    """By how many pixels points of the true head swim under the poses of a track."""
    still = replace(track, landmarks=nodding().landmarks)
    return geometry.triangulate(still, np.zeros((len(track), 0), np.float32))[1]


@pytest.fixture(scope="module")
def refined() -> tuple[Track, Track]:
    truth = nodding()
    given = replace(trembling(truth), seen=np.arange(FRAMES) != 7)
    pictures = painted(truth)
    pictures.images[7] = 0
    done: list[int] = []
    recording: Recording = pictures  # type: ignore[assignment]
    found = registration.refine(recording, given, done.append)
    assert done == list(range(1, FRAMES + 1))
    return given, found


def test_points_of_the_head_swim_less_under_refined_poses(refined: tuple[Track, Track]) -> None:
    given, found = refined
    assert swimming(given) > 0.8
    assert swimming(found) < 0.4 * swimming(given)


def test_only_the_poses_change(refined: tuple[Track, Track]) -> None:
    given, found = refined
    assert np.array_equal(found.landmarks, given.landmarks)
    assert np.array_equal(found.expression, given.expression)
    rotations: Float32 = found.viewmats[:, :3, :3]
    assert np.allclose(rotations @ rotations.transpose(0, 2, 1), np.eye(3), atol=1e-5)


def test_a_registration_goes_on_where_it_was_interrupted(tmp_path: Path, refined: tuple[Track, Track]) -> None:
    given, found = refined
    pictures = painted(nodding())
    pictures.images[7] = 0
    recording: Recording = pictures  # type: ignore[assignment]
    kept, done = tmp_path / "poses.npz", list[int]()

    def interrupted(count: int) -> None:
        done.append(count)
        if count == FRAMES // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        registration.refine(recording, given, interrupted, kept)
    assert registration.Progress.load(kept).done == FRAMES // 2
    resumed = registration.refine(recording, given, done.append, kept)
    assert done == list(range(1, FRAMES + 1))
    np.testing.assert_array_equal(resumed.viewmats, found.viewmats)
    assert not kept.exists()


def test_poses_that_were_kept_of_another_track_are_not_used(tmp_path: Path, refined: tuple[Track, Track]) -> None:
    given, found = refined
    poses = found.viewmats.astype(np.float64)
    registration.Progress(FRAMES, poses, poses).save(tmp_path / "poses.npz")
    assert registration.Progress.of(given, tmp_path / "poses.npz").done == 0
