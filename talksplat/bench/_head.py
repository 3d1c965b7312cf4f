"""A synthetic head and shoulders of Gaussians: what benchmarks and tests draw when there is no avatar at hand."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from talksplat.splat import Gaussians

Floats = NDArray[np.float32]

BACKGROUND = np.array([0.9, 0.95, 1.0], np.float32)

# Three ellipsoids: centre and radii in head units (+y down, -z towards the camera), RGB, share of the Gaussians.
PARTS = (
    ((0.0, -0.25, 0.0), (0.62, 0.82, 0.70), (0.78, 0.57, 0.46), 0.60),  # head
    ((0.0, -0.50, 0.12), (0.70, 0.66, 0.72), (0.20, 0.13, 0.09), 0.15),  # hair
    ((0.0, 1.15, 0.05), (1.35, 0.60, 0.50), (0.16, 0.22, 0.42), 0.25),  # shoulders
)
OVERLAP = 1.3  # such that a covered pixel of 512 x 512 blends about 30 Gaussians, as on fitted avatars


def head(count: int, seed: int = 0) -> Gaussians:
    """``count`` flat Gaussians that cover the ellipsoids; fewer of them are larger, so that none shows a hole."""
    rng = np.random.default_rng(seed)
    ends = np.rint(count * np.cumsum([share for *_, share in PARTS])).astype(int)
    counts = np.diff(ends, prepend=0)
    parts = [_ellipsoid(rng, n, *part[:3]) for n, part in zip(counts, PARTS, strict=True)]
    means, normals, colors = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))

    # The quaternion that turns +z to the normal, with a twist about it.
    half = rng.uniform(0, np.pi, count)
    twist = np.stack([np.cos(half), 0 * half, 0 * half, np.sin(half)], 1)
    tilt = np.stack([1 + normals[:, 2], -normals[:, 1], normals[:, 0], 0 * half], 1)
    tilt[np.linalg.norm(tilt, axis=1) < 1e-6] = [0, 1, 0, 0]
    quats = _product(tilt, twist)

    spacing = OVERLAP * np.sqrt(2 * np.pi / count)
    scales = spacing * np.exp(rng.normal(-0.35, 0.35, (count, 3))) * [1, 1, 0.2]
    opacities = rng.beta(3.5, 1.5, count)
    arrays = (means, quats, scales, opacities, np.clip(colors, 0, 1))
    return Gaussians(*(np.ascontiguousarray(a, dtype=np.float32) for a in arrays))


def camera(width: int, height: int) -> tuple[Floats, Floats]:
    """View matrix [4, 4] and intrinsics [3, 3] that frame the head, a little from the side."""
    angle = 0.12
    view = np.eye(4, dtype=np.float32)
    view[0, [0, 2]] = np.cos(angle), np.sin(angle)
    view[2, [0, 2]] = -np.sin(angle), np.cos(angle)
    view[2, 3] = 5.0
    focal = 2.1 * width
    return view, np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], np.float32)


def mouth(gaussians: Gaussians) -> NDArray[np.bool_]:
    """Which Gaussians belong to mouth and jaw."""
    x, y, z = gaussians.means.T
    return np.asarray((np.abs(x) < 0.36) & (y > 0.05) & (y < 0.60) & (z < -0.2))


def take(gaussians: Gaussians, which: NDArray[np.bool_]) -> Gaussians:
    """Those of the Gaussians that are chosen."""
    return Gaussians(*(np.ascontiguousarray(a[which]) for a in gaussians))


def speak(moving: Gaussians, t: float) -> Gaussians:
    """The mouth's Gaussians at frame ``t``."""
    means = moving.means.copy()
    means[:, 1] += 0.03 * np.sin(0.4 * t) * np.exp(-(((means[:, 1] - 0.3) / 0.2) ** 2))
    return moving._replace(means=means)


def _ellipsoid(
    rng: np.random.Generator,
    count: int,
    centre: tuple[float, float, float],
    radii: tuple[float, float, float],
    rgb: tuple[float, float, float],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Points near the surface, their normals, their shaded colours."""
    directions = rng.normal(size=(count, 3))
    directions[:, 2] -= 0.6 * np.abs(directions[:, 2])  # denser in front
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    normals = directions / radii + rng.normal(0, 0.15, directions.shape)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    points = directions * radii + centre + normals * rng.normal(0, 0.006, (len(normals), 1))
    light = 0.75 + 0.25 * normals @ [-0.4, -0.5, -0.77]
    colors = np.array(rgb) * light[:, None] + 0.05 * np.sin(14 * points) + rng.normal(0, 0.06, points.shape)
    return points, normals, colors


def _product(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Hamilton's product of quaternions wxyz, row by row."""
    (a, b, c, d), (w, x, y, z) = p.T, q.T
    return np.stack(
        [a * w - b * x - c * y - d * z, a * x + b * w + c * z - d * y,
         a * y - b * z + c * w + d * x, a * z + b * y - c * x + d * w], axis=1,
    )  # fmt: skip
