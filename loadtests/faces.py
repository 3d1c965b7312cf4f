"""Whose face a frame shows, where nothing is known of the avatars beforehand."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import simplejpeg


class Faces:
    """Whose face is it? Told by a picture of 8 x 8 colours, so only of avatars that look different enough."""

    def __init__(self) -> None:
        self._known: dict[str, npt.NDArray[np.float32]] = {}

    def is_foreign(self, avatar: str, jpeg: bytes) -> bool:
        """Whether it is much more like another avatar's first frame than like this one's."""
        seen = _thumbnail(jpeg)
        own = np.abs(seen - self._known.setdefault(avatar, seen)).mean()
        others = (np.abs(seen - face).mean() for other, face in self._known.items() if other != avatar)
        return any(2 * distance < own for distance in others)


def _thumbnail(jpeg: bytes) -> npt.NDArray[np.float32]:  # [8, 8, 3]
    pixels = simplejpeg.decode_jpeg(jpeg, min_height=64, min_width=64, min_factor=8)
    side = min(pixels.shape[:2]) // 8
    blocks = pixels[: 8 * side, : 8 * side].reshape(8, side, 8, side, 3)
    return np.asarray(blocks.mean(axis=(1, 3)), np.float32)
