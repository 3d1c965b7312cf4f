"""Small heads with motion bases, and frames of them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from talksplat.bench._head import camera, head
from talksplat.splat import Blendshapes, Job


def avatar(count: int = 333, rank: int = 5, seed: int = 0) -> Blendshapes:
    rng = np.random.default_rng(seed)
    g = head(count, seed)
    logits = np.log(g.opacities / (1 - g.opacities))
    canonical = np.concatenate([g.means.T, g.quats.T, np.log(g.scales).T, logits[None], g.colors.T])
    bases = rng.integers(-127, 128, (14, rank, count), np.int8)
    scales = np.abs(rng.normal(0, 2e-4, (14, rank))).astype(np.float32)
    return Blendshapes(np.ascontiguousarray(canonical, dtype=np.float32), bases, scales)


def plate(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def job(shapes: Blendshapes, seed: int = 0, height: int = 70, width: int = 90, **changes: Any) -> Job:
    weights = np.random.default_rng(seed).normal(0, 1, shapes.rank).astype(np.float32)
    view, intrinsics = camera(width, height)
    arguments: dict[str, Any] = {
        "weights": weights,
        "viewmat": view,
        "K": intrinsics,
        "plate": plate(height, width, seed),
    }
    return Job(shapes, **(arguments | changes))
