"""The figures of `talksplat-export quality` measure what they say."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from talksplat_export import quality
from talksplat_export.track import LAYOUTS


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


def test_the_distance_from_the_truth_leaves_out_what_the_tracker_takes_for_each_point() -> None:
    rng = np.random.default_rng(0)
    truth = rng.uniform(0, 100, (30, 68, 2)).astype(np.float32)
    recorded = np.zeros((20, 478, 2), np.float32)
    habit = rng.normal(0, 3, (20, 2)).astype(np.float32)
    recorded[:, quality.MOUTH_OF_68] = truth[10:, list(LAYOUTS[68].mouth)] + habit
    drawn = recorded + np.array([0.6, 0.8], np.float32)
    subject = SimpleNamespace(track=SimpleNamespace(landmarks=truth), test=range(10, 30))
    seen = np.arange(20) != 4
    assert quality._from_truth(subject, recorded[seen], drawn[seen], seen) == 1.0  # type: ignore[arg-type]
    tracked = SimpleNamespace(track=SimpleNamespace(landmarks=recorded), test=range(20))
    assert quality._from_truth(tracked, recorded, drawn, np.ones(20, bool)) is None  # type: ignore[arg-type]
