"""The rasterizer: milliseconds a frame, and PSNR against the float64 oracle.

The scene ``head`` is synthetic; a covered pixel of 512 x 512 blends about 30 Gaussians there. Other scenes are avatars,
with random coefficients. Times are medians of many calls, in interleaved bursts; ``forward_least_ms`` is the least.
``threads`` above 1 share out the frames of a batch; the time is then that of the batch divided by its frames.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
from rich.progress import Progress

from talksplat import avatar as bundle
from talksplat import splat
from talksplat.animator import posed
from talksplat.bench import _head
from talksplat.bench._report import Row, report
from talksplat.server import ROOT
from talksplat.splat import Gaussians, reference

SCENES = ((5_000, 256), (5_000, 512), (20_000, 256), (20_000, 512), (50_000, 256), (50_000, 512))
QUICK_SCENES = ((20_000, 512),)
BACKWARD_SCENE = (10_000, 256)
DIRTY_SCENE = (20_000, 512)
DIRTY_FRAMES = 12
BURST = 4  # calls
MODES: tuple[splat.Mode, ...] = ("exact", "fast")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Register this benchmark's own options."""
    parser.add_argument("--quick", action="store_true", help="one scene and few rounds: half a minute")
    parser.add_argument("--avatar", type=Path, default=ROOT / "avatars" / "ava", help="also draw this bundle")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, and write where ``--json`` says."""
    rounds = 3 if arguments.quick else 12
    scenes = QUICK_SCENES if arguments.quick else SCENES
    served = _Scene.avatar(arguments.avatar)
    rows: list[Row] = []
    with Progress(transient=True) as progress:
        task = progress.add_task("splat", total=len(scenes) + 3)
        for count, size in scenes:
            rows += _still(_Scene.head(count, size), rounds)
            progress.advance(task)
        rows += _still(_Scene.head(*BACKWARD_SCENE), rounds, modes=("exact",))
        progress.advance(task)
        rows += _still(served, rounds)
        progress.advance(task)
        rows += _dirty(*DIRTY_SCENE, rounds)
        progress.advance(task)
    report("splat", rows, arguments.json)
    return 0


@dataclass(frozen=True, eq=False)
class _Scene:
    name: str
    gaussians: Gaussians
    viewmat: splat.Floats  # [4, 4]
    K: splat.Floats  # [3, 3]
    size: int  # pixels a side

    @classmethod
    def head(cls, count: int, size: int) -> Self:
        return cls("head", _head.head(count), *_head.camera(size, size), size)

    @classmethod
    def avatar(cls, folder: Path) -> Self:
        found = bundle.read(folder.parent, folder.name, bundle.AnyAvatar)
        if isinstance(found, bundle.Avatar):
            shapes = splat.Blendshapes(found.canonical, found.bases, found.basis_scales)
        else:
            assert isinstance(found, bundle.Huma1Avatar)
            shapes = posed(found, np.zeros_like(found.canonical), 0.0)
        weights = np.random.default_rng(0).normal(0, 0.5, shapes.rank).astype(np.float32)
        return cls(found.id, splat.blend(shapes, weights), found.viewmats[0], found.K, found.width)


def _still(scene: _Scene, rounds: int, *, modes: tuple[splat.Mode, ...] = MODES) -> list[Row]:
    gaussians, view, size = scene.gaussians, scene.viewmat, scene.size
    oracle, _ = reference.render(gaussians, view, scene.K, size, size, _head.BACKGROUND)
    gradient = np.random.default_rng(0).normal(size=(size, size, 3)).astype(np.float32)
    rows: list[Row] = []
    forward: list[Callable[[], object]] = []
    backward: list[Callable[[], object]] = []
    frames: list[int] = []
    for isa, mode, threads in _variants(modes):
        frames.append(2 * threads if threads > 1 else 1)
        views = np.repeat(view[None], frames[-1], axis=0)
        arguments = (*gaussians, views, scene.K, size, size)
        draw = partial(splat.render, *arguments, backgrounds=_head.BACKGROUND, mode=mode, isa=isa, threads=threads)
        forward.append(draw)
        if mode == "exact" and threads == 1:
            tape = splat.render_with_tape(*arguments, isa=isa, threads=1)[2]
            backward.append(partial(tape.backward, gradient[None]))
        else:
            backward.append(_nothing)
        psnr = reference.psnr(draw()[0][0], oracle)
        rows.append(_row(scene.name, len(gaussians.means), size, mode, isa, threads, psnr))
    forward_ms, backward_ms = _times_ms(forward, rounds), _times_ms(backward, rounds)
    for i, row in enumerate(rows):
        row["forward_ms"] = float(np.median(forward_ms[i])) / frames[i]
        row["forward_least_ms"] = min(forward_ms[i]) / frames[i]
        if backward[i] is not _nothing:
            row["backward_ms"] = float(np.median(backward_ms[i]))
    return rows


def _variants(modes: tuple[splat.Mode, ...]) -> list[tuple[str, splat.Mode, int]]:
    """Instruction set, mode, threads: all threads only with the fastest set."""
    isas, cores = splat.isas(), len(os.sched_getaffinity(0))
    single: list[tuple[str, splat.Mode, int]] = [(isa, mode, 1) for isa in isas for mode in modes]
    return single + ([(isas[0], mode, cores) for mode in modes] if cores > 1 else [])


def _dirty(count: int, size: int, rounds: int) -> list[Row]:
    gaussians, (view, intrinsics) = _head.head(count), _head.camera(size, size)
    moves = _head.mouth(gaussians)
    still, moving = _head.take(gaussians, ~moves), _head.take(gaussians, moves)
    frames = [_head.speak(moving, t) for t in range(DIRTY_FRAMES)]
    everything = Gaussians(*(np.concatenate(pair) for pair in zip(still, frames[-1], strict=True)))
    oracle, _ = reference.render(everything, view, intrinsics, size, size, _head.BACKGROUND)
    rows: list[Row] = []
    for mode in MODES:
        renderer = splat.DirtyRenderer(still, view, intrinsics, size, size, background=_head.BACKGROUND, mode=mode)
        renderer.draw(frames[0])  # the first frame draws everything
        times = _times_ms([partial(renderer.draw, frame) for frame in frames], rounds)
        psnr = reference.psnr(renderer.colors, oracle)
        row = _row("head", count, size, f"dirty {mode}", splat.isas()[0], 1, psnr)
        row["forward_ms"] = float(np.median(times))
        row["forward_least_ms"] = float(np.mean([min(each) for each in times]))
        rows.append(row)
    return rows


def _row(scene: str, gaussians: int, size: int, mode: str, isa: str, threads: int, psnr_db: float) -> Row:
    return {
        "scene": scene, "gaussians": gaussians, "size": size, "mode": mode, "isa": isa, "threads": threads,
        "forward_ms": None, "forward_least_ms": None, "backward_ms": None, "psnr_db": psnr_db,
    }  # fmt: skip


def _nothing() -> None:
    pass


def _times_ms(calls: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """The times of each call, in rounds of a burst of each; the first of a burst warms the caches and is left out."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, found in zip(calls, times, strict=True):
            for repeat in range(BURST + 1):
                start = time.perf_counter()
                call()
                if repeat:
                    found.append(1e3 * (time.perf_counter() - start))
    return times
