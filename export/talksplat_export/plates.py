"""Plates: the recorded frames that an avatar is drawn onto, played forth and back."""

from __future__ import annotations

import numpy as np
import simplejpeg

from talksplat_export.recording import Recording
from talksplat_export.track import Track, steadied

NO_FACE = 100.0  # what a frame without a face costs; one with the mouth wide open costs 1
HEAD_RADIUS = 0.1  # metres
STEADY_FRAMES = 7  # that a plate's pose is smoothed over
QUALITIES = range(92, 48, -2)  # of JPEG, best first


class PlatesError(ValueError):
    """No plates can be had that fit."""


def choose(track: Track, count: int) -> range:
    """The consecutive frames that make the calmest loop: ``count`` of them, or up to a quarter less.

    Lips nearly shut and eyes open, so that little of the recorded face has to be covered; the head near its usual
    pose and without jerks. At both ends, where the loop turns back, most of all: the head nearly still, and no blink
    under way.
    """
    count = min(count, len(track))
    opening = track.lip_opening / max(float(np.percentile(track.lip_opening, 99)), 1.0)
    head = (track.viewmats[:, :3] * [HEAD_RADIUS, HEAD_RADIUS, HEAD_RADIUS, 1]).reshape(len(track), 12)  # metres
    away = np.linalg.norm(head - head.mean(0), axis=1)
    step = np.linalg.norm(np.diff(head, axis=0, prepend=head[:1]), axis=1)  # from the frame before
    away, step = (distance / max(float(distance.mean()), 1e-9) for distance in (away, step))
    covered = opening.clip(0) + track.blink
    cost = covered + 0.2 * away + 0.1 * step**2 + NO_FACE * ~track.seen
    begin, end = covered + np.append(step[1:], 0), covered + step  # speed and blink where the loop turns

    total = np.cumsum([0, *cost])
    loops = []
    for length in range(count - count // 4, count + 1):
        mean = (total[length:] - total[: len(total) - length]) / length
        price = mean + 0.1 * (begin[: len(mean)] + end[length - 1 :])
        start = int(np.argmin(price))
        loops.append((float(price[start]), range(start, start + length)))
    return min(loops, key=lambda loop: loop[0])[1]


def poses(track: Track, frames: range) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Where the head is in the plates, [P, 4, 4]; smoother than the track.

    The recorded lips still tremble in the track's poses. While the drawn ones rest, that shows at the chin.
    """
    steady = steadied(track.viewmats.astype(np.float64), STEADY_FRAMES)
    return steady[frames.start : frames.stop].astype(np.float32)


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
