"""The torch wrapper: the same images and gradients, through autograd."""

import numpy as np
import pytest
import torch

from talksplat import splat
from talksplat.bench._head import camera, head
from talksplat_export import splat_torch


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
