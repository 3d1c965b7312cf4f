"""`talksplat-export fit`: from a recording of somebody speaking to an avatar.

Steps: probe (look for one face, choose the square, check picture and sound), track, split (cut the frames to fit to),
rough and refine (a first fit, and a better track by it; ground truth needs none), stage A (pictures), stage B (sound),
plates, bundle, report. Each leaves its result in the work folder under a digest of everything it was made from, and is
done again only when that changes; tracking and stage A save their state every minute. So the same command resumes after
an interrupt, and repeats stage B alone after new encoder weights. Who changes this code has to delete the work folder.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from rich.console import Console

from talksplat import avatar as bundle
from talksplat import clock, splat
from talksplat.avatar import (
    BLINK,
    CONSENT_KINDS,
    PROFILES,
    WEIGHTS,
    AnyAvatar,
    Avatar,
    BundleError,
    Consent,
    Huma1Avatar,
)
from talksplat.bench._report import commit
from talksplat.files import sha256
from talksplat.splat.cuda import DeviceError
from talksplat_export import (
    audio_encoder,
    checks,
    geometry,
    huma1_fit,
    plates,
    refinement,
    registration,
    report,
    stage_a,
    stage_b,
    steps,
    track,
)
from talksplat_export.checks import Finding, Looks, Severity
from talksplat_export.geometry import Float32
from talksplat_export.quality import DRIVERS, Subject
from talksplat_export.recording import MAX_SIZE, MIN_SIZE, Recording, RecordingError
from talksplat_export.steps import Steps
from talksplat_export.track import Detections, Landmarker, Track, TrackError

MOST_TRAINING, LEAST_TEST, TEST_SHARE = 150.0, 35.0, 0.25  # seconds, seconds, of a recording
ROUGH_SHARE = 0.25  # of stage A's steps, as many come before the track is refined
MIN_SECONDS = 2  # to fit to; a person worth looking at needs a minute
MIN_GAUSSIANS = 100
LOOKS, DETECTIONS, TRACK = "looks.npz", "detections.npz", "track.npz"
CROPS, CHECKPOINT, LOSSES, GAUSSIANS = "crops", "stage_a.pt", "losses.json", "gaussians.safetensors"
ROUGH, REFINING, REFINED = "rough.pt", "refining.npz", "refined.npz"
ADAPTER, NET = "adapter.safetensors", "huma1.safetensors"


@dataclass(frozen=True)
class Settings:
    """What a fit may be asked for, besides its files."""

    train_seconds: float | None = None  # the rest is for testing; None: see `training_frames`
    gaussians: int = 8000
    steps: int = 6000  # of stage A; of the deformation, if the profile is huma1
    plates: int = 200
    profile: str = "huma2"
    megabytes: float = 8.0  # of the bundle, at most
    degraded: int = 8  # versions of the audio, besides the recorded one, for stage B
    seconds: float = checks.LONGEST  # of the recording that are used
    max_size: int = MAX_SIZE  # pixels a side
    seed: int = 0
    device: str = "cpu"  # of stage A

    def training_frames(self, frames: int) -> int:
        """How many of a recording's frames are fitted to.

        Without `train_seconds`: three quarters of a short recording, all but 35 s of a longer one, 150 s at most.
        """
        whole = frames / clock.FPS
        seconds = min(MOST_TRAINING, max((1 - TEST_SHARE) * whole, whole - LEAST_TEST))
        return min(round((self.train_seconds or seconds) * clock.FPS), frames)


HUMA1 = Settings(profile="huma1", gaussians=huma1_fit.GAUSSIANS, steps=huma1_fit.Counts.deformation)
PREVIEW = Settings(gaussians=3000, steps=800, plates=75, megabytes=4.0, degraded=2, seconds=60.0, max_size=256)


def fit(
    recording: Recording,
    out: Path,
    source: Path | None,
    landmarker: Path | None,
    work: Path,
    settings: Settings,
    about: str,
    consent: Consent | None,
    console: Console,
) -> Path:
    """Fit an avatar and write its bundle, then a report into the work folder.

    Args:
        out: the bundle's folder; its name is the avatar's id.
        source: ground truth to read instead of tracking.
        landmarker: FaceLandmarker's model, where it is not to be downloaded.
        work: folder of what the steps leave.
        about: where the recording comes from, for the bundle.
        consent: of the recorded person, for the bundle, too; that there is none is among the findings.

    Raises:
        RefusedError: the recording can't make an avatar, see `checks`; nothing was written to ``out``.
        RecordingError, TrackError, PlatesError: nor of these.
        OSError: ``out`` can't be written, which is said before the work, or the disk is full.
    """
    bundle.check_id(out.name, RecordingError)
    _require_writable(out)
    recording = replace(recording, seconds=settings.seconds)
    model = None if source is not None else track.landmarker_file(landmarker)
    done = Steps(work, _plan(recording, settings, model), console)

    recording, tracked, findings = _examined(recording, source, model, settings, consent, done)
    training = settings.training_frames(len(tracked))
    if training < MIN_SECONDS * clock.FPS:
        raise RecordingError(f"There are {training / clock.FPS:.1f} s to fit to, expected {MIN_SECONDS} s or more.")
    train = tracked[:training]
    basis = geometry.coefficient_basis(train.expression)
    weights = geometry.frame_weights(tracked, basis)

    loop = plates.choose(train, settings.plates)
    kind: type[AnyAvatar]
    if settings.profile == Huma1Avatar.profile:
        fitted = _huma1(recording, tracked, weights, training, settings, done)
        kind, encoder = Huma1Avatar, huma1_fit.SPEECH_ENCODER
    else:
        rough = ROUGH if model is not None else ""
        if rough:
            tracked = _refined(recording, tracked, basis, training, settings, done)
            train, weights = tracked[:training], geometry.frame_weights(tracked, basis)
        canonical, bases, basis_scales = _stage_a(recording, tracked, weights, training, settings, done, rough)
        adapter = _stage_b(recording.audio, train, weights[:training], settings, done)
        fitted = {"canonical": canonical, "bases": bases, "basis_scales": basis_scales, **asdict(adapter)}
        kind, encoder = Avatar, sha256(audio_encoder.WEIGHTS)
    console.print(f"plates: frames {loop.start} to {loop.stop - 1}")
    rest_of_bundle = sum(tensor.nbytes for tensor in fitted.values()) + 200_000
    jpegs = plates.encode(recording, loop, int(settings.megabytes * 1e6) - rest_of_bundle)
    avatar = kind(
        id=out.name,
        **fitted,
        plates=jpegs,
        viewmats=plates.poses(tracked, loop),
        K=tracked.K,
        width=recording.size,
        height=recording.size,
        audio_encoder=encoder,
        provenance={
            "about": about,
            **recording.provenance,
            "track": tracked.source,
            "train_frames": training,
            "plate_frames": [loop.start, loop.stop],
            "settings": asdict(settings),
            "findings": [f"{finding.severity}: {finding}" for finding in findings],
            "seconds": done.seconds,
            "peak_memory_gb": round(done.peak_memory / 1e9, 2),
            "commit": commit(),
            "versions": {name: version(name) for name in ("talksplat", "torch", "numpy", "mediapipe")},
            "coefficient_basis": basis.tolist(),
        },
        consent=consent,
    )
    folder = bundle.write(avatar, out.parent)
    console.print(f"wrote {folder}")
    if training < len(tracked) and isinstance(avatar, Avatar):
        _report(recording, avatar, tracked, model, findings, done)
    minutes, memory = sum(done.seconds.values()) / 60, done.peak_memory / 1e9
    console.print(f"{minutes:.1f} min in all, {memory:.1f} GB of memory at most")
    return folder


def _examined(
    recording: Recording,
    source: Path | None,
    model: Path | None,
    settings: Settings,
    consent: Consent | None,
    done: Steps,
) -> tuple[Recording, Track, list[Finding]]:
    """The recording cut to the face and with its sound in step, its track, and what is to be said of both.

    Raises:
        RefusedError: no avatar can be made of it.
    """
    findings = _shown([*_consented(consent), *checks.of_file(recording)], done.console)
    findings += _shown(checks.of_sound(recording.audio, recording.length / clock.FPS), done.console)
    checks.require(findings)  # before the minutes that follow
    recording, seen = _probe(recording, model, settings, done)
    findings += _shown(seen, done.console)
    checks.require(findings)
    tracked = _track(recording, source, model, done)
    offset = checks.offset(recording.audio, tracked)
    findings += _shown([*checks.of_track(tracked), offset.finding], done.console)
    return replace(recording, delay=offset.delay), tracked, findings


def _consented(consent: Consent | None) -> list[Finding]:
    if consent is not None:
        return [Finding(Severity.NOTE, f"The person's consent goes into the bundle, as {consent.name}.")]
    return [
        Finding(
            Severity.WARNING,
            "There is no consent of the recorded person: where law or manners want one, add it with --consent.",
        )
    ]


def _require_writable(folder: Path) -> None:
    """Raise `OSError` where a folder can't be made, or made anew: better now than after an hour."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{folder} can't be written: {there} is a file.")
    there = folder.absolute().parent if there == folder else there
    try:
        with tempfile.TemporaryFile(dir=there):  # what `os.access` says is not always so
            pass
    except OSError as error:
        raise PermissionError(f"{folder} can't be written: {there} takes no files ({error.strerror}).") from error


def _plan(recording: Recording, settings: Settings, model: Path | None) -> dict[str, float]:
    """Seconds that each step takes on two cores of 2024, for the estimate of what is left until steps have run."""
    frames = recording.length
    training = settings.training_frames(frames)
    area = (min(min(recording.picture), settings.max_size) / MAX_SIZE) ** 2
    tracking = model is not None
    return {
        "probe": 0.003 * frames * tracking,
        "track": 0.03 * frames * tracking,
        "split": 0.012 * training,
        **(
            {"hear": 0.01 * training * (huma1_fit.DEGRADED + 1), **huma1_fit.Counts.of(settings.steps).plan()}
            if settings.profile == Huma1Avatar.profile
            else {
                "rough": ROUGH_SHARE * settings.steps * (0.05 + 0.2 * area) * tracking,
                "refine": training * (0.02 + 0.06 * area) * tracking,
                "stage A": settings.steps * (0.05 + 0.2 * area),
                "hear": 0.0025 * training * (settings.degraded + 1),
                "stage B": 15.0,
                "refine to report": (frames - training) * (0.02 + 0.06 * area) * tracking,
                "report": 0.08 * (frames - training),
            }
        ),
    }


def _shown(findings: Iterable[Finding], console: Console) -> list[Finding]:
    findings = list(findings)
    for finding in findings:
        if finding.severity is not Severity.REFUSAL:  # a refusal ends the fit, as its error
            console.print(
                f"{finding.severity}: {finding}", style="yellow" if finding.severity is Severity.WARNING else None
            )
    return findings


def _probe(
    recording: Recording, model: Path | None, settings: Settings, done: Steps
) -> tuple[Recording, list[Finding]]:
    """The recording cut to the square that shows the face, and what a look at its pictures finds."""
    if model is None:
        sentence = "Faces, sharpness and light were not checked: the track comes from ground truth, not from pictures."
        return _sized(recording, settings), [Finding(Severity.NOTE, sentence)]
    path = done.folder / LOOKS
    key = done.key(recording.sha256, recording.length, sha256(model))
    if done.is_done("probe", key):
        done.skipped("probe")
    else:
        with done.running("probe", key, -(-recording.length // checks.PROBE_STEP), [LOOKS]) as advance:
            checks.look(recording, model, advance).save(path)
    looks = Looks.load(path)
    findings = checks.of_picture(looks)
    checks.require(findings)
    return _sized(replace(recording, square=checks.square(looks), size=0), settings), findings


def _sized(recording: Recording, settings: Settings) -> Recording:
    return replace(recording, size=min(recording.size, settings.max_size))


def _pictures(recording: Recording) -> tuple[object, ...]:
    """All that a recording's frames depend on."""
    return recording.sha256, recording.size, recording.square, recording.length


def _track(recording: Recording, source: Path | None, model: Path | None, done: Steps) -> Track:
    path, kept = done.folder / TRACK, done.folder / DETECTIONS
    given = _digest(source), _digest(model)
    key = done.key(recording.sha256, recording.size, recording.square, recording.seconds, *given)
    if done.is_done("track", key):
        done.skipped("track")
    else:
        with done.running("track", key, recording.length, [TRACK], kept=DETECTIONS) as advance:
            _drop_damaged(kept, Detections.load, done.console)
            _drop_damaged(kept.with_name(track.POSES), registration.Progress.load, done.console)
            track.find(recording, source, model, advance, kept).save(path)
    return Track.load(path)


def _stage_a(
    recording: Recording,
    tracked: Track,
    weights: Float32,
    training: int,
    settings: Settings,
    done: Steps,
    rough: str = "",
) -> tuple[Float32, Any, Float32]:
    """Fit Gaussians; returns ``canonical``, ``bases`` and ``basis_scales``.

    Args:
        rough: name of the state of a first fit to go on from.
    """
    folder = done.folder
    key = done.key(
        _split_key(recording, training, done), settings.gaussians, settings.steps, settings.seed, _made(folder, rough)
    )
    if done.is_done("stage A", key):
        done.skipped("split")
        done.skipped("stage A")
        arrays = safetensors.numpy.load_file(folder / GAUSSIANS)
        return arrays["canonical"], arrays["bases"], arrays["basis_scales"]

    crops, canonical, motion = _seeds(recording, tracked, weights, training, settings, done)
    head = stage_a.Head(canonical, motion)
    if rough:
        head.load_state_dict(torch.load(folder / rough, weights_only=True)["head"])
    with done.running("stage A", key, settings.steps, [GAUSSIANS, LOSSES], kept=CHECKPOINT) as advance:
        _drop_damaged(folder / CHECKPOINT, lambda path: torch.load(path, weights_only=True), done.console)
        losses = _fitted(head, crops, tracked[:training], weights, settings, folder / CHECKPOINT, advance)
        steps.write(folder / LOSSES, json.dumps([round(loss, 5) for loss in losses]).encode())
        canonical, bases, scales = head.quantised()
        arrays = {"canonical": canonical, "bases": bases, "basis_scales": scales}
        steps.write(folder / GAUSSIANS, safetensors.numpy.save(arrays))
    shutil.rmtree(folder / CROPS)  # a gigabyte that a minute makes anew
    return canonical, bases, scales


def _digest(path: Path | None) -> str:
    """Of a file; empty for none."""
    return "" if path is None else sha256(path)


def _made(folder: Path, *names: str) -> str:
    """Digests of files that earlier steps left."""
    return " ".join(sha256(folder / name) for name in names if name)


def _fitted(
    head: stage_a.Head,
    crops: stage_a.Crops,
    train: Track,
    weights: Float32,
    settings: Settings,
    checkpoint: Path,
    advance: Callable[[int], object],
) -> list[float]:
    """Train a head by the settings; returns the losses."""
    return stage_a.fit(
        head,
        crops,
        train,
        weights,
        stage_a.sampling(train),
        settings.steps,
        settings.seed,
        checkpoint,
        advance,
        torch.device(settings.device),
    )


def _refined(
    recording: Recording, tracked: Track, basis: Float32, training: int, settings: Settings, done: Steps
) -> Track:
    """The track, refined in the frames that are fitted to by the Gaussians of a first fit."""
    folder = done.folder
    first = replace(settings, steps=max(round(ROUGH_SHARE * settings.steps), 1))
    key = done.key(_split_key(recording, training, done), settings.gaussians, first.steps, settings.seed)
    weights = geometry.frame_weights(tracked, basis)
    if done.is_done("rough", key):
        done.skipped("rough")
    else:
        crops, canonical, motion = _seeds(recording, tracked, weights, training, settings, done)
        head = stage_a.Head(canonical, motion)
        with done.running("rough", key, first.steps, [ROUGH], kept=CHECKPOINT) as advance:
            _drop_damaged(folder / CHECKPOINT, lambda path: torch.load(path, weights_only=True), done.console)
            _fitted(head, crops, tracked[:training], weights, first, folder / CHECKPOINT, advance)
            os.replace(folder / CHECKPOINT, folder / ROUGH)
    key = done.key(key, _made(folder, ROUGH, TRACK))
    if done.is_done("refine", key):
        done.skipped("refine")
    else:
        state = torch.load(folder / ROUGH, weights_only=True)["head"]
        shapes = splat.Blendshapes(*stage_a.Head.of(state).quantised())
        kept = folder / REFINING
        with done.running("refine", key, training, [REFINED], kept=REFINING) as advance:
            _drop_damaged(kept, refinement.Progress.load, done.console)
            found = refinement.refine(recording, tracked, basis, shapes, range(training), advance, kept)
            found.save(folder / REFINED)
    return Track.load(folder / REFINED)


def _split_key(recording: Recording, training: int, done: Steps) -> str:
    return done.key(*_pictures(recording), sha256(done.folder / TRACK), training)


def _seeds(
    recording: Recording, tracked: Track, weights: Float32, training: int, settings: Settings, done: Steps
) -> tuple[stage_a.Crops, Float32, Float32]:
    """The frames cut to the region, and the first Gaussians: canonical planes [14, N] and motion [21, 3, N]."""
    train, folder, split_key = tracked[:training], done.folder, _split_key(recording, training, done)
    used = geometry.thinned(training)
    moving = np.flatnonzero(weights[:training].any(0))  # the weights that this recording has
    landmarks, distance = geometry.triangulate(train[used], weights[:training][used][:, moving])
    done.console.print(f"landmarks in 3D: {distance:.2f} px from the track")
    region = geometry.region(train[used], landmarks, weights[:training][used][:, moving], recording.size)
    if done.is_done("split", split_key):
        done.skipped("split")
    else:
        try:
            with done.running("split", split_key, training, [CROPS]) as advance:
                stage_a.cut(recording, train, region, range(training), folder / CROPS, advance)
        except OSError:
            shutil.rmtree(folder / CROPS, ignore_errors=True)  # a gigabyte or two that nobody would miss
            raise
    crops = stage_a.open_crops(folder / CROPS)

    extremes = geometry.extreme_frames(train, weights[:training][:, moving])
    images = {index: next(recording.frames(index, index + 1)) for index in extremes}
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
    return crops, canonical, full


def _huma1(
    recording: Recording, tracked: Track, weights: Float32, training: int, settings: Settings, done: Steps
) -> dict[str, Any]:
    """The fitted fields of a Huma 1."""
    folder, train = done.folder, tracked[:training]
    audio = recording.audio[: training * clock.SAMPLES_PER_FRAME]
    heard = hashlib.sha256(audio.tobytes()).hexdigest()
    key = done.key(_split_key(recording, training, done), heard, settings.gaussians, settings.steps, settings.seed)
    if done.is_done("net", key):
        for name in ("split", *huma1_fit.Counts().plan(), "net"):
            done.skipped(name)
        return dict(safetensors.numpy.load_file(folder / NET))
    crops, canonical, motion = _seeds(recording, tracked, weights, training, settings, done)
    counts = huma1_fit.Counts.of(settings.steps)
    head = huma1_fit.Head(canonical, motion[BLINK], settings.seed)
    fitted, losses = huma1_fit.make(
        head, audio, train, weights[:training], crops, motion, counts, settings.seed, done, key
    )
    with done.running("net", key, 1, [NET, LOSSES]):
        steps.write(folder / LOSSES, json.dumps([round(loss, 5) for loss in losses]).encode())
        steps.write(folder / NET, safetensors.numpy.save(fitted))
    shutil.rmtree(folder / CROPS)
    huma1_fit.tidy(folder)
    return fitted


def _drop_damaged(path: Path, load: Callable[[Path], object], console: Console) -> None:
    """Remove a file that a step would go on from and that can't be read."""
    try:
        if path.exists():
            load(path)
    except Exception:  # whatever NumPy, zipfile, pickle and PyTorch say to a damaged file
        console.print(f"{path} is damaged: this step begins anew")
        path.unlink()


def _stage_b(audio: Float32, train: Track, weights: Float32, settings: Settings, done: Steps) -> stage_b.Adapter:
    path = done.folder / ADAPTER
    key = done.key(
        sha256(done.folder / TRACK),
        hashlib.sha256(weights.tobytes()).hexdigest(),
        hashlib.sha256(audio.tobytes()).hexdigest(),
        sha256(audio_encoder.WEIGHTS),
        settings.degraded,
        settings.seed,
    )
    if done.is_done("stage B", key):
        done.skipped("stage B")
    else:
        with done.running("hear", key, settings.degraded + 1, []) as advance:
            heard = stage_b.versions(audio, len(train), settings.degraded, settings.seed, advance)
        every = geometry.thinned(len(train))
        landmarks, _ = geometry.triangulate(train[every], weights[every])
        with done.running("stage B", key, stage_b.STEPS, [ADAPTER]) as advance:
            adapter = stage_b.fit(heard, weights[:, :BLINK], landmarks[1 : BLINK + 1], train, settings.seed, advance)
            steps.write(path, safetensors.numpy.save(asdict(adapter)))
    return stage_b.Adapter(**safetensors.numpy.load_file(path))


def _report(
    recording: Recording, avatar: Avatar, tracked: Track, model: Path | None, findings: list[Finding], done: Steps
) -> None:
    """Look at the frames that were kept back; on pixels where a FaceLandmarker is at hand."""
    subject = Subject(avatar, recording, tracked, stage_b.hear(recording.audio, len(tracked)))
    losses = json.loads((done.folder / LOSSES).read_text())
    key = done.key(avatar.provenance["seconds"])
    if model is not None:
        with done.running("refine to report", key, len(subject.test), []) as advance:
            subject = subject.refined(advance)
    with (
        Landmarker(model) if model is not None else nullcontext() as landmarker,
        done.running("report", key, len(subject.test) * len(DRIVERS), [report.NAME]) as advance,
    ):
        path = report.write(done, subject, findings, losses, landmarker, advance)
    done.console.print(f"report: {path}")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("fit", help="make an avatar from a recording", description=__doc__)
    parser.add_argument("video", type=Path, help="a recording of one face speaking: mp4, mov, webm, mkv")
    parser.add_argument("--out", type=Path, required=True, metavar="avatars/ID", help="the bundle to write")
    track.add_arguments(parser)
    parser.add_argument(
        "--preview",
        action="store_true",
        help="a first avatar in minutes: small, of the first minute, written to ID-preview",
    )
    parser.add_argument("--work", type=Path, help="folder for what the steps leave (default: runs/ID)")
    parser.add_argument("--about", default="", help="where the recording comes from, kept in the bundle")
    parser.add_argument(
        "--consent",
        type=Path,
        metavar="FILE",
        help=f"the recorded person's consent, kept in the bundle: {', '.join(CONSENT_KINDS)}",
    )
    parser.add_argument(
        "--train-seconds", type=float, metavar="N", help="that are fitted to (default: 150, less of a short recording)"
    )
    whole, first = Settings(), PREVIEW

    def setting(name: str, text: str = "", least: int = 1) -> None:
        default, preview = getattr(whole, name), getattr(first, name)
        shown = f"{default}, {preview} with --preview" if preview != default else f"{default}"
        option = f"--{name.replace('max_', '')}"
        kind = partial(_at_least, least, type(default))
        parser.add_argument(option, type=kind, dest=name, metavar="N", help=f"{text}default: {shown}")

    parser.add_argument(
        "--profile", choices=list(PROFILES), default=Settings.profile, help="the generation; default: %(default)s"
    )
    setting("max_size", "pixels a side, at most, a multiple of 8; ", MIN_SIZE)
    setting("gaussians", least=MIN_GAUSSIANS)
    setting("steps", "of stage A; ")
    setting("plates", "at most; ")
    setting("megabytes", "of the bundle, at most; ", least=0)
    setting("seed", least=0)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="of stage A; default: cuda where there is one; huma1 knows cpu only"
    )
    parser.set_defaults(run=_run)


def _at_least(least: int, kind: type[int] | type[float], text: str) -> int | float:
    """A number from the command line."""
    try:
        number = kind(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__}") from error
    if not number >= least:
        raise argparse.ArgumentTypeError(f"{text} is too little: expected {least} or more")
    return number


def _run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)  # the rasterizer's threads are the ones that count
    names = ("train_seconds", "max_size", "gaussians", "steps", "plates", "megabytes", "seed", "device")
    asked = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.preview and args.profile != Settings.profile:
        print(f"error: --preview makes avatars of the profile {Settings.profile} only", file=sys.stderr)
        return 1
    if args.device == "cuda" and args.profile == HUMA1.profile:
        print(f"error: avatars of the profile {HUMA1.profile} are fitted with --device cpu only", file=sys.stderr)
        return 1
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: PyTorch finds no CUDA device here: fit with --device cpu", file=sys.stderr)
        return 1
    if args.device is None and torch.cuda.is_available() and args.profile != HUMA1.profile:
        args.device = "cuda"
    chosen = HUMA1 if args.profile == HUMA1.profile else PREVIEW if args.preview else Settings()
    settings = replace(chosen, **asked)
    console = Console(highlight=False, soft_wrap=True)
    # Beside the avatar that the same command without --preview makes, never in its place.
    out = args.out.with_name(f"{args.out.name}-preview") if args.preview else args.out
    work = args.work or Path("runs") / args.out.name
    work = work / "preview" if args.preview else work
    try:
        recording = Recording(args.video, args.audio)
        consent = args.consent and Consent.load(args.consent)
        fit(recording, out, args.track, args.landmarker, work, settings, args.about, consent, console)
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    except (OSError, RuntimeError, ValueError, MemoryError) as error:
        sentence = _sentence(error, work)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 1
    return 0


def _sentence(error: Exception, work: Path) -> str | None:
    """What an error that is nobody's mistake in this code means for who runs a fit; None for other errors."""
    words = str(error)
    full = "PytorchStreamWriter failed" in words or (isinstance(error, OSError) and error.errno == errno.ENOSPC)
    if full:
        there = next(folder for folder in (work, *work.absolute().parents) if folder.exists())
        free = shutil.disk_usage(there).free / 1e9
        return (
            f"The disk is full: {free:.1f} GB are free at {work}, a fit needs 3 GB for a while. Make room, or name a "
            "folder on another disk with --work. No half bundle was written; the same command goes on from here."
        )
    starved = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("allocate memory" in words or "out of memory" in words)
    )
    if starved:
        return (
            "There is not enough memory: a fit of 512 x 512 pixels takes up to 6 GB. Close other programs, or ask for "
            "less with --size 256. No half bundle was written; the same command goes on from here."
        )
    if isinstance(error, RecordingError | TrackError | plates.PlatesError | BundleError | DeviceError | OSError):
        return words
    return None
