"""What a face does besides its lips: where it looks, how it blinks, nods and sways, idle, listening or speaking.

Everything follows from the frame's index, a seed, and how much the face listens and speaks, so any server draws any
frame. Idle, it looks aside now and then. Listening, it looks at the viewer with wider eyes, blinks half as often, and
nods. Speaking, it looks aside in pauses, if at all, and sways a little. A nod is a walk along the recorded plates, so
all of the head takes part, and the drawn face goes a little further: it turns by no more than 1.25 degrees against the
plate, where no rim shows.

A pose has few values, in whole steps, and looks and nods come again with the plates: a frame at rest that was drawn
once can be sent again, to whoever watches.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from talksplat import splat

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]

BLINK_SLOT = 100  # frames (4 s) that hold one blink each, at a place that differs by
BLINK_JITTER = 50  # frames: so two blinks are 2 to 6 s apart
BLINK_SHAPE = (0.35, 0.9, 1.0, 0.8, 0.45, 0.15)  # of the lids, frame by frame: they shut faster than they open
LID_STEPS = 40  # from open to shut
ALERT = 0.125  # how much wider the lids of a listener are open

LOOK_STEP = 1e-4  # metres that the iris moves
ASIDE = ((-25, 6), (24, 2), (-18, -5))  # steps to the right, down: where idle eyes go, if not to the viewer
SPEAKERS_LOOK = 0.7  # how much of a look aside a voice takes back
LOOK_FRAMES = 75  # (3 s) that a look lasts
LOOP_FRAMES = 600  # (24 s) after which looks and nods come again, at least
SACCADE = 3  # frames that the eyes take from one look to the next
EYE_RADIUS = 0.012  # metres
MOST_TURN = 15  # steps that the eyes turn at most to stay on the viewer while the head moves

NOD_SLOT = 110  # frames (4.4 s) that hold a nod each, or two in a row, at a place that differs by
NOD_JITTER = 60  # frames
NOD_FRAMES = 18  # down and up
NOD_REACH = 20  # plates that a nod goes from where it begins, at most
NOD_STEP, NOD_STEPS = np.radians(0.25), 5  # by which the drawn face goes further
NOD_CHOICE = 0.7  # of the deepest nod that the slot has: a shallower one is not begun

SWAY_FRAMES = 14  # from one extreme to the next
SWAY = np.radians([0.6, 0.5, 0.4])  # at most, about axes to the right, down and forward in the picture

COVERED = 30  # of 255: by how much the green of a pixel changes that a lid covers
OPENING = (0.0008, 0.03)  # of the picture: how large an eye's opening is
APART = (1.2, 4.0)  # widths that two openings are from each other
RIM = (2.1, 3.4)  # standard deviations of an opening's pixels from its middle to where nothing moves: across, down

STILL = np.zeros(3)


@dataclass(frozen=True)
class Pose:
    """Of a frame at rest: what it is drawn from, besides the avatar."""

    plate: int
    lids: int  # how far they are shut, of `LID_STEPS`; less than 0: wide open
    nod: int = 0  # how far the face is down against the plate, `NOD_STEP`
    look: tuple[int, int] = (0, 0)  # `LOOK_STEP` of the iris, right and down in the picture, from where it was recorded


def blink(frame_index: int, seed: int = 0) -> float:
    """How far the lids are shut, 0 to 1: the weight of the basis `avatar.BLINK`."""
    slot, place = divmod(frame_index, BLINK_SLOT)
    since = place - _random(seed, slot) % (BLINK_JITTER + 1)
    return BLINK_SHAPE[since] if 0 <= since < len(BLINK_SHAPE) else 0.0


def plate_index(frame_index: int, seed: int, plates: int) -> int:
    """Which recorded frame lies behind: forth and back, from a place that the seed chooses.

    The first and the last stay for two frames, so that the head stops before it turns back.
    """
    return _folded(_place(frame_index, seed, 2 * plates), plates)


def voiced(
    share: float,  # of the motion that counts, see `animator.gate`
) -> float:
    """How much a face speaks, 0 to 1: dips within words hardly count."""
    return min(1.0, 3 * share)


def lids(
    frame_index: int,
    seed: int,
    listening: float,  # 0 to 1
) -> int:
    """How far the lids are shut, of `LID_STEPS`: a listener's are wider open, and every other blink is left out."""
    shut = blink(frame_index, seed)
    if frame_index // BLINK_SLOT % 2:
        shut *= 1 - listening
    return round(LID_STEPS * (shut - ALERT * listening * (1 - shut)))


def sway(frame_index: int, seed: int) -> Float64:  # [3] radians
    """How a speaker's head has turned: by `SWAY` at most."""
    knot, place = divmod(frame_index, SWAY_FRAMES)
    share = _smooth(place / SWAY_FRAMES)
    return np.asarray(SWAY * ((1 - share) * _directions(seed, knot) + share * _directions(seed, knot + 1)))


@dataclass(frozen=True, eq=False)
class Head:
    """What the recorded head poses say about an avatar's plates.

    Args:
        viewmats: head frame -> camera, of each plate.
    """

    viewmats: Float32  # [P, 4, 4]
    usual: int = field(init=False)  # plate on which the head is nearest to its mean pose
    loop: int = field(init=False)  # frames, of whole rounds forth and back, after which looks and nods come again
    _nods: Sequence[tuple[int, int]] = field(init=False, repr=False)  # where in the loop each begins, plates to go
    _viewer: Whole = field(init=False, repr=False)  # [P, 2] steps that keep the eyes on the viewer

    def __post_init__(self) -> None:
        round_ = 2 * len(self.viewmats)
        away = np.square(self.viewmats - self.viewmats.mean(0)).sum((1, 2))
        object.__setattr__(self, "usual", int(away.argmin()))
        object.__setattr__(self, "loop", round_ * -(-LOOP_FRAMES // round_))
        turns = self.viewmats[:, :3, :3]
        down = -(turns[:, 1] @ turns[self.usual, 2])  # of the way that looks out of the picture on the usual plate
        object.__setattr__(self, "_nods", _nods(down, self.loop))
        object.__setattr__(self, "_viewer", _viewer(self.viewmats))

    def pose(
        self,
        frame_index: int,
        seed: int,
        listening: float = 0.0,  # 0 to 1
        speaking: float = 0.0,  # 0 to 1
    ) -> Pose:
        """Of a frame."""
        place = _place(frame_index, seed, self.loop)
        plate, down = plate_index(frame_index, seed, len(self.viewmats)), 0
        if listening:
            depth, way = self._nod(place)
            plate = min(max(round(plate + listening * depth * way), 0), len(self.viewmats) - 1)
            down = round(NOD_STEPS * listening * depth)
        idle = (1 - listening) * (1 - SPEAKERS_LOOK * speaking)
        x, y = (round(idle * steps) for steps in self._aside(place))
        to_x, to_y = self._viewer[plate].tolist()
        to_y -= round(down * NOD_STEP * EYE_RADIUS / LOOK_STEP)
        return Pose(plate, lids(frame_index, seed, listening), down, (x + to_x, y + to_y))

    def _aside(
        self,
        place: int,  # in the loop
    ) -> tuple[float, float]:
        """Where idle eyes look, in `LOOK_STEP` from the viewer."""
        slots = self.loop // LOOK_FRAMES
        slot = min(place // LOOK_FRAMES, slots - 1)
        (x, y), (to_x, to_y) = _look(slot - 1 if slot else slots - 1), _look(slot)
        share = _smooth((place - LOOK_FRAMES * slot + 1) / SACCADE)
        return x + share * (to_x - x), y + share * (to_y - y)

    def _nod(
        self,
        place: int,  # in the loop
    ) -> tuple[float, int]:
        """How far down a listener's head is, 0 to 1, of how many plates."""
        number = bisect.bisect_right(self._nods, place, key=lambda nod: nod[0])
        begin, way = self._nods[number - 1]
        return (_bump((place - begin) / NOD_FRAMES), way) if begin <= place < begin + NOD_FRAMES else (0.0, 0)

    def viewmat(
        self,
        pose: Pose,
        turn: Float64 = STILL,  # [3] radians about axes to the right, down and forward in the picture
    ) -> Float32:  # [4, 4]
        """Head frame -> camera."""
        viewmat: Float32 = self.viewmats[pose.plate]
        turn = turn + np.array([pose.nod * NOD_STEP, 0, 0])
        if not turn.any():
            return viewmat
        x, y, z = turn @ self.viewmats[self.usual, :3, :3]
        turned = np.eye(4)
        turned[:3, :3] += [[0, -z, y], [z, 0, -x], [-y, x, 0]]  # as good as a rotation where it is so small
        return np.asarray(viewmat @ turned, np.float32)


@dataclass(frozen=True, eq=False)
class Eyes:
    """The Gaussians that move when an avatar looks aside.

    Fully at the middle of each eye's opening and less and less towards its rim: the white is pressed together on one
    side and stretched on the other, the lids stand still.
    """

    shares: npt.NDArray[np.int8]  # [N] 0 to 127
    axes: Float32  # [2, 3] of the picture, right and down, in the head's frame

    def scales(self) -> Float32:  # [3, 2]
        """What a step to the right, and one down, adds to the means of a share of 1."""
        return self.axes.T * np.float32(LOOK_STEP / 127)


def find_eyes(
    awake: tuple[splat.Blendshapes, Float32],  # and weights [K]: the face at rest
    asleep: tuple[splat.Blendshapes, Float32],  # the same with shut lids
    viewmat: Float32,  # [4, 4]
    K: Float32,  # [3, 3]  # noqa: N803
    width: int,
    height: int,
) -> Eyes | None:
    """Look for what the lids cover: two openings beside each other. None where that is not what is found."""
    plate = np.full((height // 2, width // 2, 3), 128, np.uint8)
    camera = (K * np.array([[0.5], [0.5], [1]])).astype(np.float32)
    images = splat.render_onto([splat.Job(*face, viewmat, camera, plate) for face in (awake, asleep)])
    green = [image[..., 1].astype(np.int16) for image in images]
    covered = np.abs(green[0] - green[1]) > COVERED
    openings = _openings(covered)
    if openings is None:
        return None
    shapes, _ = awake
    x, y, z = camera @ (viewmat[:3, :3] @ shapes.canonical[:3] + viewmat[:3, 3:])
    z = np.maximum(z, np.float32(1e-3))
    weights = np.zeros(shapes.count, np.float32)
    for centre, radii in openings:
        (across, down), (width_, height_) = centre.astype(np.float32), radii.astype(np.float32)
        away = ((x / z - across) / width_) ** 2 + ((y / z - down) / height_) ** 2
        weights += np.clip(1 - away * away, 0, None) ** 2
    return Eyes(np.round(127 * weights).astype(np.int8), viewmat[:2, :3])


def _openings(
    covered: npt.NDArray[np.bool_],  # [H, W]
) -> list[tuple[Float64, Float64]] | None:
    """Middle and radii of the two openings, pixels, rounded: the same wherever it is computed."""
    rows, columns = np.nonzero(covered)
    if not rows.size:
        return None
    found = []
    for side in (columns < columns.mean(), columns >= columns.mean()):
        pixels = np.stack([columns[side], rows[side]], 1) + 0.5
        if not OPENING[0] * covered.size <= len(pixels) <= OPENING[1] * covered.size:
            return None
        found.append((pixels.mean(0), pixels.std(0) * RIM))
    (left, left_radii), (right, right_radii) = found
    across, down = right - left
    if abs(down) > across / 3 or not APART[0] <= across / (left_radii + right_radii)[0] <= APART[1]:
        return None
    return [(np.round(4 * centre) / 4, np.round(4 * radii) / 4) for centre, radii in found]


def _nods(
    down: Float32,  # [P] how far the face looks down
    loop: int,
) -> list[tuple[int, int]]:
    """One nod, or two in a row, in each slot of the loop: where it begins, and how many plates it goes.

    In its middle it is at the plate within reach on which the head is furthest down; it begins where that is far.
    """
    plates = np.arange(len(down))
    within = np.clip(plates[:, None] + np.arange(-NOD_REACH, NOD_REACH + 1), 0, len(down) - 1)
    lowest = within[plates, down[within].argmax(1)]
    behind = np.array([_folded(place, len(down)) for place in range(loop)])  # if nobody nodded
    middle = np.roll(behind, -NOD_FRAMES // 2)  # what was behind at first is in reach from there: no depth is below 0
    ways, depths = lowest[middle] - middle, down[lowest[middle]] - down[behind]
    nods = []
    for first in range(0, loop - NOD_SLOT + 1, NOD_SLOT):
        depth = depths[first : first + NOD_JITTER + 1]
        deep = np.flatnonzero(depth >= NOD_CHOICE * depth.max())
        begin = first + int(deep[_random(0, ~first) % len(deep)])
        nods += [(place, int(ways[place])) for place in (begin, begin + NOD_FRAMES)[: 1 + _random(1, ~first) % 2]]
    return nods


def _viewer(
    viewmats: Float32,  # [P, 4, 4]
) -> Whole:  # [P, 2]
    """What the eyes turn against the head to stay on the camera, if they were on it on the average."""
    turns = viewmats[:, :3, :3].astype(np.float64)
    cameras = -np.einsum("pji,pj->pi", turns, viewmats[:, :3, 3].astype(np.float64))
    cameras /= np.maximum(np.linalg.norm(cameras, axis=1, keepdims=True), 1e-9)
    steps = np.einsum("pai,pi->pa", turns[:, :2], cameras - cameras.mean(0)) * EYE_RADIUS / LOOK_STEP
    return np.asarray(np.clip(np.round(steps), -MOST_TURN, MOST_TURN), np.int64)


def _place(frame_index: int, seed: int, loop: int) -> int:
    return (frame_index + _random(seed, -1)) % loop


def _folded(place: int, plates: int) -> int:
    place %= 2 * plates
    return min(place, 2 * plates - 1 - place)


def _look(slot: int) -> tuple[int, int]:
    """Every other one is at the viewer."""
    return ASIDE[_random(0, slot) % len(ASIDE)] if slot % 2 else (0, 0)


def _directions(seed: int, knot: int) -> Float64:  # [3] -1 to 1
    number = _random(seed, knot)
    return np.array([(number >> shift) % 201 - 100 for shift in (0, 12, 24)]) / 100


def _bump(place: float) -> float:
    """From 0 at 0 over 1 in the middle to 0 at 1, without a corner."""
    return _smooth(1 - abs(2 * place - 1))


def _smooth(place: float) -> float:
    place = min(max(place, 0.0), 1.0)
    return place * place * (3 - 2 * place)


def _random(seed: int, number: int) -> int:
    """A whole number that looks random and is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=6).digest(), "little")
