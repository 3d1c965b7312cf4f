"""Plates: the recorded frames that an avatar is drawn onto, played forth and back."""

from __future__ import annotations

import numpy as np
import simplejpeg

from talksplat_export.recording import Recording
from talksplat_export.track import Track

NO_FACE = 100.0  # what a frame without a face costs; one with the mouth wide open costs 1
QUALITIES = range(92, 48, -2)  # of JPEG, best first


class PlatesError(ValueError):
    """No plates can be had that fit."""


def choose(track: Track, count: int) -> range:
    """The ``count`` consecutive frames that make the calmest loop.

    Lips nearly shut and eyes open, so that little of the recorded face has to be covered; the head near its usual
    pose. At both ends, where the loop turns back, most of all: the head nearly still, and no blink under way.
    """
    count = min(count, len(track))
    opening = track.lip_opening / max(float(np.percentile(track.lip_opening, 99)), 1.0)
    view = track.viewmats.reshape(len(track), 16)
    away = np.linalg.norm(view - view.mean(0), axis=1)
    speed = np.linalg.norm(np.gradient(view, axis=0), axis=1) if len(track) > 1 else np.zeros(1)
    covered = opening.clip(0) + track.blink
    cost = covered + away / max(float(away.mean()), 1e-9) * 0.2 + NO_FACE * ~track.seen
    mean = np.convolve(cost, np.ones(count) / count, "valid")
    turning = covered + speed / max(float(speed.mean()), 1e-9)
    start = int(np.argmin(mean + 0.1 * (turning[: len(mean)] + turning[count - 1 :])))
    return range(start, start + count)


def encode(recording: Recording, frames: range, budget: int) -> list[bytes]:
    """The frames as JPEGs of the best quality with which all of them take ``budget`` bytes at most.

    Raises:
        PlatesError: they do not fit at the lowest quality.
    """
    images = list(recording.frames(frames.start, frames.stop))
    sample = images[:: max(len(images) // 8, 1)]
    for quality in QUALITIES:
        if sum(len(_jpeg(image, quality)) for image in sample) / len(sample) * len(images) > budget:
            continue
        plates = [_jpeg(image, quality) for image in images]
        if sum(map(len, plates)) <= budget:
            return plates
    raise PlatesError(
        f"{len(images)} plates do not fit into {budget / 1e6:.1f} MB: ask for fewer plates or a larger bundle."
    )


def _jpeg(image: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], quality: int) -> bytes:
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", "420"))
