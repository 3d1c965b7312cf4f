"""Triplane features, baked: what a place in the head's box is worth to the deformation net of the profile "huma1".

Three planes of texels (Chan et al., EG3D, https://arxiv.org/abs/2112.07945) at two resolutions. A place is projected
onto each plane and looked up bilinearly; the three features are multiplied, so that a channel can be narrow in all
three directions (K-Planes, https://arxiv.org/abs/2301.10241). The canonical Gaussians never move, so an avatar is
looked up once, at preload, and nothing of the planes is left at inference.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from talksplat.avatar import Huma1Avatar

Float32 = npt.NDArray[np.float32]

AXES = ((1, 2), (0, 2), (0, 1))  # of the planes yz, xz, xy: their columns' axis and their rows'


def bake(avatar: Huma1Avatar) -> Float32:  # [32, N]
    """The features of an avatar's Gaussians."""
    low, high = avatar.box
    places = 2 * (avatar.canonical[:3].T - low) / (high - low) - 1
    return np.concatenate([sample(planes.astype(np.float32), places) for planes in (avatar.coarse, avatar.fine)])


def sample(
    planes: Float32,  # [3, C, S, S]
    places: Float32,  # [N, 3], the box is -1..1
) -> Float32:  # [C, N]
    """The product of the three bilinear look-ups; the outermost texels' centres lie on the box, beyond it nothing new.

    As PyTorch's ``grid_sample(align_corners=True, padding_mode="border")`` does it.
    """
    last = planes.shape[-1] - 1
    product = np.ones((planes.shape[1], len(places)), np.float32)
    for plane, (across, down) in zip(planes, AXES, strict=True):
        column, row = (((places[:, axis] + 1) * np.float32(0.5 * last)).clip(0, last) for axis in (across, down))
        left, top = (np.minimum(place.astype(np.intp), last - 1) for place in (column, row))
        right_share, lower_share = column - left, row - top
        upper = plane[:, top, left] * (1 - right_share) + plane[:, top, left + 1] * right_share
        lower = plane[:, top + 1, left] * (1 - right_share) + plane[:, top + 1, left + 1] * right_share
        product *= upper * (1 - lower_share) + lower * lower_share
    return product
