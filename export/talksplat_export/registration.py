"""Registration: the head's pose in every frame, from its pixels.

Landmarks swim on the skin by half a hundredth of the face; Gaussians fitted to such poses blur. So a surface through
the landmarks takes on the colours that most frames agree about, and every frame is aligned with it: Lucas-Kanade in
its inverse compositional form (Baker and Matthews, "Lucas-Kanade 20 Years On", IJCV 2004) over the six parameters of
a rigid motion and the frame's gain and offset. The whole face takes part, and most of it what looks alike in all
frames: lips and lids hardly count. (Without the mouth and the jaw, brows that rise pass for a nod.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from matplotlib.path import Path as Polygon
from scipy.interpolate import RBFInterpolator
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial import ConvexHull
from scipy.spatial.transform import Rotation

from talksplat_export import geometry
from talksplat_export._npz import Npz
from talksplat_export.recording import Image, Recording
from talksplat_export.track import Track, steadied

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

SIDE = 256  # pixels to which frames are reduced, at least
POINTS = 6000  # of the face that are looked at, about
SAMPLES = 120  # frames that make the template, about
BLUR = 1.0  # pixels
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of RGB, ITU-R BT.601
NOISE = 4.0  # variance of a grey level that is nobody's fault
ITERATIONS = 10
STILL = 3e-5  # radians, or metres, below which an alignment has converged
FARTHEST = 0.12  # distances between the eyes that a pose may be corrected by; beyond, the alignment has failed


@dataclass(eq=False)
class Progress(Npz):
    """How far a registration got."""

    done: int  # frames
    given: Float64  # [T, 4, 4] poses that it began with
    viewmats: Float64  # [T, 4, 4]

    @classmethod
    def of(cls, track: Track, kept: Path | None) -> Self:
        """Before the first frame, or what was ``kept`` of this very track."""
        given = track.viewmats.astype(np.float64)
        if kept is not None and kept.exists():
            found = cls.load(kept)
            if np.array_equal(found.given, given):
                return found
        return cls(0, given, given.copy())


def refine(
    recording: Recording,
    track: Track,
    advance: Callable[[int], object] = lambda done: None,
    kept: Path | None = None,
) -> Track:
    """The track with poses that pixels agree about; other parts of it stay as they are.

    Args:
        track: of all frames of the recording; frames that were not ``seen`` keep their poses.
        advance: called with the number of frames done.
        kept: a file (.npz) to go on from where it is of this track; it is written twice a minute and on an interrupt,
            and removed at the end.
    """
    shrink = max(recording.size // SIDE, 1)
    template = _template(recording, track, shrink)
    found = Progress.of(track, kept)
    with found.kept(kept) as keep:
        for index, image in enumerate(recording.frames(found.done), found.done):
            if track.seen[index]:
                found.viewmats[index] = template.align(_grey(image, shrink), found.viewmats[index])
            found.done = index + 1
            advance(found.done)
            keep()
    if kept is not None:
        kept.unlink(missing_ok=True)
    return replace(track, viewmats=steadied(found.viewmats).astype(np.float32))


def _grey(image: Image, shrink: int) -> Float32:
    """[S, S, 3] -> [S / shrink, S / shrink] luma, a little blurred so that its gradient reaches farther."""
    luma = image.astype(np.float32) @ LUMA
    side = len(luma) // shrink
    luma = luma[: side * shrink, : side * shrink].reshape(side, shrink, side, shrink).mean((1, 3))
    return np.asarray(gaussian_filter(luma, BLUR), np.float32)


def _template(recording: Recording, track: Track, shrink: int) -> _Template:
    intrinsics = track.K.astype(np.float64) / [[shrink], [shrink], [1]]
    step = max(len(track) // SAMPLES, 1)
    samples = np.arange(0, len(track), step)
    samples = samples[track.seen[samples]]
    wanted = track[samples]
    landmarks = geometry.triangulate(wanted, np.zeros((len(samples), 0), np.float32))[0][0]
    view = geometry.reference_view(wanted.viewmats).astype(np.float64)
    at = geometry.project(landmarks, view, intrinsics)
    left, right = (at[list(eye), :2].mean(0) for eye in track.layout.eyes)
    unit = float(np.linalg.norm(right - left))

    rows, columns = np.mgrid[: recording.size // shrink, : recording.size // shrink] + 0.5
    pixels = np.stack([columns.ravel(), rows.ravel()], 1)
    inside = Polygon(at[ConvexHull(at[:, :2]).vertices, :2]).contains_points(pixels)
    surface = RBFInterpolator(at[:, :2] / unit, at[:, 2], smoothing=1e-5, neighbors=60)
    points = geometry.unproject(pixels[inside], surface(pixels[inside] / unit), view, intrinsics)

    unwrapped = np.stack(
        [
            _sample(_grey(image, shrink), points, track.viewmats[index], intrinsics)
            for index, image in zip(range(0, len(track), step), recording.frames(step=step), strict=True)
            if track.seen[index]
        ]
    )
    mean, spread = unwrapped.mean(1, keepdims=True), unwrapped.std(1, keepdims=True)
    unwrapped = (unwrapped - mean) / np.maximum(spread, 1e-3) * spread.mean() + mean.mean()  # the same light for all
    texture = np.median(unwrapped, 0)
    variance = ((unwrapped - texture) ** 2).mean(0)

    image = np.full(rows.shape, np.nan)
    image.ravel()[inside] = texture
    slope = np.stack([axis.ravel()[inside] for axis in np.gradient(image)[::-1]], 1)
    used = np.flatnonzero(np.isfinite(slope).all(1))
    used = used[:: max(len(used) // POINTS, 1)]
    return _Template.of(
        points[used], texture[used], slope[used], 1 / (variance[used] + NOISE), view, intrinsics, FARTHEST * unit
    )


def _sample(image: Float32, points: Float64, viewmat: Float32 | Float64, intrinsics: Float64) -> Float64:
    """What an image [S, S] shows at points [P, 3]."""
    at = geometry.project(points, viewmat, intrinsics)[:, 1::-1].T - 0.5
    return np.asarray(map_coordinates(image, at, order=1, mode="nearest"), np.float64)


@dataclass(frozen=True, eq=False)
class _Template:
    """P points of the face with their grey levels, and how these change with the pose."""

    points: Float64  # [P, 3] metres, head frame
    texture: Float64  # [P]
    weights: Float64  # [P]
    steepest: Float64  # [P, 8] grey levels a unit of turn, shift (radians, metres; head frame), gain, offset; scaled
    scale: Float64  # [8] what steepest was divided by
    intrinsics: Float64  # [3, 3]
    farthest: float  # pixels

    @classmethod
    def of(
        cls,
        points: Float64,
        texture: Float64,
        slope: Float64,  # [P, 2] grey levels a pixel of the reference view
        weights: Float64,
        viewmat: Float64,  # of the reference view
        intrinsics: Float64,
        farthest: float,
    ) -> _Template:
        """Steepest descent images from the slope in the reference view."""
        x, y, z = (points @ viewmat[:3, :3].T + viewmat[:3, 3]).T
        fx, fy = intrinsics[0, 0], intrinsics[1, 1]
        down, across = slope[:, 1] * fy / z, slope[:, 0] * fx / z
        shift = np.stack([across, down, -(across * x + down * y) / z], 1) @ viewmat[:3, :3]
        turn = np.cross(points - points.mean(0), shift)
        steepest = np.concatenate([turn, shift, texture[:, None], np.ones((len(texture), 1))], 1)
        scale = np.sqrt((steepest**2).mean(0)) + 1e-9
        return cls(points, texture, weights, steepest / scale, scale, intrinsics, farthest)

    def align(self, image: Float32, viewmat: Float64) -> Float64:
        """The pose [4, 4] near ``viewmat`` in which the image fits best; ``viewmat`` itself where none does."""
        middle = self.points.mean(0)
        found, gain, offset = viewmat.copy(), 1.0, 0.0
        for _ in range(ITERATIONS):
            residual = _sample(image, self.points, found, self.intrinsics) - gain * self.texture - offset
            width = 3 * np.median(np.abs(residual)) + 2
            weighted = self.steepest * (self.weights / (1 + (residual / width) ** 2) ** 2)[:, None]  # Geman-McClure
            normal = weighted.T @ self.steepest
            normal += 1e-6 * np.trace(normal) / len(normal) * np.eye(len(normal))
            change = np.linalg.solve(normal, weighted.T @ residual) / self.scale
            gain, offset = gain + change[6], offset + change[7]
            motion = np.eye(4)
            motion[:3, :3] = Rotation.from_rotvec(change[:3]).as_matrix()
            motion[:3, 3] = middle - motion[:3, :3] @ middle + change[3:6]
            found = found @ np.linalg.inv(motion)
            if np.abs(change[:6]).max() < STILL:
                break
        moved = [geometry.project(self.points, pose, self.intrinsics)[:, :2] for pose in (viewmat, found)]
        distance = np.linalg.norm(moved[1] - moved[0], axis=1).mean()
        return found if distance <= self.farthest else viewmat
