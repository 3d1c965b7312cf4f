"""How a face that idles, listens and speaks differs, what each costs, and that it changes without a jump.

In one process, without a server: the nets and the animator of `loadtests.plain`. ``rows``: each state for as long as
its loop lasts, twice; what it does, how much the pictures change from frame to frame (mean difference, of 255), and
processor time a frame, drawn for the first time and again. ``changes``: the same differences where one state becomes
another, against the largest within the two. The picture shows the states one below the other, and what the head, the
eyes and the lids do meanwhile.

    python -m loadtests.states --json bench/states.json --picture demo/states.jpg
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import simplejpeg
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loadtests.plain import Pipeline
from loadtests.streams import windows
from talksplat import avatar as bundle
from talksplat import clock
from talksplat.animator import Chunk, Options, gate
from talksplat.attention import LID_STEPS, LOOK_STEP, Head, Pose, sway, voiced
from talksplat.avatar import AnyAvatar
from talksplat.bench._report import Row, report
from talksplat.files import replacing
from talksplat.server import ROOT

State: TypeAlias = Literal["idle", "listening", "speaking"]
Float64 = npt.NDArray[np.float64]

STATES: tuple[State, ...] = ("idle", "listening", "speaking")
CHANGES: tuple[tuple[State, State], ...] = tuple(itertools.permutations(STATES, 2))
AVATAR, SEED = "ava", 1
ASIDE = 10  # steps of the eyes that are a look aside: a millimetre
BEFORE, AFTER = 3, 5  # chunks around a change that are looked at
SHOWN, APART = 8, 20  # pictures of each state, frames from one to the next
CROP = slice(85, 325), slice(136, 376)  # of a picture of 512 pixels
THUMB, PLOTS = 150, 220  # pixels
QUALITY = 72  # of the picture's JPEG


@dataclass(frozen=True)
class Shot:
    """A frame and what was drawn."""

    data: bytes
    pose: Pose
    turn: Float64  # [3] radians


class Stage:
    """Plays states after each other, with the voice of demo/speech.wav."""

    def __init__(self) -> None:
        self.pipeline = Pipeline(ROOT / "avatars")
        self.avatar = bundle.read(ROOT / "avatars", AVATAR, AnyAvatar)
        self.head = Head(self.avatar.viewmats)
        self.voice = [np.frombuffer(window, "<f4") for window in windows()]
        self.pipeline.animator.preload(AVATAR)

    def play(self, states: Sequence[State], first: int = 0) -> list[Shot]:
        """A chunk of each, from a chunk on; listening takes two chunks to come and to go."""
        shots: list[Shot] = []
        level = 100 * (states[0] == "listening")
        for number, state in enumerate(states, first):
            wanted = 100 * (state == "listening")
            before, level = level, level + max(-50, min(wanted - level, 50))
            options = Options(seed=SEED, listening_before=before, listening=level)
            motion = speech = None
            if state == "speaking":
                motion, speech = self.pipeline.motion(self.voice[number % len(self.voice)], AVATAR)
            index = clock.CHUNK_FRAMES * number
            [frames] = self.pipeline.animator.render([Chunk(AVATAR, motion, speech, index, options)])
            if isinstance(frames, Exception):
                raise frames
            shares = np.zeros(clock.CHUNK_FRAMES) if speech is None else gate(speech)
            for offset, (frame, share) in enumerate(zip(frames, shares, strict=True)):
                spoken = voiced(float(share))
                pose = self.head.pose(index + offset, SEED, options.listening_at(offset), spoken)
                shots.append(Shot(frame, pose, spoken * sway(index + offset, SEED)))
        return shots

    def pitch(self, shots: Sequence[Shot]) -> Float64:
        """How far the face looks down in each, degrees."""
        views = np.array([self.head.viewmat(shot.pose, shot.turn)[1, :3] for shot in shots], np.float64)
        return np.asarray(np.degrees(-(views @ self.avatar.viewmats[self.head.usual, 2, :3])))

    def row(self, state: State) -> Row:
        """See the module."""
        chunks = self.head.loop // clock.CHUNK_FRAMES
        costs: list[float] = []
        for first in (0, chunks):
            before, began = self.pipeline.animator.counts().caches["resting"], time.process_time()
            shots = self.play([state] * chunks, first)
            costs.append(1e3 * (time.process_time() - began) / len(shots))
            after = self.pipeline.animator.counts().caches["resting"]
        change, minutes = _changes(shots), len(shots) / clock.FPS / 60
        asked = after.hits - before.hits + after.misses - before.misses
        return {
            "state": state,
            "frames": len(shots),
            "cpu_ms_per_frame_first": costs[0],
            "cpu_ms_per_frame": costs[1],
            "cached_pct": 100 * (after.hits - before.hits) / asked if asked else None,
            "looks_aside_pct": 100 * float(np.mean([abs(shot.pose.look[0]) > ASIDE for shot in shots])),
            "lids_open_pct": 100 - 100 / LID_STEPS * float(np.median([shot.pose.lids for shot in shots])),
            "blinks_per_minute": _begins([shot.pose.lids > LID_STEPS / 2 for shot in shots]) / minutes,
            "nods_per_minute": _begins([shot.pose.nod > 0 for shot in shots]) / minutes,
            "pitch_sd_deg": float(self.pitch(shots).std()),
            "change_mean": float(change.mean()),
            "change_p95": float(np.percentile(change, 95)),
            "change_max": float(change.max()),
        }

    def change(self, one: State, other: State, within: float) -> Row:
        """From one state to another at each place of the loop where that can be; the largest that was seen."""
        found: list[float] = []
        for first in range(0, self.head.loop // clock.CHUNK_FRAMES, BEFORE + AFTER):
            found += _changes(self.play([one] * BEFORE + [other] * AFTER, first)).tolist()
        return {
            "change": f"{one} to {other}",
            "change_mean": float(np.mean(found)),
            "change_max": max(found),
            "against_within": max(found) / within,
        }


def _changes(shots: Sequence[Shot]) -> Float64:
    """Mean difference of each picture from the one before, of 255."""
    pictures = (simplejpeg.decode_jpeg(shot.data).astype(np.int16) for shot in shots)
    return np.array([np.abs(after - before).mean() for before, after in itertools.pairwise(pictures)])


def _begins(there: Sequence[bool]) -> int:
    return sum(after and not before for before, after in itertools.pairwise([False, *there]))


def draw(stage: Stage, path: Path) -> None:
    """The states one below the other, and what moved, as a JPEG."""
    chunks = SHOWN * APART // clock.CHUNK_FRAMES
    played = {state: stage.play([state] * chunks) for state in STATES}
    figure = Figure((SHOWN * THUMB / 100, (3 * THUMB + PLOTS) / 100), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(4, 3, height_ratios=[THUMB, THUMB, THUMB, PLOTS - 40])
    for row, (state, shots) in enumerate(played.items()):
        axes = figure.add_subplot(grid[row, :])
        strip = [simplejpeg.decode_jpeg(shot.data)[CROP] for shot in shots[APART // 2 :: APART]]
        axes.imshow(np.hstack(strip), interpolation="lanczos")
        axes.set(xticks=[], yticks=[], ylabel=state)
        axes.spines[:].set_visible(False)
    curves: dict[str, Callable[[Sequence[Shot]], Float64]] = {
        "head down, degrees": stage.pitch,
        "eyes to the right, mm": lambda shots: 1e3 * LOOK_STEP * np.array([shot.pose.look[0] for shot in shots]),
        "lids open, %": lambda shots: 100 - 100 / LID_STEPS * np.array([shot.pose.lids for shot in shots]),
    }
    for column, (title, of) in enumerate(curves.items()):
        axes = figure.add_subplot(grid[3, column])
        for state, shots in played.items():
            axes.plot(np.arange(len(shots)) / clock.FPS, of(shots), label=state, linewidth=1)
        axes.set_title(title, fontsize="small")
        axes.set_xlabel("s", fontsize="small")
        axes.tick_params(labelsize="small")
    axes.legend(fontsize="x-small", loc="lower left")
    with replacing(path) as unfinished:
        figure.savefig(unfinished, pil_kwargs={"quality": QUALITY})


def main(argv: list[str] | None = None) -> int:
    """Measure and report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.states", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write the picture there, a JPEG")
    arguments = parser.parse_args(argv)
    stage = Stage()
    rows = [stage.row(state) for state in STATES]
    most = {str(row["state"]): float(row["change_max"] or 0) for row in rows}
    changes = [stage.change(one, other, max(most[one], most[other])) for one, other in CHANGES]
    report("states", rows, arguments.json, {"changes": changes})
    if arguments.picture is not None:
        draw(stage, arguments.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
