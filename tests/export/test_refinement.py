"""Pose and weights that make what is drawn look like what was recorded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from talking_head import SIZE, Float32, make_track

from talksplat import splat
from talksplat.avatar import ATTRIBUTES, BLINK, WEIGHTS
from talksplat_export import geometry, refinement
from talksplat_export.recording import Recording
from talksplat_export.track import Track, rotation_zyx

FRAMES = 6
UNSEEN = 2
REFINED = range(1, 5)


@dataclass
class Drawn:
    """Pictures that a recording would yield."""

    images: list[npt.NDArray[np.uint8]]  # [S, S, 3]

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[npt.NDArray[np.uint8]]:
        return iter(self.images[start:stop])


def speckled() -> splat.Blendshapes:
    """A shell whose lower half follows the first weight; the last one darkens its upper half."""
    rng = np.random.default_rng(0)
    places = rng.uniform((-7, -7), (7, 7), (1200, 2))
    canonical = np.zeros((ATTRIBUTES, len(places)), np.float32)
    canonical[:2] = places.T / 100
    canonical[2] = (9 - 0.06 * (places**2).sum(1)) / 100
    canonical[3] = 1  # no turn
    canonical[7:10] = np.log(0.009)
    canonical[10] = 5  # opacity .99
    canonical[11:14] = rng.uniform(0.1, 0.8, (3, len(places)))
    bases = np.zeros((ATTRIBUTES, WEIGHTS, len(places)), np.int8)
    bases[1, 0, places[:, 1] < 0] = -100
    bases[11:14, BLINK, places[:, 1] > 3] = -100
    scales = np.zeros((ATTRIBUTES, WEIGHTS), np.float32)
    scales[1, 0], scales[11:14, BLINK] = 0.015 / 100, 0.3 / 100
    return splat.Blendshapes(canonical, bases, scales)


@pytest.fixture(scope="module")
def shapes() -> splat.Blendshapes:
    return speckled()


@pytest.fixture(scope="module")
def basis() -> Float32:
    basis = np.zeros((1, BLINK), np.float32)
    basis[0, 0] = 2
    return basis


@pytest.fixture(scope="module")
def truth() -> Track:
    blink = np.random.default_rng(1).uniform(0.2, 0.8, FRAMES).astype(np.float32)
    return replace(make_track(FRAMES)[0], blink=blink)


@pytest.fixture(scope="module")
def pictures(truth: Track, shapes: splat.Blendshapes, basis: Float32) -> Recording:
    """The truth, drawn over itself until that changes nothing, as Gaussians over the frame that they fit."""
    images = [np.full((SIZE, SIZE, 3), 120, np.uint8)] * FRAMES
    states = list(zip(geometry.frame_weights(truth, basis), truth.viewmats, strict=True))
    for _ in range(8):
        images = splat.render_onto(
            [splat.Job(shapes, *state, truth.K, plate) for state, plate in zip(states, images, strict=True)]
        )
    drawn: Recording = Drawn(images)  # type: ignore[assignment]
    return drawn


@pytest.fixture(scope="module")
def tracks(truth: Track, pictures: Recording, shapes: splat.Blendshapes, basis: Float32) -> tuple[Track, Track, Track]:
    """The truth, a track that is off, and that one refined."""
    rng = np.random.default_rng(2)
    off = np.tile(np.eye(4), (FRAMES, 1, 1))
    off[:, :3, :3] = rotation_zyx(rng.normal(0, 0.006, (FRAMES, 3)))
    off[:, :2, 3] = rng.normal(0, 0.0015, (FRAMES, 2))
    given = replace(
        truth,
        expression=truth.expression + rng.choice([-0.08, 0.08], (FRAMES, 1)).astype(np.float32),
        blink=truth.blink + rng.choice([-0.2, 0.2], FRAMES).astype(np.float32),
        viewmats=(truth.viewmats @ off).astype(np.float32),
        seen=np.arange(FRAMES) != UNSEEN,
    )
    done: list[int] = []
    found = refinement.refine(pictures, given, basis, shapes, REFINED, done.append)
    assert done == [1, 2, 3, 4]
    return truth, given, found


def off_by(track: Track, truth: Track, shapes: splat.Blendshapes) -> Float32:  # [T]
    """Mean distance of the Gaussians at rest from where they are, in pixels."""
    means = shapes.canonical[:3].T
    pairs = zip(track.viewmats, truth.viewmats, strict=True)
    at = [[geometry.project(means, view, truth.K)[:, :2] for view in pair] for pair in pairs]
    return np.array([np.linalg.norm(a - b, axis=1).mean() for a, b in at], np.float32)


def test_pose_expression_and_blink_come_nearer_to_the_truth(
    tracks: tuple[Track, Track, Track], shapes: splat.Blendshapes
) -> None:
    truth, given, found = tracks
    improved = [index for index in REFINED if index != UNSEEN]

    def mean(errors: Float32) -> float:
        return float(np.abs(errors)[improved].mean())

    assert mean(off_by(found, truth, shapes)) < 0.4 * mean(off_by(given, truth, shapes))
    assert mean(found.expression - truth.expression) < 0.6 * mean(given.expression - truth.expression)
    assert mean(found.blink - truth.blink) < 0.2 * mean(given.blink - truth.blink)


def test_frames_without_a_face_and_frames_not_asked_for_stay(tracks: tuple[Track, Track, Track]) -> None:
    _, given, found = tracks
    for index in (0, UNSEEN, FRAMES - 1):
        assert np.allclose(found.viewmats[index], given.viewmats[index], atol=1e-6)
        assert np.allclose(found.expression[index], given.expression[index], atol=1e-6)
        assert found.blink[index] == given.blink[index]


def test_an_interrupted_refinement_goes_on_where_it_was(
    tracks: tuple[Track, Track, Track], shapes: splat.Blendshapes, basis: Float32, pictures: Recording, tmp_path: Path
) -> None:
    _, given, straight = tracks
    kept = tmp_path / "refining.npz"

    def interrupt(done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refinement.refine(pictures, given, basis, shapes, REFINED, interrupt, kept)
    done: list[int] = []
    found = refinement.refine(pictures, given, basis, shapes, REFINED, done.append, kept)
    assert done == [3, 4]
    np.testing.assert_array_equal(found.viewmats, straight.viewmats)
    np.testing.assert_array_equal(found.expression, straight.expression)


def test_a_head_outside_the_picture_stays(shapes: splat.Blendshapes, basis: Float32) -> None:
    track, _ = make_track(1)
    away = track.viewmats.copy()
    away[:, 0, 3] = 5
    track = replace(track, viewmats=away)
    recording: Recording = Drawn([np.zeros((SIZE, SIZE, 3), np.uint8)])  # type: ignore[assignment]
    found = refinement.refine(recording, track, basis, shapes, range(1))
    assert np.allclose(found.viewmats, track.viewmats, atol=1e-6)
