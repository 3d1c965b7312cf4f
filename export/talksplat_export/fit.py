"""`talksplat-export fit`: from a recording of somebody speaking to an avatar.

Steps: track, cut, stage A (pictures), stage B (sound), plates, bundle, report. Each leaves its result in the work
folder under a digest of everything it was made from, and is done again only when that changes; stage A saves its state
every minute. So the same command resumes after an interrupt, and repeats stage B alone after new encoder weights. Who
changes this code has to delete the work folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from rich.console import Console

from talksplat import avatar as bundle
from talksplat import clock
from talksplat.avatar import BLINK, WEIGHTS, Avatar
from talksplat.bench._report import commit
from talksplat_export import audio_encoder, bars, geometry, plates, report, stage_a, stage_b, track
from talksplat_export.geometry import Float32
from talksplat_export.quality import Subject
from talksplat_export.recording import Recording, RecordingError
from talksplat_export.track import Landmarker, Track, TrackError

MIN_SECONDS = 2  # to fit to; a person worth looking at needs a minute
DEGRADED = 8  # versions of the audio, besides the recorded one, for stage B


@dataclass(frozen=True)
class Settings:
    """What a fit may be asked for, besides its files."""

    train_seconds: float = 150.0  # the rest is for testing
    gaussians: int = 8000
    steps: int = 6000  # of stage A
    plates: int = 200
    megabytes: float = 8.0  # of the bundle, at most
    seed: int = 0


def fit(
    recording: Recording,
    out: Path,
    source: Path | None,
    landmarker: Path | None,
    work: Path,
    settings: Settings,
    about: str,
    console: Console,
) -> Path:
    """Fit an avatar and write its bundle.

    Args:
        out: the bundle's folder; its name is the avatar's id.
        source: ground truth to read instead of tracking.
        landmarker: FaceLandmarker's model, where it is not to be downloaded.
        work: folder of what the steps leave.
        about: where the recording comes from, for the bundle.

    Raises:
        RecordingError, TrackError, PlatesError: the recording can't be used; nothing was written to ``out``.
    """
    bundle.check_id(out.name, RecordingError)
    audio = recording.audio
    steps = _Steps(work, console)
    tracked = _track(recording, source, landmarker, steps)
    training = min(round(settings.train_seconds * clock.FPS), len(tracked))
    if training < MIN_SECONDS * clock.FPS:
        raise RecordingError(f"There are {training / clock.FPS:.1f} s to fit to, expected {MIN_SECONDS} s or more.")
    train = tracked[:training]
    basis = geometry.coefficient_basis(train.expression)
    weights = geometry.frame_weights(tracked, basis)

    head = _stage_a(recording, tracked, weights, training, settings, steps)
    adapter = _stage_b(audio, train, weights[:training], settings, steps)
    canonical, bases, basis_scales = head
    rest_of_bundle = canonical.nbytes + bases.nbytes + 200_000
    loop = plates.choose(train, settings.plates)
    console.print(f"plates: frames {loop.start} to {loop.stop - 1}")
    jpegs = plates.encode(recording, loop, int(settings.megabytes * 1e6) - rest_of_bundle)
    avatar = Avatar(
        id=out.name,
        canonical=canonical,
        bases=bases,
        basis_scales=basis_scales,
        adapter_in=adapter.adapter_in,
        adapter_out=adapter.adapter_out,
        plates=jpegs,
        viewmats=np.ascontiguousarray(tracked.viewmats[loop.start : loop.stop]),
        K=tracked.K,
        width=recording.size,
        height=recording.size,
        audio_encoder=sha256(audio_encoder.WEIGHTS),
        provenance={
            "about": about,
            "recording": recording.path.name,
            "recording_sha256": recording.sha256,
            "track": tracked.source,
            "train_frames": training,
            "plate_frames": [loop.start, loop.stop],
            "settings": asdict(settings),
            "commit": commit(),
            "versions": {name: version(name) for name in ("talksplat", "torch", "numpy", "mediapipe")},
            "coefficient_basis": basis.tolist(),
        },
    )
    folder = bundle.write(avatar, out.parent)
    if training < len(tracked):
        _report(recording, avatar, tracked, landmarker, steps)
    return folder


def _report(recording: Recording, avatar: Avatar, tracked: Track, model: Path | None, steps: _Steps) -> None:
    """Look at the frames that were kept back; on pixels where a FaceLandmarker is at hand."""
    subject = Subject(avatar, recording, tracked, stage_b.hear(recording.audio, len(tracked)))
    losses = json.loads((steps.folder / "losses.json").read_text())
    if model is None and "mediapipe" in tracked.source:
        model = track.landmarker_file(None)
    with (
        Landmarker(model) if model is not None else nullcontext() as landmarker,
        steps.progress("report", len(subject.test)) as advance,
    ):
        path = report.write(steps.folder, subject, losses, landmarker, advance)
    steps.console.print(f"report: {path}")


def _track(recording: Recording, source: Path | None, landmarker: Path | None, steps: _Steps) -> Track:
    path = steps.folder / "track.npz"
    model = None if source is not None else track.landmarker_file(landmarker)
    key = steps.key(recording.sha256, recording.size, sha256(source or model))
    if not steps.is_done("track", key, path):
        with steps.progress("track", recording.length) as advance:
            track.find(recording, source, model, advance).save(path)
        steps.mark("track", key)
    return Track.load(path)


def _stage_a(
    recording: Recording,
    tracked: Track,
    weights: Float32,
    training: int,
    settings: Settings,
    steps: _Steps,
) -> tuple[Float32, Any, Float32]:
    train = tracked[:training]
    folder = steps.folder
    path, checkpoint, crops_folder = folder / "gaussians.safetensors", folder / "stage_a.pt", folder / "crops"
    used = slice(0, training, max(training // 1500, 1))  # of the frames, for the geometry
    cut_key = steps.key(steps.done["track"], training)
    key = steps.key(cut_key, settings.gaussians, settings.steps, settings.seed)
    if steps.is_done("stage-a", key, path):
        return _load_gaussians(path)

    moving = np.flatnonzero(weights[:training].any(0))  # the weights that this recording has
    landmarks, distance = geometry.triangulate(train[used], weights[:training][used][:, moving])
    steps.console.print(f"landmarks in 3D: {distance:.2f} px from the track")
    region = geometry.region(train[used], landmarks, weights[:training][used][:, moving], recording.size)
    if not steps.is_done("cut", cut_key, crops_folder / "crops.npz"):
        with steps.progress("cut", training) as advance:
            stage_a.cut(recording, train, region, range(training), crops_folder, advance)
        steps.mark("cut", cut_key)
    crops = stage_a.open_crops(crops_folder)

    extremes = geometry.extreme_frames(train, weights[:training][:, moving])
    images = {index: image for index, image in enumerate(recording.frames(0, max(extremes) + 1)) if index in extremes}
    canonical, motion = geometry.seed(
        region,
        train,
        landmarks,
        weights[:training][:, moving],
        images,
        settings.gaussians,
        np.random.default_rng(settings.seed),
    )
    full = np.zeros((WEIGHTS, 3, canonical.shape[1]), np.float32)
    full[moving] = motion
    if steps.done.get("stage-a-begun") != key:
        checkpoint.unlink(missing_ok=True)
        steps.mark("stage-a-begun", key)
    head = stage_a.Head(canonical, full)
    with steps.progress("stage A", settings.steps) as advance:
        losses = stage_a.fit(
            head,
            crops,
            train,
            weights,
            stage_a.sampling(train),
            settings.steps,
            settings.seed,
            checkpoint,
            lambda done: advance(done.step),
        )
    _write(folder / "losses.json", json.dumps([round(loss, 5) for loss in losses]).encode())
    canonical, bases, scales = head.quantised()
    _write(path, safetensors.numpy.save({"canonical": canonical, "bases": bases, "basis_scales": scales}))
    steps.mark("stage-a", key)
    checkpoint.unlink()
    shutil.rmtree(crops_folder)  # a gigabyte that a minute makes anew
    return canonical, bases, scales


def _load_gaussians(path: Path) -> tuple[Float32, Any, Float32]:
    arrays = safetensors.numpy.load_file(path)
    return arrays["canonical"], arrays["bases"], arrays["basis_scales"]


def _stage_b(audio: Float32, train: Track, weights: Float32, settings: Settings, steps: _Steps) -> stage_b.Adapter:
    path = steps.folder / "adapter.safetensors"
    key = steps.key(
        steps.done["track"],
        hashlib.sha256(audio.tobytes()).hexdigest(),
        len(train),
        sha256(audio_encoder.WEIGHTS),
        DEGRADED,
        settings.seed,
    )
    if not steps.is_done("stage-b", key, path):
        with steps.progress("hear", DEGRADED + 1) as advance:
            heard = stage_b.versions(audio, len(train), DEGRADED, settings.seed, advance)
        every = slice(0, len(train), max(len(train) // 1500, 1))
        landmarks, _ = geometry.triangulate(train[every], weights[every])
        with steps.progress("stage B", stage_b.STEPS) as advance:
            adapter = stage_b.fit(heard, weights[:, :BLINK], landmarks[1 : BLINK + 1], train, settings.seed, advance)
        _write(path, safetensors.numpy.save(asdict(adapter)))
        steps.mark("stage-b", key)
    return stage_b.Adapter(**safetensors.numpy.load_file(path))


class _Steps:
    """Which steps are done, and with what inputs; kept in the work folder."""

    def __init__(self, folder: Path, console: Console) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.console = folder, console
        self._file = folder / "done.json"
        self.done: dict[str, str] = json.loads(self._file.read_text()) if self._file.exists() else {}

    @staticmethod
    def key(*inputs: object) -> str:
        """A digest of what a step's result depends on, and of the release that makes it."""
        return hashlib.sha256(repr((version("talksplat-export"), *inputs)).encode()).hexdigest()

    def is_done(self, step: str, key: str, result: Path) -> bool:
        done = self.done.get(step) == key and result.exists()
        if done:
            self.console.print(f"{step}: done before")
        return done

    def mark(self, step: str, key: str) -> None:
        self.done[step] = key
        _write(self._file, json.dumps(self.done, indent=1).encode())

    def progress(self, step: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        return bars.shown(self.console, step, total)


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def sha256(path: Path | None) -> str:
    """Of a file, in hexadecimal; empty for none."""
    return "" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    defaults = Settings()
    parser = subparsers.add_parser("fit", help="make an avatar from a recording", description=__doc__)
    parser.add_argument("video", type=Path, help="a recording of one face speaking")
    parser.add_argument("--out", type=Path, required=True, metavar="avatars/ID", help="the bundle to write")
    track.add_arguments(parser)
    parser.add_argument("--work", type=Path, help="folder for what the steps leave (default: runs/ID)")
    parser.add_argument("--size", type=int, default=0, help="pixels a side (default: the video's, at most 512)")
    parser.add_argument("--about", default="", help="where the recording comes from, kept in the bundle")
    parser.add_argument("--train-seconds", type=float, default=defaults.train_seconds, help="default: %(default)s")
    parser.add_argument("--gaussians", type=int, default=defaults.gaussians, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="of stage A (default: %(default)s)")
    parser.add_argument("--plates", type=int, default=defaults.plates, help="default: %(default)s")
    parser.add_argument("--megabytes", type=float, default=defaults.megabytes, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="default: %(default)s")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)  # the rasterizer's threads are the ones that count
    settings = Settings(
        train_seconds=args.train_seconds,
        gaussians=args.gaussians,
        steps=args.steps,
        plates=args.plates,
        megabytes=args.megabytes,
        seed=args.seed,
    )
    console = Console(highlight=False)
    try:
        recording = Recording(args.video, args.audio, args.size)
        work = args.work or Path("runs") / args.out.name
        folder = fit(recording, args.out, args.track, args.landmarker, work, settings, args.about, console)
    except (RecordingError, TrackError, plates.PlatesError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    console.print(f"wrote {folder}")
    return 0
