"""Drawing: parity with the float64 oracle, and what is promised of odd input."""

import multiprocessing
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from talksplat import splat
from talksplat.bench._head import BACKGROUND, camera, head
from talksplat.splat import Gaussians, reference

VIEW, K = camera(96, 96)


def test_exact_agrees_with_the_oracle(isa: str) -> None:
    g = head(1500)
    colors, alphas = splat.render(*g, VIEW, K, 96, 96, backgrounds=BACKGROUND, isa=isa)
    want_colors, want_alphas = reference.render(g, VIEW, K, 96, 96, BACKGROUND)
    assert colors.dtype == alphas.dtype == np.float32
    assert reference.psnr(colors, want_colors) > 100
    assert reference.psnr(alphas, want_alphas) > 100


def test_fast_stays_close_to_the_oracle(isa: str) -> None:
    g = head(1500)
    colors, alphas = splat.render(*g, VIEW, K, 96, 96, backgrounds=BACKGROUND, mode="fast", isa=isa)
    want_colors, want_alphas = reference.render(g, VIEW, K, 96, 96, BACKGROUND)
    assert reference.psnr(colors, want_colors) > 70
    assert reference.psnr(alphas, want_alphas) > 70


def test_exact_agrees_with_the_oracle_on_hard_scenes(isa: str, stress_scene: Gaussians) -> None:
    colors, alphas = splat.render(*stress_scene, VIEW, K, 96, 96, backgrounds=BACKGROUND, isa=isa)
    want_colors, want_alphas = reference.render(stress_scene, VIEW, K, 96, 96, BACKGROUND)
    assert want_alphas.max() > 0.004  # the scene shows something
    assert reference.psnr(colors, want_colors) > 90
    assert reference.psnr(alphas, want_alphas) > 90


def test_fast_is_finite_on_hard_scenes(isa: str, stress_scene: Gaussians) -> None:
    colors, alphas = splat.render(*stress_scene, VIEW, K, 96, 96, mode="fast", isa=isa)
    want = reference.render(stress_scene, VIEW, K, 96, 96)[0]
    assert np.isfinite(colors).all()
    assert alphas.min() >= 0
    assert alphas.max() <= 1
    assert reference.psnr(colors, want) > 40


def test_a_single_gaussian_has_the_alpha_that_one_computes_by_hand(isa: str) -> None:
    # Centre in the middle of pixel (8, 8), 2 px of standard deviation: 4 + 0.3 px² of variance.
    g = Gaussians(
        np.array([[0.0, 0.0, 2.0]], np.float32),
        np.array([[2.0, 0.0, 0.0, 0.0]], np.float32),
        np.full((1, 3), 0.04, np.float32),
        np.array([0.5], np.float32),
        np.array([[1.0, 0.5, 0.25]], np.float32),
    )
    intrinsics = np.array([[100, 0, 8.5], [0, 100, 8.5], [0, 0, 1]], np.float32)
    colors, alphas = splat.render(*g, np.eye(4, dtype=np.float32), intrinsics, 17, 17, isa=isa)
    assert alphas[8, 8, 0] == pytest.approx(0.5, rel=1e-5)
    assert alphas[8, 11, 0] == pytest.approx(0.5 * np.exp(-9 / 2 / 4.3), rel=1e-5)
    assert alphas[4, 8, 0] == pytest.approx(0.5 * np.exp(-16 / 2 / 4.3), rel=1e-5)
    assert colors[8, 8] == pytest.approx([0.5, 0.25, 0.125], rel=1e-5)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 5), (33, 31), (97, 64), (40, 130)])
def test_any_size_is_drawn(isa: str, width: int, height: int) -> None:
    g = head(300)
    view, intrinsics = camera(width, height)
    colors, alphas = splat.render(*g, view, intrinsics, width, height, isa=isa)
    want_colors, want_alphas = reference.render(g, view, intrinsics, width, height)
    assert colors.shape == (height, width, 3)
    assert alphas.shape == (height, width, 1)
    np.testing.assert_allclose(colors, want_colors, atol=1e-3)
    np.testing.assert_allclose(alphas, want_alphas, atol=1e-3)


def test_the_largest_size_is_drawn() -> None:
    view, intrinsics = camera(splat.MAX_SIZE, 2)
    colors, _ = splat.render(*head(10), view, intrinsics, splat.MAX_SIZE, 2)
    assert colors.shape == (2, splat.MAX_SIZE, 3)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_a_batch_equals_its_frames(isa: str, mode: splat.Mode) -> None:
    g = head(500)
    rng = np.random.default_rng(0)
    frames = 5
    moved = g.means + rng.normal(0, 0.02, (frames, *g.means.shape)).astype(np.float32)
    views = np.repeat(VIEW[None], frames, 0)
    views[:, :3, 3] += rng.normal(0, 0.1, (frames, 3)).astype(np.float32)
    backgrounds = rng.random((frames, 3), np.float32)
    batch = splat.render(moved, *g[1:], views, K, 96, 80, backgrounds=backgrounds, mode=mode, isa=isa, threads=3)
    for f in range(frames):
        single = splat.render(moved[f], *g[1:], views[f], K, 96, 80, backgrounds=backgrounds[f], mode=mode, isa=isa)
        np.testing.assert_array_equal(batch[0][f], single[0])
        np.testing.assert_array_equal(batch[1][f], single[1])


def test_calls_from_several_threads_do_not_disturb_each_other() -> None:
    scenes = [head(300, seed) for seed in range(4)]
    views = np.repeat(VIEW[None], 3, 0)
    want = [splat.render(*g, views, K, 64, 64, threads=1)[0] for g in scenes]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not np.array_equal(splat.render(*scenes[i], views, K, 64, 64, threads=3)[0], want[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(scenes))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_forked_child_has_threads_of_its_own() -> None:
    g = head(100)
    views = np.repeat(VIEW[None], 4, 0)
    splat.render(*g, views, K, 48, 48, threads=3)  # now this process has a pool, which a child does not inherit
    child = multiprocessing.get_context("fork").Process(
        target=splat.render, args=(*g, views, K, 48, 48), kwargs={"threads": 3}
    )
    child.start()
    child.join(20)
    assert child.exitcode == 0


def test_where_no_more_threads_can_be_had_those_that_are_there_draw() -> None:
    code = """
import resource, numpy as np
from talksplat import splat
from talksplat.bench._head import camera, head
gaussians, (view, intrinsics) = head(50), camera(32, 32)
views = np.repeat(view[None], 64, 0)
want, _ = splat.render(*gaussians, views, intrinsics, 32, 32, threads=1)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (24 << 20), -1))  # two stacks of a thread
for _ in range(3):
    got, _ = splat.render(*gaussians, views, intrinsics, 32, 32, threads=64)
    assert np.array_equal(got, want)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)


def test_drawing_leaves_the_callers_floating_point_mode_alone(isa: str) -> None:
    splat.render(*head(50), VIEW, K, 32, 32, isa=isa)
    assert np.float32(1e-40) * np.float32(0.5) > 0  # flush-to-zero is set inside only


def test_no_gaussians_leave_the_background(isa: str) -> None:
    nothing = Gaussians(*(a[:0] for a in head(10)))
    colors, alphas = splat.render(*nothing, VIEW, K, 50, 40, backgrounds=BACKGROUND, isa=isa)
    assert (colors == BACKGROUND).all()
    assert (alphas == 0).all()


def test_gaussians_behind_the_camera_leave_the_background(isa: str) -> None:
    view = VIEW.copy()
    view[2, 3] = -5
    colors, alphas = splat.render(*head(200), view, K, 50, 40, backgrounds=BACKGROUND, isa=isa)
    assert (colors == BACKGROUND).all()
    assert (alphas == 0).all()


def test_equal_depths_keep_their_order(isa: str) -> None:
    g = Gaussians(
        np.zeros((2, 3), np.float32),
        np.array([[1, 0, 0, 0]] * 2, np.float32),
        np.full((2, 3), 0.5, np.float32),
        np.full(2, 0.9, np.float32),
        np.array([[1, 0, 0], [0, 1, 0]], np.float32),
    )
    view = np.eye(4, dtype=np.float32)
    view[2, 3] = 5
    colors, _ = splat.render(*g, view, K, 96, 96, isa=isa)
    assert colors[48, 48] == pytest.approx([0.9, 0.09, 0], abs=1e-3)
    swapped = Gaussians(*(a[::-1] for a in g))
    colors, _ = splat.render(*swapped, view, K, 96, 96, isa=isa)
    assert colors[48, 48] == pytest.approx([0.09, 0.9, 0], abs=1e-3)


def test_depths_closer_than_float32_can_tell_are_told_apart(isa: str) -> None:
    near, far = np.float32(0.1), np.nextafter(np.float32(0.1), np.float32(1))
    means = np.array([[0, 0, far], [0, 0, near]], np.float32)
    assert np.float32(5) + near == np.float32(5) + far
    g = Gaussians(
        means,
        np.array([[1, 0, 0, 0]] * 2, np.float32),
        np.full((2, 3), 0.5, np.float32),
        np.full(2, 0.9, np.float32),
        np.array([[1, 0, 0], [0, 1, 0]], np.float32),
    )
    view = np.eye(4, dtype=np.float32)
    view[2, 3] = 5
    colors, _ = splat.render(*g, view, K, 96, 96, isa=isa)
    assert colors[48, 48] == pytest.approx([0.09, 0.9, 0], abs=1e-3)


def test_arrays_that_are_not_contiguous_are_copied() -> None:
    g = head(200)
    want = splat.render(*g, VIEW, K, 64, 64)
    strided = Gaussians(*(np.repeat(a, 2, axis=0)[::2] for a in g))
    assert not strided.means.flags.c_contiguous
    got = splat.render(*strided, VIEW.T.copy().T, K, 64, 64)
    np.testing.assert_array_equal(got[0], want[0])


def test_read_only_arrays_are_accepted() -> None:
    g = head(50)
    for array in g:
        array.flags.writeable = False
    splat.render(*g, VIEW, K, 32, 32)


floats = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(max_examples=60)
@given(
    means=arrays(np.float32, (6, 3), elements=floats),
    quats=arrays(np.float32, (6, 4), elements=floats),
    scales=arrays(np.float32, (6, 3), elements=floats),
    opacities=arrays(np.float32, 6, elements=floats),
    mode=st.sampled_from(["exact", "fast"]),
)
def test_whatever_the_numbers_the_image_is_finite(
    means: Any, quats: Any, scales: Any, opacities: Any, mode: Any
) -> None:
    colors = np.full((6, 3), 0.5, np.float32)
    for isa in splat.isas():
        image, alphas = splat.render(means, quats, scales, opacities, colors, VIEW, K, 40, 40, mode=mode, isa=isa)
        assert np.isfinite(image).all()
        assert alphas.min() >= 0
        assert alphas.max() <= 1


def _arguments(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        **head(10)._asdict(), "viewmats": VIEW, "Ks": K, "width": 32, "height": 32,
    }  # fmt: skip
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"means": np.zeros((10, 2), np.float32)}, ValueError, r"`means` must have the shape \[N, 3\] or \[F, N, 3\]"),
        ({"means": np.zeros((10, 3))}, TypeError, "`means` must have the dtype float32, not float64"),
        ({"means": [[0, 0, 0]]}, TypeError, "`means` must be a NumPy array, not list"),
        ({"quats": np.zeros((9, 4), np.float32)}, ValueError, r"`quats` must have the shape \[10, 4\] or"),
        ({"scales": np.zeros(10, np.float32)}, ValueError, "`scales` must have the shape"),
        ({"opacities": np.zeros((10, 1), np.float32)}, ValueError, "`opacities` must have the shape"),
        ({"colors": np.zeros((10, 4), np.float32)}, ValueError, "`colors` must have the shape"),
        ({"viewmats": np.zeros((3, 4), np.float32)}, ValueError, "`viewmats` must have the shape"),
        ({"viewmats": np.full((4, 4), np.nan, np.float32)}, ValueError, "`viewmats` must be finite"),
        ({"Ks": np.zeros((3, 3), np.float32)}, ValueError, "`Ks` must have positive focal lengths"),
        ({"Ks": np.stack([K, K]), "viewmats": np.stack([VIEW] * 3)}, ValueError, "`Ks` has 2 frames"),
        ({"backgrounds": np.zeros(4, np.float32)}, ValueError, "`backgrounds` must have the shape"),
        ({"width": 0}, ValueError, "`width` must lie between 1 and 8192 pixels, not 0"),
        ({"height": 8193}, ValueError, "`height` must lie between"),
        ({"height": 3.5}, TypeError, "`height` must be an integer, not float"),
        ({"mode": "best"}, ValueError, "`mode` must be 'exact' or 'fast', not 'best'"),
        ({"isa": "sse9"}, ValueError, "`isa` must be one of"),
        ({"threads": 0}, ValueError, "`threads` must be at least 1"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        splat.render(**_arguments(**changes))
