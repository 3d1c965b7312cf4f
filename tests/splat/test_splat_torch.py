"""The torch wrapper: the same images and gradients, through autograd."""

import inspect
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from talksplat import splat
from talksplat.bench._head import camera, head
from talksplat.splat import reference
from talksplat.splat.cuda import LOW_PASS, NEAR, DeviceError
from talksplat_export import cli, splat_torch


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    torch.set_num_threads(1)


def test_gradients_flow_to_the_gaussians_from_both_images() -> None:
    g, (view, K) = head(150), camera(40, 40)  # noqa: N806
    leaves = [torch.tensor(a, requires_grad=True) for a in g]
    colors, alphas = splat_torch.rasterization(
        leaves[0], leaves[1], leaves[2], leaves[3], leaves[4], torch.tensor(view), torch.tensor(K), 40, 40
    )
    (colors.square().sum() + 3 * alphas.sum()).backward()  # type: ignore[no-untyped-call]

    want_colors, want_alphas, tape = splat.render_with_tape(*g, view, K, 40, 40)
    np.testing.assert_array_equal(colors.detach().numpy(), want_colors)
    np.testing.assert_array_equal(alphas.detach().numpy(), want_alphas)
    want = tape.backward(2 * want_colors, np.full_like(want_alphas, 3))
    for leaf, gradient in zip(leaves, want, strict=True):
        assert leaf.grad is not None
        np.testing.assert_array_equal(leaf.grad.numpy(), gradient)


def test_an_image_that_gets_no_gradient_counts_as_zero() -> None:
    g, (view, K) = head(80), camera(32, 32)  # noqa: N806
    leaves = [torch.tensor(a, requires_grad=True) for a in g]
    colors, _ = splat_torch.rasterization(
        leaves[0], leaves[1], leaves[2], leaves[3], leaves[4], torch.tensor(view), torch.tensor(K), 32, 32
    )
    colors.sum().backward()  # type: ignore[no-untyped-call]
    assert leaves[0].grad is not None
    assert leaves[0].grad.abs().sum() > 0


def test_an_image_changed_in_place_before_the_backward_pass_is_noticed() -> None:
    g, (view, K) = head(80), camera(32, 32)  # noqa: N806
    means = torch.tensor(g.means, requires_grad=True)
    others = [torch.tensor(a) for a in g[1:]]
    colors, _ = splat_torch.rasterization(
        means, others[0], others[1], others[2], others[3], torch.tensor(view), torch.tensor(K), 32, 32
    )
    loss = colors.sum()
    with torch.no_grad():
        colors.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_ssim_has_the_gradient_of_the_kernel() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 30, 30, 3), np.float32), rng.random((2, 30, 30, 3), np.float32)
    leaf = torch.tensor(a, requires_grad=True)
    value = splat_torch.ssim(leaf, torch.tensor(b))
    (1 - value).mul(5).backward()  # type: ignore[no-untyped-call]
    want, gradient = splat.ssim_with_gradient(a, b)
    assert value.item() == pytest.approx(want)
    assert leaf.grad is not None
    np.testing.assert_allclose(leaf.grad.numpy(), -5 * gradient, rtol=1e-6)


def test_gradients_that_do_not_exist_are_refused() -> None:
    g, (view, K) = head(20), camera(32, 32)  # noqa: N806
    tensors = [torch.tensor(a) for a in g]
    with pytest.raises(ValueError, match="`viewmats` requires a gradient"):
        splat_torch.rasterization(
            tensors[0], tensors[1], tensors[2], tensors[3], tensors[4],
            torch.tensor(view, requires_grad=True), torch.tensor(K), 32, 32,
        )  # fmt: skip
    image = torch.rand(20, 20, 3, requires_grad=True)
    with pytest.raises(ValueError, match="`b` requires a gradient"):
        splat_torch.ssim(image, image)


# --- what happens on a GPU, as far as a CPU can tell ---------------------------------------------------------------


# As they are called here, with arguments in lists, mypy can't follow.
RASTERIZATION: Any = splat_torch.rasterization
GSPLAT: Any = splat_torch._gsplat


@pytest.fixture
def gsplat_by_the_core(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A module ``gsplat`` that draws each scene of a batch with the core, and keeps what it was asked for."""
    asked: list[dict[str, Any]] = []

    def rasterization(
        means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, colors: Tensor, viewmats: Tensor,
        Ks: Tensor, width: int, height: int, **options: Any,  # noqa: N803
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:  # fmt: skip
        asked.append(options)
        frames, count = len(means), means.shape[1]
        assert means.shape == scales.shape == colors.shape == (frames, count, 3)
        assert (quats.shape, opacities.shape) == ((frames, count, 4), (frames, count))
        assert (viewmats.shape, Ks.shape) == ((frames, 1, 4, 4), (frames, 1, 3, 3))
        behind = options["backgrounds"]
        drawn = RASTERIZATION(
            means, quats, scales, opacities, colors, viewmats[:, 0], Ks[:, 0], width, height,
            backgrounds=None if behind is None else behind[:, 0],
        )  # fmt: skip
        return drawn[0][:, None], drawn[1][:, None], {}

    module = types.ModuleType("gsplat")
    module.rasterization = rasterization  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gsplat", module)
    return asked


@pytest.mark.parametrize("frames", [None, 1, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_gsplat_gets_scenes_with_one_camera_each(
    frames: int | None, shared: bool, gsplat_by_the_core: list[dict[str, Any]]
) -> None:
    g, (view, K) = head(60), camera(32, 24)  # noqa: N806
    gaussians = [torch.tensor(a) for a in g]
    views, cameras, behind = torch.tensor(view), torch.tensor(K), torch.tensor([0.1, 0.2, 0.3])
    if frames is not None:
        views = views.repeat(frames, 1, 1)
        views[:, 0, 3] = 0.05 * torch.arange(frames)
        if not shared:
            gaussians = [a.expand(frames, *a.shape).contiguous() for a in gaussians]
            cameras, behind = cameras.repeat(frames, 1, 1), behind.repeat(frames, 1)
    for backgrounds in (None, behind):
        got = GSPLAT(*gaussians, views, cameras, 32, 24, backgrounds)
        want = RASTERIZATION(*gaussians, views, cameras, 32, 24, backgrounds=backgrounds)
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other)
    for options in gsplat_by_the_core:
        assert (options["near_plane"], options["eps2d"]) == (reference.NEAR, reference.LOW_PASS)
        assert options["rasterize_mode"] == "classic"


def test_numbers_of_frames_that_differ_are_refused(gsplat_by_the_core: list[dict[str, Any]]) -> None:
    g, (view, K) = head(10), camera(32, 32)  # noqa: N806
    means = torch.tensor(g.means)
    rest = [torch.tensor(a) for a in g[1:]]
    views = torch.tensor(view).repeat(2, 1, 1)
    with pytest.raises(ValueError, match=r"different numbers of frames: \[2, 3\]"):
        GSPLAT(means.expand(3, 10, 3), *rest, views, torch.tensor(K), 32, 32, None)


def test_a_gpu_without_gsplat_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gsplat", None)
    g, (view, K) = head(10), camera(32, 32)  # noqa: N806
    elsewhere = [torch.tensor(a, device="meta") for a in (*g, view, K)]
    with pytest.raises(DeviceError, match="needs gsplat"):
        RASTERIZATION(*elsewhere, 32, 32)


def test_a_fit_on_a_gpu_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert cli.main(["fit", "recording.mp4", "--out", "kim", "--device", "cuda"]) == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_tensors_on_different_devices_are_refused() -> None:
    here, there = torch.rand(20, 20, 3), torch.rand(20, 20, 3, device="meta")
    with pytest.raises(DeviceError, match="cpu, meta"):
        splat_torch.ssim(here, there)


@pytest.mark.parametrize("shape", [(30, 25, 3), (2, 24, 24, 3)])
def test_the_ssim_of_gpus_is_that_of_the_kernel(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(shape, np.float32), rng.random(shape, np.float32)
    leaf = torch.tensor(a, requires_grad=True)
    value = splat_torch._convolved_ssim(leaf, torch.tensor(b), 1.0)
    value.backward()  # type: ignore[no-untyped-call]
    want, gradient = splat.ssim_with_gradient(a, b)
    assert value.item() == pytest.approx(want, abs=1e-5)
    assert leaf.grad is not None
    np.testing.assert_allclose(leaf.grad.numpy(), gradient, atol=1e-6)


def test_the_pinned_gsplat_takes_what_it_is_given() -> None:
    gsplat = pytest.importorskip("gsplat", reason="the extra gpu is not installed")
    known = inspect.signature(gsplat.rasterization).parameters
    names = ["means", "quats", "scales", "opacities", "colors", "viewmats", "Ks", "width", "height"]
    assert list(known)[:9] == names
    assert {"near_plane", "eps2d", "packed", "backgrounds", "render_mode", "rasterize_mode"} <= set(known)


def test_gsplat_projects_as_the_oracle_does() -> None:
    """By gsplat's own PyTorch reference of its projection, which needs no CUDA."""
    impl = pytest.importorskip("gsplat.cuda._torch_impl", reason="the extra gpu is not installed")
    g, (view, K) = head(40), camera(64, 48)  # noqa: N806
    covars, _ = impl._quat_scale_to_covar_preci(torch.tensor(g.quats), torch.tensor(g.scales), True, False)
    _, centres, depths, conics, _ = impl._fully_fused_projection(
        torch.tensor(g.means), covars, torch.tensor(view)[None], torch.tensor(K)[None], 64, 48,
        eps2d=LOW_PASS, near_plane=NEAR,
    )  # fmt: skip
    order = torch.argsort(depths[0], stable=True).numpy()
    found = reference._front_to_back(g, view, K, 64, 48)
    assert len(found) == len(order)
    for index, (centre, covariance, _, _) in zip(order, found, strict=True):
        np.testing.assert_allclose(centres[0, index].numpy(), centre, rtol=1e-4)
        a, b, c = conics[0, index].tolist()
        np.testing.assert_allclose([[a, b], [b, c]], np.linalg.inv(covariance), rtol=2e-3, atol=1e-5)
