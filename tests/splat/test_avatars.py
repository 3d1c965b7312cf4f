"""Blendshapes, and the serving call that blends, draws and composites."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from heads import avatar, job, plate

from talksplat import splat
from talksplat.splat import Blendshapes, Gaussians, reference


def test_blending_agrees_with_the_oracle(isa: str) -> None:
    shapes = avatar()
    weights = np.random.default_rng(1).normal(0, 1, (3, 5)).astype(np.float32)
    got = splat.blend(shapes, weights, isa=isa)
    assert got.means.shape == (3, 333, 3)
    for f in range(3):
        want = reference.blend(shapes.canonical, shapes.bases, shapes.basis_scales, weights[f])
        for name, a, b in zip(Gaussians._fields, got, want, strict=True):
            np.testing.assert_allclose(a[f], b, rtol=2e-6, atol=2e-6, err_msg=name)


def test_one_frame_of_weights_gives_one_frame(isa: str) -> None:
    shapes = avatar(40)
    got = splat.blend(shapes, np.zeros(5, np.float32), isa=isa)
    np.testing.assert_array_equal(got.means, shapes.canonical[:3].T)
    np.testing.assert_allclose(got.scales, np.exp(shapes.canonical[7:10].T), rtol=1e-6)


def test_a_basis_of_weight_zero_is_not_read(isa: str) -> None:
    """Were it read, the infinite scale would give infinity times zero."""
    shapes = avatar(50)
    scales = shapes.basis_scales.copy()
    scales[:, 2] = np.inf
    weights = np.array([0.5, -1, 0, 2, 0.1], np.float32)
    got = splat.blend(Blendshapes(shapes.canonical, shapes.bases, scales), weights, isa=isa)
    want = splat.blend(shapes, weights, isa=isa)
    np.testing.assert_array_equal(got.means, want.means)


def test_memory_mapped_tables_are_used_where_they_lie(tmp_path: Path, isa: str) -> None:
    shapes = avatar()
    mapped = []
    for name in ("canonical", "bases", "basis_scales"):
        np.save(tmp_path / f"{name}.npy", getattr(shapes, name))
        mapped.append(np.load(tmp_path / f"{name}.npy", mmap_mode="r"))
    lazy = Blendshapes(*mapped)
    weights = np.linspace(-1, 1, 5, dtype=np.float32)
    np.testing.assert_array_equal(
        splat.blend(lazy, weights, isa=isa).quats, splat.blend(shapes, weights, isa=isa).quats
    )


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_serving_equals_blend_render_and_composite(isa: str, mode: splat.Mode) -> None:
    one = job(avatar())
    [got] = splat.render_onto([one], mode=mode, isa=isa)
    gaussians = splat.blend(one.avatar, one.weights, isa=isa)
    colors, alphas = splat.render(*gaussians, one.viewmat, one.K, 90, 70, mode=mode, isa=isa)
    want = 255 * colors.astype(np.float64) + (1 - alphas) * one.plate
    assert got.dtype == np.uint8
    assert np.abs(got - np.clip(want, 0, 255)).max() <= 0.501


def test_the_plate_comes_through_where_nothing_is_drawn(isa: str) -> None:
    shapes = avatar(2000)
    shapes.canonical[0] += 0.8  # to the right
    one = job(shapes, height=200, width=200)
    [frame] = splat.render_onto([one], isa=isa)
    alphas = splat.render(*splat.blend(shapes, one.weights), one.viewmat, one.K, 200, 200)[1]
    untouched = alphas[..., 0] == 0
    assert untouched.mean() > 0.2
    np.testing.assert_array_equal(frame[untouched], one.plate[untouched])
    assert (frame != one.plate).any()


def test_jobs_may_mix_avatars_and_sizes(isa: str) -> None:
    nobody = Blendshapes(np.empty((14, 0), np.float32), np.empty((14, 3, 0), np.int8), np.empty((14, 3), np.float32))
    jobs = [
        job(avatar(200, 3, seed=1), 1),
        job(avatar(), 2, height=33, width=65),
        job(avatar(200, 3, seed=1), 3),
        job(nobody, 4),
    ]
    together = splat.render_onto(jobs, isa=isa, threads=3)
    for one, frame in zip(jobs, together, strict=True):
        np.testing.assert_array_equal(frame, splat.render_onto([one], isa=isa)[0])
    np.testing.assert_array_equal(together[3], jobs[3].plate)


def test_frames_go_to_the_arrays_that_are_given(isa: str) -> None:
    shapes = avatar()
    want = splat.render_onto([job(shapes)], isa=isa)[0]
    out = np.empty((70, 90, 3), np.uint8)
    assert splat.render_onto([job(shapes, out=out)], isa=isa)[0] is out
    np.testing.assert_array_equal(out, want)
    in_place = plate(70, 90)
    splat.render_onto([job(shapes, plate=in_place, out=in_place)], isa=isa)
    np.testing.assert_array_equal(in_place, want)


def test_an_avatar_without_bases_does_not_move(isa: str) -> None:
    shapes = avatar(20, rank=0)
    still = splat.blend(shapes, np.zeros(0, np.float32), isa=isa)
    np.testing.assert_array_equal(still.means, shapes.canonical[:3].T)
    assert splat.blend(shapes, np.zeros((2, 0), np.float32), isa=isa).quats.shape == (2, 20, 4)


def test_no_jobs_give_no_frames() -> None:
    assert splat.render_onto([]) == []


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weights": np.zeros(4, np.float32)}, ValueError, r"`weights` must have the shape \[5\], not \[4\]"),
        ({"weights": np.full(5, np.nan, np.float32)}, ValueError, "`weights` must be finite"),
        ({"plate": np.zeros((70, 90, 4), np.uint8)}, ValueError, "`plate` must have the shape"),
        ({"plate": np.zeros((70, 90, 3), np.float32)}, TypeError, "`plate` must have the dtype uint8"),
        ({"out": np.zeros((70, 91, 3), np.uint8)}, ValueError, "`out` must have the shape"),
        ({"out": np.zeros((70, 180, 3), np.uint8)[:, ::2]}, ValueError, "`out` must be a C-contiguous"),
        ({"viewmat": np.zeros((4, 4))}, TypeError, "`viewmat` must have the dtype float32"),
        ({"K": np.zeros((3, 3), np.float32)}, ValueError, "`K` must have positive focal lengths"),
    ],
)
def test_bad_jobs_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        splat.render_onto([job(avatar(), **changes)])


def test_bad_tables_are_refused() -> None:
    shapes = avatar()
    with pytest.raises(ValueError, match=r"`canonical` must have the shape \[14, N\]"):
        Blendshapes(shapes.canonical[:13], shapes.bases, shapes.basis_scales)
    with pytest.raises(ValueError, match=r"`bases` must have the shape \[14, K, 333\]"):
        Blendshapes(shapes.canonical, shapes.bases[:, :, :5], shapes.basis_scales)
    with pytest.raises(TypeError, match="`bases` must have the dtype int8"):
        Blendshapes(shapes.canonical, shapes.bases.astype(np.float32), shapes.basis_scales)
    with pytest.raises(ValueError, match=r"`basis_scales` must have the shape \[14, 5\]"):
        Blendshapes(shapes.canonical, shapes.bases, shapes.basis_scales[:, :2])
    with pytest.raises(ValueError, match="`bases` must be C-contiguous"):
        Blendshapes(shapes.canonical, np.asfortranarray(shapes.bases), shapes.basis_scales)
    with pytest.raises(ValueError, match="at most 256"):
        Blendshapes(np.zeros((14, 1), np.float32), np.zeros((14, 257, 1), np.int8), np.zeros((14, 257), np.float32))
