"""From a track to a first head: coefficients, landmarks in 3D, the region that Gaussians draw, and seeds for them.

All of it is computed once, before the photometric fit, and only has to be close: the fit moves every Gaussian.
Sizes on the face are in distances between the eyes ("units"), so that they hold for any resolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.path import Path as Polygon
from scipy.interpolate import RBFInterpolator
from scipy.ndimage import distance_transform_edt, gaussian_filter, map_coordinates
from scipy.spatial import ConvexHull, cKDTree

from talksplat.avatar import ATTRIBUTES, COEFFICIENTS
from talksplat_export.track import Layout, Track, TrackError

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

# The region's shape, in units.
CHEEK_INSET = 0.12  # inside the face's edge where it does not move
NECK_MARGIN = 0.3  # beyond the lowest point that the chin reaches
FEATHER = (0.14, 0.3)  # width of the mask's edge at the eyes and one unit below them
MOUTH_EMPHASIS = 3.0  # on top of 1, in the loss
MOUTH_SHARE = 14  # of all Gaussians, one in so many lies on each of the two sheets behind the lips
MOUTH_DEPTH = 0.010  # metres from the lips' surface to the teeth
MIN_PIXELS = 200  # that Gaussians draw
GRID = 8  # pixels between the points at which smooth fields are computed
TRIANGULATED = 1500  # frames that landmarks are triangulated from, or up to twice as many


# --- coefficients ------------------------------------------------------------------------------------------------


def coefficient_basis(expression: Float32, energy: float = 0.9995) -> Float32:
    """[C, 20] that takes an expression [T, C] to coefficients [T, 20] of unit root mean square.

    An uncentred principal component analysis, so that rest (all 0) stays 0. Columns that are not needed are 0.

    Args:
        expression: of the training frames.
        energy: share of the squared expression that the coefficients must keep.
    """
    _, singular, rows = np.linalg.svd(expression.astype(np.float64), full_matrices=False)
    kept = np.cumsum(singular**2) / max(np.sum(singular**2), 1e-30)
    count = min(int(np.searchsorted(kept, energy)) + 1, COEFFICIENTS, int(np.sum(singular > 1e-4 * singular[0])))
    basis = rows[:count].T / singular[:count].clip(1e-30) * np.sqrt(len(expression))
    basis *= np.sign(basis[np.argmax(np.abs(basis), 0), np.arange(count)])  # the SVD leaves the signs open
    return np.pad(basis, ((0, 0), (0, COEFFICIENTS - count))).astype(np.float32)


def frame_weights(track: Track, basis: Float32) -> Float32:  # [C, 20] -> [T, 21]
    """The weights of a track's frames: coefficients and blink.

    Raises:
        TrackError: the basis belongs to a track of another source.
    """
    if track.expression.shape[1] != len(basis):
        raise TrackError(
            f"The track has {track.expression.shape[1]} channels of expression, expected {len(basis)}: "
            f"the avatar was not fitted to one of {track.source}."
        )
    return np.concatenate([track.expression @ basis, track.blink[:, None]], 1)


# --- cameras and landmarks ---------------------------------------------------------------------------------------


def project(points: Float32 | Float64, viewmat: Float32 | Float64, K: Float32 | Float64) -> Float64:  # noqa: N803
    """Points [..., 3] of the head frame -> pixels and depth [..., 3]."""
    seen = points.astype(np.float64) @ viewmat[:3, :3].T + viewmat[:3, 3]
    pixels = seen[..., :2] / seen[..., 2:] * [K[0, 0], K[1, 1]] + [K[0, 2], K[1, 2]]
    return np.concatenate([pixels, seen[..., 2:]], -1)


def unproject(pixels: Float64, depth: Float64, viewmat: Float32 | Float64, K: Float32 | Float64) -> Float64:  # noqa: N803
    """Pixels [..., 2] at depths [...] -> points [..., 3] of the head frame."""
    rays = (pixels - [K[0, 2], K[1, 2]]) / [K[0, 0], K[1, 1]]
    seen = np.concatenate([rays, np.ones_like(rays[..., :1])], -1) * depth[..., None]
    return np.asarray((seen - viewmat[:3, 3]) @ viewmat[:3, :3].astype(np.float64))


def thinned(frames: int) -> slice:
    """Which of a recording's first frames landmarks are triangulated from."""
    return slice(0, frames, max(frames // TRIANGULATED, 1))


def triangulate(track: Track, weights: Float32, ridge: float = 1e-3) -> tuple[Float32, float]:
    """Landmarks that move linearly, seen from many known poses.

    Solves, per landmark, for a point and a displacement per weight whose projections meet the observations
    (least squares of the projection equations; displacements in depth are hardly seen, hence the ridge).

    Args:
        weights: [T, W] what the displacements are multiplied by.
        ridge: relative to the number of frames.

    Returns:
        [1 + W, L, 3] metres, head frame: the points at rest, then the displacements; and the root mean square
        distance to the observations in pixels.
    """
    frames = len(track)
    design = np.concatenate([np.ones((frames, 1)), weights], 1)  # [T, 1 + W]
    rays = (track.landmarks.astype(np.float64) - track.K[:2, 2]) / [track.K[0, 0], track.K[1, 1]]
    rotation, offset = track.viewmats[:, :3, :3].astype(np.float64), track.viewmats[:, :3, 3].astype(np.float64)
    depth = float(np.median(offset[:, 2]))
    unknowns = 3 * design.shape[1]
    damping = np.full(unknowns, ridge * frames / depth**2)
    damping[:3] = 0
    model = np.empty((design.shape[1], track.landmarks.shape[1], 3))
    for index in range(track.landmarks.shape[1]):
        ray = rays[:, index]
        rows = (ray[:, :, None] * rotation[:, 2:3] - rotation[:, :2]) / depth  # [T, 2, 3]
        values = (offset[:, :2] - ray * offset[:, 2:]) / depth
        matrix = np.einsum("tw,tik->tiwk", design, rows).reshape(2 * frames, unknowns)
        normal = matrix.T @ matrix + np.diag(damping)
        model[:, index] = np.linalg.solve(normal, matrix.T @ values.reshape(-1)).reshape(-1, 3)
    seen = np.einsum("tij,tw,wlj->tli", rotation, design, model, optimize=True) + offset[:, None]
    pixels = seen[..., :2] / seen[..., 2:] * [track.K[0, 0], track.K[1, 1]] + track.K[:2, 2]
    error = float(np.sqrt(np.mean(np.sum((pixels - track.landmarks) ** 2, -1))))
    return model.astype(np.float32), error


# --- the region --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Region:
    """The part of the face that Gaussians draw, as images [S, S] of a reference view of the head.

    Where ``mask`` is 1, Gaussians alone draw; where it is 0, the plate alone.
    """

    viewmat: Float32  # [4, 4] of the reference view
    K: Float32  # [3, 3] pixels
    depth: Float32  # [S, S] metres from the camera, a smooth surface through the landmarks
    mask: Float32  # [S, S] 0..1
    emphasis: Float32  # [S, S] >= 1, weight in the loss
    density: Float32  # [S, S] relative number of Gaussians a pixel

    @property
    def centre(self) -> Float64:
        """The point on the surface in the middle of the mask, [3] of the head frame."""
        middle = np.argwhere(self.mask > 0.5).mean(0)[::-1][None] + 0.5
        return np.asarray(_lift(self, middle, 0.0)[0])

    def seen(self, image: Float32, viewmat: Float32, rows: range, columns: range) -> Float32:
        """A smooth image [S, S] of the reference view as another pose sees it, in some of a frame's rows and columns.

        Computed on a coarser grid and interpolated: masks are smooth.
        """
        step = max(len(self.mask) // 128, 1)
        grid = np.stack(
            np.meshgrid(
                np.arange(rows.start, rows.stop + step, step),
                np.arange(columns.start, columns.stop + step, step),
                indexing="ij",
            )
        ).astype(np.float64)
        shape = grid.shape[1:]
        where = grid.reshape(2, -1)
        source = where.copy()
        for _ in range(3):  # solve: where(source) = pixel
            depth = map_coordinates(self.depth, source, order=1, mode="nearest").astype(np.float64)
            points = unproject(source[::-1].T + 0.5, depth, self.viewmat, self.K)
            source += where - (project(points, viewmat, self.K)[:, 1::-1].T - 0.5)
        coarse = map_coordinates(image, source, order=1, mode="constant").reshape(shape)
        fine = np.indices((len(rows), len(columns))) / step
        return np.asarray(map_coordinates(coarse, fine, order=1), np.float32)


def region(track: Track, landmarks: Float32, weights: Float32, size: int) -> Region:
    """Lay out the region from landmarks that `triangulate` found.

    The outline runs from below the brows down the cheeks, inside the face's edge where that stands still, and
    outside the jaw by what the jaw moves and a margin: the chin at its lowest, and the neck that it uncovers at
    its highest, lie inside.

    Args:
        landmarks: [1 + W, L, 3] points at rest and displacements.
        weights: [T, W].
        size: pixels a side.

    Raises:
        TrackError: the face is too small, or not in the picture.
    """
    layout = track.layout
    viewmat = reference_view(track.viewmats)
    rest = project(landmarks[0], viewmat, track.K)
    moved = project(landmarks[0] + np.einsum("tw,wlk->tlk", weights, landmarks[1:]), viewmat, track.K)
    travel = np.percentile(np.linalg.norm(moved[..., :2] - rest[:, :2], axis=-1), 99.5, axis=0)

    # Face coordinates: origin between the eyes, x along them, y down.
    left, right = (rest[list(eye), :2].mean(0) for eye in layout.eyes)
    unit = float(np.linalg.norm(right - left))
    axes = np.stack([right - left, [-(right - left)[1], (right - left)[0]]]) / unit**2

    def to_face(pixels: Float64) -> Float64:
        return np.asarray((pixels - (left + right) / 2) @ axes.T)

    points = to_face(rest[:, :2])
    jaw, outward = _jaw(points, layout)
    mobility = (travel[list(layout.jaw)] / travel[list(layout.jaw)].max())[:, None] ** 0.7
    reach = travel[list(layout.jaw)].max() / unit + NECK_MARGIN
    outline = (jaw + outward * (mobility * reach - (1 - mobility) * CHEEK_INSET))[jaw[:, 1] > 0.1]
    lids = min(points[list(eye), 1].min() for eye in layout.eyes)
    top = 0.6 * points[list(layout.brows), 1].mean() + 0.4 * lids
    outer = max(abs(points[list(eye), 0]).max() for eye in layout.eyes) + 0.3
    polygon = np.concatenate([[[-outer, top]], outline, [[outer, top]]])

    rows, columns = np.mgrid[:size, :size] + 0.5
    face = to_face(np.stack([columns, rows], -1))
    inside = Polygon(polygon).contains_points(face.reshape(-1, 2)).reshape(size, size)
    feather = np.interp(face[..., 1], [0.0, 1.0], FEATHER)
    edge = (distance_transform_edt(inside) / unit / feather).clip(0, 1)
    mask = gaussian_filter(edge * edge * (3 - 2 * edge), 0.02 * unit)
    if np.sum(mask > 0.5) < MIN_PIXELS:
        raise TrackError(
            f"The face is too small or outside the picture: {unit:.0f} pixels lie between the eyes of frames of {size}."
        )

    mouth = np.concatenate([points[list(layout.mouth)], to_face(moved[:, list(layout.mouth), :2].reshape(-1, 2))])
    at_mouth = _box(face, mouth, 0.08)
    at_eyes = np.max([_box(face, points[list(eye)], 0.06) for eye in layout.eyes], axis=0)
    metres = float(
        np.linalg.norm(landmarks[0, list(layout.eyes[0])].mean(0) - landmarks[0, list(layout.eyes[1])].mean(0))
    )
    return Region(
        viewmat=viewmat,
        K=track.K,
        depth=_surface(face, points, rest[:, 2], layout, metres),
        mask=mask.astype(np.float32),
        emphasis=(1 + MOUTH_EMPHASIS * at_mouth + at_eyes).astype(np.float32),
        density=(inside * (1 + 1.5 * at_mouth + at_eyes)).astype(np.float32),
    )


def reference_view(viewmats: Float32) -> Float32:  # [T, 4, 4] -> [4, 4]
    """The view that is nearest to their mean."""
    rotations = viewmats[:, :3, :3]
    return np.asarray(viewmats[np.argmin(np.linalg.norm(rotations - rotations.mean(0), axis=(1, 2)))])


def _jaw(points: Float64, layout: Layout) -> tuple[Float64, Float64]:
    """The jaw's landmarks from left to right and their directions away from the nose, [J, 2] each."""
    jaw = points[list(layout.jaw)]
    jaw = jaw if jaw[0, 0] < jaw[-1, 0] else jaw[::-1]
    away = jaw - points[list(layout.nose)].mean(0)
    return jaw, away / np.linalg.norm(away, axis=1, keepdims=True)


def _box(face: Float64, points: Float64, margin: float) -> Float64:
    """1 inside the box around ``points`` [P, 2], falling off beyond it."""
    low, high = np.percentile(points, [0.5, 99.5], axis=0)
    beyond = np.linalg.norm(np.maximum(0, np.maximum(low - face, face - high)), axis=-1)
    return np.asarray(np.exp(-0.5 * (beyond / margin) ** 2))


def _surface(face: Float64, points: Float64, depths: Float64, layout: Layout, metres: float) -> Float32:
    """Depth [S, S] of a smooth surface through the landmarks; beyond the jaw it falls back to the neck.

    Args:
        face: [S, S, 2] face coordinates of the pixels.
        points, depths: [L, 2] face coordinates and [L] metres of the landmarks.
        metres: of a unit.
    """
    jaw, outward = _jaw(points, layout)
    order = list(layout.jaw) if points[layout.jaw[0], 0] < points[layout.jaw[-1], 0] else list(layout.jaw)[::-1]
    lower = outward[:, 1] > 0.5
    beyond = [(0.3, 0.35), (0.8, 0.5)]  # units away from the jaw, units behind it
    places = np.concatenate([points, *(jaw[lower] + outward[lower] * away for away, _ in beyond)])
    values = np.concatenate([depths, *(depths[order][lower] + behind * metres for _, behind in beyond)])
    surface = RBFInterpolator(places, values, smoothing=1e-5)
    coarse = face[::GRID, ::GRID].clip(places.min(0) - 0.1, places.max(0) + 0.1)
    grid = surface(coarse.reshape(-1, 2)).reshape(coarse.shape[:2])
    fine = np.indices(face.shape[:2]) / GRID
    return np.asarray(map_coordinates(grid, fine, order=1, mode="nearest"), np.float32)


# --- Gaussians ---------------------------------------------------------------------------------------------------


def seed(
    region: Region,
    track: Track,
    landmarks: Float32,  # [1 + W, L, 3]
    weights: Float32,  # [T, W]
    images: Mapping[int, npt.NDArray[np.uint8]],  # frames [S, S, 3] by index: those of `extreme_frames`
    count: int,
    rng: np.random.Generator,
) -> tuple[Float32, Float32]:
    """Place ``count`` Gaussians: a sheet on the face and two behind the lips for what an open mouth shows.

    Returns:
        Attribute planes [14, N] at rest and displacements of the means [W, 3, N], metres a unit of weight.
    """
    at_rest, open_wide = extreme_frames(track, weights)
    layout = track.layout
    rest = project(landmarks[0], region.viewmat, region.K)

    skin = _spread(region.density, count - 2 * (count // MOUTH_SHARE), rng)
    skin_motion = _carry(skin, rest[:, :2], landmarks[1:], layout)
    skin_means = _lift(region, skin, 0.0)

    # What the widest open frame shows between the lips: one sheet fixed to the skull, one moving with the chin.
    opened = landmarks[0] + np.einsum("w,wlk->lk", weights[open_wide], landmarks[1:])
    lips = project(opened[list(layout.mouth)], region.viewmat, region.K)[:, :2]
    rows, columns = np.indices(region.mask.shape) + 0.5
    equations = ConvexHull(lips).equations
    within = (np.stack([columns, rows], -1) @ equations[:, :2].T + equations[:, 2]).max(-1) < 0
    chin = layout.jaw[int(np.argmax(rest[list(layout.jaw), 1]))]
    sheets = [(skin, skin_means, skin_motion, at_rest)]
    for follows_chin in (0.0, 1.0):
        inner = _spread(within.astype(np.float32), count // MOUTH_SHARE, rng)
        motion = np.repeat(follows_chin * landmarks[1:, chin, :, None], len(inner), axis=2)
        shown = _lift(region, inner, MOUTH_DEPTH * (1 + 0.2 * follows_chin))
        sheets.append((inner, shown - np.einsum("w,wkn->nk", weights[open_wide], motion), motion, open_wide))

    planes = []
    for pixels, means, motion, frame in sheets:
        posed = means + np.einsum("w,wkn->nk", weights[frame], motion)
        seen = project(posed, track.viewmats[frame], track.K)[:, 1::-1] - 0.5
        colors = [
            map_coordinates(channel, seen.T, order=1, mode="nearest") for channel in np.moveaxis(images[frame], -1, 0)
        ]
        distance = cKDTree(pixels).query(pixels, k=5)[0][:, 1:].mean(1)
        scales = 0.6 * distance * _look_up(region.depth, pixels) / region.K[0, 0]
        opacity = _look_up(region.mask, pixels).clip(0.05, 0.95)
        plane = np.zeros((ATTRIBUTES, len(pixels)))
        plane[0:3] = means.T
        plane[3] = 1
        plane[7:10] = np.log(scales) + np.log(np.array([[1], [1], [0.3]]))  # flat: the surface faces the camera
        plane[10] = np.log(opacity / (1 - opacity))
        plane[11:14] = np.stack(colors) / 255
        planes.append(plane)
    canonical = np.concatenate(planes, 1).astype(np.float32)
    return canonical, np.concatenate([motion for *_, motion, _ in sheets], 2).astype(np.float32)


def extreme_frames(track: Track, weights: Float32) -> tuple[int, int]:
    """The frame nearest to rest and the one with the widest open lips."""
    return int(np.argmin(np.linalg.norm(weights, axis=1))), int(np.argmax(track.lip_opening))


def _look_up(image: Float32, pixels: Float64) -> Float64:  # [S, S], [N, 2] -> [N]
    return np.asarray(map_coordinates(image, pixels[:, ::-1].T - 0.5, order=1, mode="nearest"), np.float64)


def _lift(region: Region, pixels: Float64, behind: float) -> Float64:
    """Pixels [N, 2] of the reference view -> points [N, 3] of the head frame, ``behind`` the surface (metres)."""
    depths = _look_up(region.depth, pixels) + behind
    return unproject(pixels, depths, region.viewmat, region.K)


def _spread(density: Float32, count: int, rng: np.random.Generator) -> Float64:
    """``count`` points [N, 2], evenly spread but for ``density`` (Lloyd's algorithm on the pixels)."""
    rows, columns = np.nonzero(density)
    pixels = np.stack([columns, rows], 1) + 0.5
    share = density[rows, columns].astype(np.float64)
    chosen = rng.choice(len(pixels), min(count, len(pixels)), replace=False, p=share / share.sum())
    points = pixels[chosen] + rng.uniform(-0.5, 0.5, (len(chosen), 2))
    for _ in range(12):
        nearest = cKDTree(points).query(pixels)[1]
        mass = np.bincount(nearest, share, len(points))
        centre = np.stack([np.bincount(nearest, share * axis, len(points)) for axis in pixels.T], 1)
        points = np.where(mass[:, None] > 0, centre / np.maximum(mass, 1e-9)[:, None], points)
    return np.asarray(points)


def _carry(pixels: Float64, rest: Float64, displacements: Float32, layout: Layout) -> Float64:
    """Displacements [W, L, 3] of the landmarks -> [W, 3, N] of the points between them.

    Inverse distance weights of the nearest landmarks; across the line between the lips nothing is passed on.
    """
    left, right = (rest[list(eye)].mean(0) for eye in layout.eyes)
    unit = float(np.linalg.norm(right - left))
    upper, lower = (list(lip) for lip in layout.inner_lips)
    middle = (rest[upper] + rest[lower]) / 2
    mouth = rest[list(layout.mouth)]
    knots = np.concatenate([mouth[[np.argmin(mouth[:, 0])]], middle, mouth[[np.argmax(mouth[:, 0])]]])
    knots = knots[np.argsort(knots[:, 0])]

    def below(places: Float64) -> npt.NDArray[np.bool_]:
        return np.asarray(places[:, 1] > np.interp(places[:, 0], knots[:, 0], knots[:, 1]))

    side = below(rest)
    side[upper], side[lower] = False, True
    beside = (pixels[:, 0] > knots[0, 0]) & (pixels[:, 0] < knots[-1, 0])
    # Points that stand still: a ring beyond the jaw.
    jaw, outward = _jaw(rest, layout)
    ring = jaw + outward * 0.45 * unit
    places = np.concatenate([rest, ring])
    moves = np.concatenate([displacements, np.zeros((len(displacements), len(ring), 3))], 1)
    sides = np.concatenate([side, np.ones(len(ring), bool)])
    distance = np.linalg.norm(pixels[:, None] - places, axis=-1) / unit  # [N, L]
    distance += (beside[:, None] & (below(pixels)[:, None] != sides)) * 1.0
    nearest = np.argsort(distance, 1)[:, :8]
    weight = (np.take_along_axis(distance, nearest, 1) + 0.01) ** -3
    weight /= weight.sum(1, keepdims=True)
    return np.asarray(np.einsum("nj,wnjk->wkn", weight, moves[:, nearest]))
