"""Refinement: pose and weights of every frame, such that the fitted Gaussians look like the frame.

A tracker's blendshapes know little of pressed lips and narrowed eyes, and its pose errs by half a pixel; Gaussians that
are fitted to such weights blur, and drawn with them they are off. So tracking ends with analysis by synthesis: each
frame's pose and weights are changed until what is drawn differs least from what was recorded (Gauss-Newton, with
derivatives from differences of drawn frames, taken once a frame: the chord method), with the tracker's own weights as
prior; then the poses are steadied. Only the track changes: no Gaussian learns anything here, so frames that avatars are
tested with may be refined like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.spatial.transform import Rotation

from talksplat import splat
from talksplat.avatar import BLINK
from talksplat_export import geometry
from talksplat_export._npz import Npz
from talksplat_export.recording import Image, Recording
from talksplat_export.track import Track, steadied

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

MARGIN = 8  # pixels around the Gaussians
DIFFERENCE = 0.2  # of a weight, to see what it does; of the pose, a pixel
STRIDE = 5  # one in so many bytes of a picture is compared, of all three colours
PRIOR = 0.1  # squared grey levels that a weight's change by 1 has to gain
POSE_PRIOR = 0.002  # and the pose's by a pixel
ITERATIONS = 4


@dataclass(eq=False)
class Progress(Npz):
    """How far a refinement got."""

    done: int  # frames
    viewmats: Float64  # [T, 4, 4]
    weights: Float64  # [T, 21]


def refine(
    recording: Recording,
    track: Track,
    basis: Float32,
    shapes: splat.Blendshapes,
    frames: range,
    advance: Callable[[int], object] = lambda done: None,
    kept: Path | None = None,
) -> Track:
    """The track with poses, expressions and blinks that the pixels of some frames agree about.

    Args:
        basis: [C, 20] from the track's expression to the weights that move ``shapes``; expressions change within what
            it can tell apart.
        frames: to be refined; those that were not ``seen``, and those that can't be improved, stay as they are.
        advance: called with the number of frames done.
        kept: a file (.npz) of this very refinement to go on from; it is written twice a minute and on an interrupt.
    """
    tracked = geometry.frame_weights(track, basis)
    if kept is not None and kept.exists():
        found = Progress.load(kept)
    else:
        found = Progress(0, track.viewmats.astype(np.float64), tracked.astype(np.float64))
    moving = np.flatnonzero(shapes.basis_scales.any(0) & tracked.any(0))
    means = shapes.canonical[:3].T.astype(np.float64)
    left = frames[found.done :]
    with found.kept(kept) as keep:
        for index, image in zip(left, recording.frames(left.start, left.stop), strict=True):
            crop, intrinsics = _cropped(means, found.viewmats[index], track.K, image)
            if track.seen[index] and crop.size:
                found.viewmats[index], found.weights[index] = _refined(
                    shapes, means, moving, found.viewmats[index], found.weights[index], intrinsics, crop
                )
            found.done += 1
            advance(found.done)
            keep()
    changed = found.weights - tracked
    found.viewmats[frames] = steadied(found.viewmats[frames])
    return replace(
        track,
        viewmats=found.viewmats.astype(np.float32),
        expression=(track.expression + changed[:, :BLINK] @ np.linalg.pinv(basis)).astype(np.float32),
        blink=found.weights[:, BLINK].astype(np.float32),
    )


def _cropped(means: Float64, viewmat: Float64, intrinsics: Float32, image: Image) -> tuple[Image, Float32]:
    """The picture of what lies around the Gaussians, and its camera."""
    at = geometry.project(means, viewmat, intrinsics)[:, :2]
    corners = np.percentile(at, [1, 99], axis=0)
    corners += [[-MARGIN], [MARGIN]]
    low, high = corners.astype(int).clip(0)
    moved = intrinsics.copy()
    moved[:2, 2] -= low
    return np.ascontiguousarray(image[low[1] : high[1], low[0] : high[0]]), moved


def _refined(
    shapes: splat.Blendshapes,
    means: Float64,  # [N, 3] at rest
    moving: npt.NDArray[np.int64],  # which weights do anything
    viewmat: Float64,
    weights: Float64,  # [21]
    intrinsics: Float32,
    image: Image,
) -> tuple[Float64, Float64]:
    """Pose and weights of one frame; changes of the pose are measured in pixels."""
    middle = means.mean(0)
    radius = np.linalg.norm(means - middle, axis=1).mean()
    depth = geometry.project(middle, viewmat, intrinsics)[2]
    pixel = depth / intrinsics[0, 0]  # metres
    steps = np.concatenate([np.full(len(moving), DIFFERENCE), np.ones(6)])
    prior = np.concatenate([np.full(len(moving), PRIOR), np.full(6, POSE_PRIOR)])

    def moved(change: Float64) -> tuple[Float64, Float64]:
        """Pose and weights after a change [weights, turn, shift], the latter two in pixels."""
        turn, shift = change[-6:-3] * pixel / radius, change[-3:] * pixel * [1, 1, depth / radius]
        motion = np.eye(4)
        motion[:3, :3] = Rotation.from_rotvec(turn).as_matrix()
        motion[:3, 3] = middle + shift - motion[:3, :3] @ middle
        changed = weights.copy()
        changed[moving] += change[:-6]
        return viewmat @ motion, changed

    def drawn(changes: list[Float64]) -> Float32:  # [J, B] bytes
        states = [moved(change) for change in changes]
        jobs = [splat.Job(shapes, w.astype(np.float32), v.astype(np.float32), intrinsics, image) for v, w in states]
        pictures = [picture.reshape(-1)[::STRIDE] for picture in splat.render_onto(jobs)]
        return np.asarray(np.stack(pictures), np.float32)

    wanted = image.reshape(-1)[::STRIDE].astype(np.float32)
    best = np.zeros(len(steps))
    first, *others = drawn([best, *np.diag(steps)])
    slopes = (np.stack(others) - first) / steps[:, None].astype(np.float32)  # [D, B]
    normal = (slopes @ slopes.T).astype(np.float64) / len(wanted) + np.diag(prior)
    residual = wanted - first
    cost = float(np.mean(residual**2))
    for _ in range(ITERATIONS):
        gradient = (slopes @ residual).astype(np.float64) / len(wanted) - prior * best
        change = best + np.linalg.solve(normal, gradient)
        residual = wanted - drawn([change])[0]
        found = float(np.mean(residual**2) + np.sum(prior * change**2))
        if found >= cost:
            break
        best, cost = change, found
    return moved(best)
