"""The oracle of :mod:`talksplat.splat`: the same rules in float64 NumPy, written to be read and not to be fast."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from talksplat.splat import Gaussians

LOW_PASS = 0.3  # px², added to the diagonal of every 2D covariance
MAX_ALPHA = 0.999
MIN_ALPHA = 1 / 255
MIN_TRANSMITTANCE = 1e-4
NEAR = 0.01
BEYOND = 0.15  # of the image's size: how far outside of it the Jacobian still follows a centre

Doubles = NDArray[np.float64]


def render(
    gaussians: Gaussians,  # one frame's
    viewmat: ArrayLike,  # [4, 4]
    K: ArrayLike,  # [3, 3]  # noqa: N803
    width: int,
    height: int,
    background: ArrayLike = (0.0, 0.0, 0.0),  # [3]
) -> tuple[Doubles, Doubles]:
    """``(render_colors [H, W, 3], render_alphas [H, W, 1])`` of one frame, in exact mode."""
    image = np.zeros((height, width, 3))
    transmittance = np.ones((height, width))
    stopped = np.zeros((height, width), bool)
    columns, rows = np.arange(width) + 0.5, np.arange(height) + 0.5
    for centre, covariance, opacity, color in _front_to_back(gaussians, viewmat, K, width, height):
        # The box of the ellipse on which alpha is 1/255, and a pixel more.
        reach = np.sqrt(2 * np.log(opacity / MIN_ALPHA) * np.diag(covariance)) + 1
        (x0, y0), (x1, y1) = np.clip([centre - reach, centre + reach + 1], 0, [width, height]).astype(int)
        box = np.s_[y0:y1, x0:x1]
        dx, dy = columns[None, x0:x1] - centre[0], rows[y0:y1, None] - centre[1]
        conic = np.linalg.inv(covariance)
        distance = conic[0, 0] * dx * dx + 2 * conic[0, 1] * dx * dy + conic[1, 1] * dy * dy
        alpha = np.minimum(MAX_ALPHA, opacity * np.exp(-0.5 * distance))
        hit = (alpha >= MIN_ALPHA) & ~stopped[box]
        stopped[box] |= hit & (transmittance[box] * (1 - alpha) <= MIN_TRANSMITTANCE)
        weight = np.where(hit & ~stopped[box], alpha * transmittance[box], 0.0)
        image[box] += weight[..., None] * color
        transmittance[box] -= weight
    image += transmittance[..., None] * np.asarray(background, np.float64)
    return image, 1 - transmittance[..., None]


def _front_to_back(
    gaussians: Gaussians,
    viewmat: ArrayLike,
    K: ArrayLike,  # noqa: N803
    width: int,
    height: int,
) -> list[tuple[Doubles, Doubles, float, Doubles]]:
    """Centre, 2D covariance, opacity and colour of each Gaussian that may be seen, nearest first."""
    view, intrinsics = np.asarray(viewmat, np.float64), np.asarray(K, np.float64)
    focal, principal = intrinsics[[0, 1], [0, 1]], intrinsics[:2, 2]
    size = np.array([width, height])
    found = []
    for mean, quat, scale, opacity, color in zip(*(np.asarray(a, np.float64) for a in gaussians), strict=True):
        attributes = np.concatenate([mean, quat, scale, [opacity], color])
        if not np.isfinite(attributes).all() or not quat.any() or opacity < MIN_ALPHA:
            continue
        at = view[:3, :3] @ mean + view[:3, 3]
        depth = at[2]
        if depth < NEAR:
            continue
        ratio = np.clip(
            at[:2] / depth, (-principal - BEYOND * size) / focal, (size - principal + BEYOND * size) / focal
        )
        jacobian = np.stack([[focal[0], 0, -focal[0] * ratio[0]], [0, focal[1], -focal[1] * ratio[1]]]) / depth
        axes = jacobian @ view[:3, :3] @ rotation(quat) * scale
        covariance = axes @ axes.T + LOW_PASS * np.eye(2)
        centre = focal * at[:2] / depth + principal
        found.append((depth, centre, covariance, float(opacity), color))
    found.sort(key=lambda item: item[0])  # stable: equal depths keep their order
    return [item[1:] for item in found]


def rotation(quat: Doubles) -> Doubles:
    """The rotation matrix [3, 3] of a quaternion wxyz of any length."""
    w, x, y, z = quat / np.linalg.norm(quat)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def blend(
    canonical: ArrayLike,  # [14, N]
    bases: ArrayLike,  # [14, K, N]
    basis_scales: ArrayLike,  # [14, K]
    weights: ArrayLike,  # [K]
) -> Gaussians:
    """The Gaussians, float64, of one frame's weights."""
    canonical, bases, basis_scales, weights = (
        np.asarray(a, np.float64) for a in (canonical, bases, basis_scales, weights)
    )
    planes = canonical + np.einsum("k,ak,akn->an", weights, basis_scales, bases)
    return Gaussians(
        planes[0:3].T, planes[3:7].T, np.exp(planes[7:10]).T, 1 / (1 + np.exp(-planes[10])), planes[11:14].T
    )


def psnr(a: ArrayLike, b: ArrayLike) -> float:
    """Peak signal-to-noise ratio in dB of two images with values up to 1."""
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return float(10 * np.log10(1 / max(error, 1e-20)))
