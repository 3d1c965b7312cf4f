"""Coefficients, landmarks in 3D and the region, against what they were made from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import talking_head
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from talksplat.avatar import COEFFICIENTS
from talksplat_export import geometry, plates
from talksplat_export.track import Track, TrackError, lip_opening

Float32 = npt.NDArray[np.float32]
SIZE = talking_head.SIZE


@given(st.integers(1, 30), st.integers(0, 10_000))
@settings(max_examples=25)
def test_rest_stays_zero_and_coefficients_have_unit_size(channels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    expression = rng.uniform(0, 1, (80, channels)).astype(np.float32)
    basis = geometry.coefficient_basis(expression)
    assert basis.shape == (channels, COEFFICIENTS)
    coefficients = expression @ basis
    used = basis.any(0)
    np.testing.assert_allclose(np.sqrt(np.mean(coefficients[:, used] ** 2, 0)), 1, rtol=1e-3)
    assert used[: used.sum()].all()  # what is not used is at the end
    assert not (np.zeros((1, channels), np.float32) @ basis).any()


def test_an_expression_is_kept_by_its_coefficients() -> None:
    rng = np.random.default_rng(0)
    expression = (rng.uniform(0, 1, (200, 4)) @ rng.uniform(-1, 1, (4, 50))).astype(np.float32)
    coefficients = expression @ geometry.coefficient_basis(expression, energy=0.999999)
    assert coefficients.any(0).sum() == 4
    solution = np.linalg.lstsq(coefficients, expression, rcond=None)[0]
    np.testing.assert_allclose(coefficients @ solution, expression, atol=1e-3)


def test_a_track_of_another_source_than_the_avatars_is_refused() -> None:
    track, _ = talking_head.make_track()
    channels = track.expression.shape[1]
    with pytest.raises(TrackError, match=f"has {channels} channels of expression, expected {channels + 3}"):
        geometry.frame_weights(track, np.zeros((channels + 3, COEFFICIENTS), np.float32))


def test_landmarks_are_found_in_3d_with_how_they_move() -> None:
    track, truth = talking_head.make_track()
    found, error = geometry.triangulate(track, track.expression, ridge=1e-6)
    assert error < 0.01
    np.testing.assert_allclose(found, truth, atol=2e-4)


def test_the_region_holds_the_mouth_and_leaves_brows_and_edges_to_the_plate() -> None:
    track, _ = talking_head.make_track()
    landmarks, _ = geometry.triangulate(track, track.expression)
    region = geometry.region(track, landmarks, track.expression, SIZE)
    rest = np.rint(geometry.project(landmarks[0], region.viewmat, region.K)).astype(int)

    def mask_at(indices: tuple[int, ...]) -> Float32:
        return np.array([region.mask[rest[i, 1], rest[i, 0]] for i in indices])

    assert mask_at(track.layout.mouth).min() > 0.98
    assert mask_at(track.layout.eyes[0]).min() > 0.5
    assert mask_at(track.layout.brows).max() < 0.1
    assert mask_at(track.layout.jaw[:2]).max() < 0.1
    assert mask_at((track.layout.jaw[8],)).min() > 0.9
    assert region.mask[0].max() == region.mask[:, 0].max() == region.mask[-1].max() == 0


def test_the_mask_moves_with_the_head() -> None:
    track, _ = talking_head.make_track()
    landmarks, _ = geometry.triangulate(track, track.expression)
    region = geometry.region(track, landmarks, track.expression, SIZE)
    whole = range(SIZE)
    np.testing.assert_allclose(region.seen(region.mask, region.viewmat, whole, whole), region.mask, atol=0.03)
    turned = track.viewmats[int(np.argmax(track.viewmats[:, 0, 2]))]
    seen = region.seen(region.mask, turned, whole, whole)
    rows, columns = (axis.ravel() for axis in np.nonzero(region.mask > 0))
    pixels = np.stack([columns, rows], 1) + 0.5
    points = geometry.unproject(pixels, region.depth[rows, columns].astype(np.float64), region.viewmat, region.K)
    there = geometry.project(points, turned, region.K)[:, :2]
    assert np.abs(there - pixels).max() > 3
    found = map_coordinates(seen, there[:, ::-1].T - 0.5, order=1)
    error = np.abs(found - region.mask[rows, columns])
    assert error.mean() < 0.02
    assert error.max() < 0.2


def test_seeds_lie_on_the_face_and_follow_the_jaw() -> None:
    track, truth = talking_head.make_track()
    landmarks, _ = geometry.triangulate(track, track.expression)
    region = geometry.region(track, landmarks, track.expression, SIZE)
    image = np.full((SIZE, SIZE, 3), 128, np.uint8)
    images = dict.fromkeys(geometry.extreme_frames(track, track.expression), image)
    seeded = geometry.seed(region, track, landmarks, track.expression, images, 500, np.random.default_rng(0))
    canonical, motion = seeded
    assert 400 < canonical.shape[1] <= 500
    assert motion.shape == (1, 3, canonical.shape[1])
    assert np.isfinite(canonical).all()
    np.testing.assert_allclose(canonical[11:14], 128 / 255, atol=1e-3)
    means = canonical[:3].T
    chin = np.argsort(np.linalg.norm(means[:, :2] - truth[0, 8, :2], axis=1))[:3]
    upper_lip = np.argsort(np.linalg.norm(means[:, :2] - truth[0, 51, :2], axis=1))[:3]
    assert motion[0, 1, chin].mean() < -0.01
    assert np.median(abs(motion[0, 1, upper_lip])) < 0.003


def test_a_face_that_is_hardly_there_is_refused() -> None:
    track, truth = talking_head.make_track()
    far = track.viewmats.copy()
    far[:, 2, 3] = 20
    weights = track.expression
    with pytest.raises(TrackError, match="too small"):
        geometry.region(replace(track, viewmats=far), truth, weights, talking_head.SIZE)


def test_plates_do_not_turn_back_within_a_blink() -> None:
    track, _ = talking_head.make_track(60)
    still = np.tile(track.viewmats[:1], (60, 1, 1))
    blink = np.zeros(60, np.float32)
    blink[20:60] = np.tile(np.array([1, 0, 0, 0, 0], np.float32), 8)  # any ten frames hold two
    blink[:20] = 1
    chosen = plates.choose(replace(track[:], viewmats=still, blink=blink, landmarks=track.landmarks[[0] * 60]), 10)
    assert blink[chosen.start] == blink[chosen.stop - 1] == 0


def test_plates_turn_back_where_the_head_is_still() -> None:
    track, _ = talking_head.make_track(80)
    viewmats = np.tile(track.viewmats[:1], (80, 1, 1))
    viewmats[:, 0, 3] += 0.02 * np.sin(np.arange(80) / 6)  # it sways, and stands still once in 19 frames
    chosen = plates.choose(replace(track[:], viewmats=viewmats, landmarks=track.landmarks[[0] * 80]), 48)
    speed = np.abs(np.diff(viewmats[chosen.start : chosen.stop, 0, 3]))
    assert max(speed[0], speed[-1]) < 0.2 * speed.max()


def test_the_head_in_the_plates_does_not_tremble_and_follows_what_it_does() -> None:
    track, _ = talking_head.make_track(80)
    trembling = track.viewmats.copy()
    trembling[:, :3, 3] += np.random.default_rng(0).normal(0, 0.001, (80, 3))
    true, seen = track.viewmats[20:60, :3, 3], trembling[20:60, :3, 3]
    steady = plates.poses(replace(track[:], viewmats=trembling), range(20, 60))[:, :3, 3]
    assert np.diff(steady, 2, axis=0).std() < 0.5 * np.diff(seen, 2, axis=0).std()
    assert np.abs(steady - true).mean() < np.abs(seen - true).mean()


def test_lips_open_along_the_face_whichever_way_it_is_turned() -> None:
    points = np.zeros((2, 68, 2), np.float32)
    points[:, 36:42], points[:, 42:48] = (-10, 0), (10, 0)
    points[:, [61, 62, 63]], points[:, [65, 66, 67]] = (0, 20), (0, 27)
    turn = np.array([[0, -1], [1, 0]], np.float32)
    points[1] = points[1] @ turn.T
    np.testing.assert_allclose(lip_opening(points), [7, 7], atol=1e-5)


@pytest.mark.parametrize("name", ["blink", "viewmats", "landmarks"])
def test_a_track_of_shapes_that_do_not_fit_is_refused(name: str) -> None:
    track, _ = talking_head.make_track(10)
    with pytest.raises(TrackError, match="expected"):
        Track(**{**vars(track), name: getattr(track, name)[:, :5] if name == "landmarks" else getattr(track, name)[:5]})


def test_a_track_is_the_same_after_it_was_saved(tmp_path: pytest.TempPathFactory) -> None:
    track, _ = talking_head.make_track(10)
    path = tmp_path / "track.npz"  # type: ignore[operator]
    track.save(path)
    loaded = Track.load(path)
    assert loaded.source == track.source
    np.testing.assert_array_equal(loaded.landmarks, track.landmarks)
