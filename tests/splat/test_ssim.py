"""SSIM against Wang et al.'s formula in float64, and its gradient against autograd."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from talksplat import splat


def oracle(a: Tensor, b: Tensor, data_range: float) -> Tensor:
    """Mean SSIM of [H, W, C] float64 by one 11 x 11 convolution per channel."""
    taps = torch.exp(-0.5 * ((torch.arange(11, dtype=torch.float64) - 5) / 1.5) ** 2)
    taps = taps / taps.sum()
    window = torch.outer(taps, taps)[None, None]

    def mean(x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x.permute(2, 0, 1)[:, None], window)

    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mu_a, mu_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2, mean(a * b) - mu_a * mu_b
    similarity = (2 * mu_a * mu_b + c1) * (2 * cov + c2) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))
    return similarity.mean()


def images(*shape: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    a = rng.random(shape, np.float32)
    return a, np.clip(a + rng.normal(0, 0.2, shape), 0, 1).astype(np.float32)


@pytest.mark.parametrize("shape", [(11, 11, 1), (12, 40, 3), (37, 29, 2), (64, 64, 3)])
@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_value_and_gradient_agree_with_autograd(isa: str, shape: tuple[int, ...], data_range: float) -> None:
    a, b = (x * np.float32(data_range) for x in images(*shape))
    leaf = torch.tensor(a, dtype=torch.float64, requires_grad=True)
    want = oracle(leaf, torch.tensor(b, dtype=torch.float64), data_range)
    want.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    got, gradient = splat.ssim_with_gradient(a, b, data_range, isa=isa)
    assert got == pytest.approx(want.item(), abs=1e-5)
    assert splat.ssim(a, b, data_range, isa=isa) == got
    error = np.linalg.norm(gradient - leaf.grad.numpy()) / np.linalg.norm(leaf.grad.numpy())
    assert error < 1e-4


def test_flat_images_have_a_finite_gradient(isa: str) -> None:
    flat = np.zeros((20, 20, 3), np.float32)
    value, gradient = splat.ssim_with_gradient(flat, flat, isa=isa)
    assert value == pytest.approx(1)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_equal_images_score_one(isa: str) -> None:
    a, _ = images(40, 40, 3)
    assert splat.ssim(a, a, isa=isa) == pytest.approx(1, abs=1e-6)


def test_a_batch_is_the_mean_of_its_images(isa: str) -> None:
    a, b = images(3, 30, 33, 3)
    value, gradient = splat.ssim_with_gradient(a, b, isa=isa, threads=2)
    singles = [splat.ssim_with_gradient(x, y, isa=isa) for x, y in zip(a, b, strict=True)]
    assert value == pytest.approx(np.mean([v for v, _ in singles]), abs=1e-7)
    np.testing.assert_allclose(gradient, np.stack([g for _, g in singles]) / 3, rtol=1e-5, atol=1e-9)


def test_bad_images_are_refused() -> None:
    a, b = images(20, 20, 3)
    with pytest.raises(ValueError, match=r"`b` must have the shape \[20, 20, 3\]"):
        splat.ssim(a, b[:19])
    with pytest.raises(ValueError, match="11 x 11"):
        splat.ssim(a[:10], b[:10])
    with pytest.raises(TypeError, match="`a` must have the dtype float32, not uint8"):
        splat.ssim((a * 255).astype(np.uint8), b)
    with pytest.raises(ValueError, match="`data_range` must be positive"):
        splat.ssim(a, b, 0)
