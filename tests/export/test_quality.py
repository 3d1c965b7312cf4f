"""The figures of `talksplat-export quality` measure what they say."""

from __future__ import annotations

import numpy as np
import pytest

from talksplat_export import quality


def test_psnr_is_that_of_the_definition() -> None:
    image = np.full((8, 8, 3), 100, np.uint8)
    assert quality.psnr(image, image) == quality.SHARPEST
    assert quality.psnr(image, image + np.uint8(10)) == pytest.approx(20 * np.log10(25.5), abs=1e-4)


@pytest.mark.parametrize("lag", [-3, 0, 2])
def test_a_lag_is_found_with_its_sign(lag: int) -> None:
    recorded = np.random.default_rng(0).normal(size=300).astype(np.float32)
    drawn = np.roll(recorded, lag)
    correlations = [quality._correlation(recorded, drawn, k) for k in quality.LAGS]
    assert quality.LAGS[int(np.argmax(correlations))] == lag
    assert max(correlations) == pytest.approx(1, abs=1e-5)


def test_lips_that_never_move_have_no_correlation() -> None:
    assert quality._correlation(np.arange(50, dtype=np.float32), np.ones(50, np.float32), 0) == 0.0
