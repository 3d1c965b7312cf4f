"""`talksplat-export quality`: how close an avatar's frames come to a recording of the same person.

Every frame of the test split (what follows the frames that the avatar was fitted to) is drawn as it is served
(`talksplat.splat.render_onto`, fast mode) with the recording's own head pose and blink, over the recorded frame as its
plate, and compared with the recorded frame; so poses, blinks and plates come from the test frames in every row. Two
rows: ``driven_by`` "coefficients" takes what the track says the mouth does, "audio" nothing but what the audio
encoder, the avatar's adapter and the voice activity's gate make of the sound.

A track that is no ground truth comes from the pixels of the test frames, which is what tracking is: landmarks and
blendshapes by MediaPipe, then poses, coefficients and blinks by `refinement`, which looks for those with which the
avatar draws the recorded frame best. The Gaussians and their bases have never seen a test frame.

====================== ================================================================================================
``face_psnr_db``       peak signal-to-noise ratio in the face crop, mean of all frames; the crop is the box around all
                       landmarks, brows to chin, in all test frames
``mouth_psnr_db``      the same in the box around all landmarks of the mouth in all test frames, 4 pixels wider
``full_psnr_db``       the same of the whole frame, to most of which the plate contributes
``ssim``               structural similarity of the face crop, mean of all frames
``landmark_px``        mean distance of the mouth's landmarks in drawn and recorded frame, in pixels of the frame
``truth_px``           where the track is ground truth and a FaceLandmarker measures: mean distance of the mouth's
                       landmarks in the drawn frame from the true ones (20 points; by how much FaceLandmarker's idea of
                       each point differs from the truth's on average, in the recorded frames, is taken off), else null
``lip_r``              correlation of the lips' opening over time in drawn and recorded frames
``lip_lag_frames``     by how many frames the drawn lips lag where that correlation is largest (-5 to 5)
``silence_std_pct``    standard deviation of the drawn lips' opening in silence, in percent of the recorded opening's
                       range (2nd to 98th percentile); silence is where the voice activity stayed below 0.1
====================== ================================================================================================

With a FaceLandmarker model (``measured_by`` "mediapipe") landmarks and lips are measured on pixels: the tracker looks
at drawn and recorded frames alike. Without one ("regression"), drawn landmarks are those that the frame's weights give
by a regression of the track's landmarks on the weights of the frames fitted to; recorded ones are the track's.
"""

from __future__ import annotations

import argparse
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from talksplat import avatar as bundle
from talksplat import splat
from talksplat.animator import SPEECH_EDGES
from talksplat.avatar import BLINK, AnyAvatar, Avatar, BundleError, UnknownAvatarError
from talksplat.bench import _report
from talksplat_export import bars, geometry, refinement, stage_b, track
from talksplat_export.geometry import Float32
from talksplat_export.recording import Image, Recording, RecordingError
from talksplat_export.stage_b import Adapter, Heard
from talksplat_export.track import LAYOUTS, Landmarker, Track, TrackError, lip_opening

MOUTH_MARGIN = 4  # pixels
# Of FaceLandmarker's 478 points, those that are nearest to points 48 to 67 of the 68.
MOUTH_OF_68 = (61, 40, 37, 0, 267, 270, 291, 321, 314, 17, 84, 91, 78, 81, 13, 311, 308, 402, 14, 178)
DRIVERS = ("coefficients", "audio")
LAGS = range(-5, 6)
SHARPEST = 60.0  # dB at which a frame counts as equal


@dataclass(frozen=True, eq=False)
class Comparison(ABC):
    """Something that draws frames, with the recording that they are compared with."""

    avatar: AnyAvatar
    recording: Recording
    track: Track
    drivers: ClassVar[Sequence[str]] = DRIVERS  # what `drawer` takes

    @property
    @abstractmethod
    def speech(self) -> Float32:
        """Probability of speech in every frame, [T]."""

    @abstractmethod
    def drawer(self, driven_by: str) -> Callable[[Image, int], Image]:
        """Draws the frame of an index onto its recorded one, in the recorded pose."""

    @property
    def test(self) -> range:
        """The frames that the avatar was not fitted to."""
        return range(int(self.avatar.provenance["train_frames"]), len(self.track))

    def box(self, landmarks: tuple[int, ...], margin: int = 0) -> tuple[slice, slice]:
        """Rows and columns around some landmarks in all test frames."""
        points = self.track.landmarks[self.test.start : self.test.stop, list(landmarks)].reshape(-1, 2)
        low = np.floor(points.min(0)).astype(int).clip(0) - margin
        high = np.ceil(points.max(0)).astype(int) + margin
        return slice(max(low[1], 0), high[1]), slice(max(low[0], 0), high[0])


@dataclass(frozen=True, eq=False)
class Subject(Comparison):
    """An avatar with the recording that it is compared with."""

    avatar: Avatar
    heard: Heard

    @property
    def speech(self) -> Float32:
        """As `Heard` has it."""
        return self.heard.speech

    def weights(self, driven_by: str) -> Float32:
        """Weights [T, 21] of all frames, driven by "coefficients" or "audio"."""
        basis = np.array(self.avatar.provenance["coefficient_basis"], np.float32)
        weights = geometry.frame_weights(self.track, basis)
        if driven_by == "audio":
            weights[:, :BLINK] = Adapter(self.avatar.adapter_in, self.avatar.adapter_out)(self.heard)
        return weights

    def refined(self, advance: Callable[[int], object] = lambda done: None) -> Subject:
        """With a track that is refined in the test frames, by the avatar: the end of tracking, see `refinement`."""
        basis = np.array(self.avatar.provenance["coefficient_basis"], np.float32)
        track = refinement.refine(self.recording, self.track, basis, self.shapes, self.test, advance)
        return replace(self, track=track)

    @cached_property
    def shapes(self) -> splat.Blendshapes:
        """The avatar as the rasterizer takes it."""
        return splat.Blendshapes(self.avatar.canonical, self.avatar.bases, self.avatar.basis_scales)

    def drawer(self, driven_by: str) -> Callable[[Image, int], Image]:
        """By the weights."""
        weights = self.weights(driven_by)
        return lambda recorded, index: self.draw(recorded, index, weights[index])

    def draw(self, recorded: Image, index: int, weights: Float32) -> Image:
        """Draw onto a recorded frame with its own pose; weights [21]."""
        job = splat.Job(self.shapes, weights, self.track.viewmats[index], self.avatar.K, recorded)
        return splat.render_onto([job], threads=1)[0]


def psnr(recorded: Image, drawn: Image) -> float:
    """Peak signal-to-noise ratio in dB, at most `SHARPEST`."""
    error = np.mean((recorded.astype(np.float32) - drawn.astype(np.float32)) ** 2)
    return float(min(20 * np.log10(255) - 10 * np.log10(max(error, 1e-12)), SHARPEST))


def measure(
    subject: Comparison,
    driven_by: str,
    landmarker: Landmarker | None,
    advance: Callable[[int], object] = lambda done: None,
    observe: Callable[[int, Image, Image], object] = lambda index, recorded, drawn: None,
) -> _report.Row:
    """One row of figures over the test frames; see the module.

    Args:
        landmarker: measures landmarks on pixels; only a `Subject` can do without.
        advance: called with the number of frames done.
        observe: called with the index, the recorded and the drawn picture of every frame.
    """
    draw = subject.drawer(driven_by)
    test, layout = subject.test, subject.track.layout
    face = subject.box(layout.face)
    mouth = subject.box(layout.mouth, MOUTH_MARGIN)
    face_db, mouth_db, full_db, similarity, found = [], [], [], [], []
    for index, recorded in zip(test, subject.recording.frames(test.start, test.stop), strict=True):
        drawn = draw(recorded, index)
        observe(index, recorded, drawn)
        face_db.append(psnr(recorded[face], drawn[face]))
        mouth_db.append(psnr(recorded[mouth], drawn[mouth]))
        full_db.append(psnr(recorded, drawn))
        similarity.append(splat.ssim(_floats(recorded[face]), _floats(drawn[face]), threads=1))
        if landmarker is not None:
            found.append((landmarker(recorded), landmarker(drawn)))
        advance(len(face_db))
    if landmarker is None:
        assert isinstance(subject, Subject), "a FaceLandmarker is needed"
        weights = subject.weights(driven_by)
        seen = np.ones(len(test), bool)
        truth = subject.track.landmarks[test.start : test.stop]
        drawn_at = truth + _displaced(subject, weights) - _displaced(subject, subject.weights("coefficients"))
    else:
        seen = np.array([recorded is not None and drawn is not None for recorded, drawn in found])
        pairs = [(recorded[0], drawn[0]) for recorded, drawn in found if recorded is not None and drawn is not None]
        truth, drawn_at = (np.stack(side) for side in zip(*pairs, strict=True))
    lips = list(LAYOUTS[truth.shape[1]].mouth)
    opening, drawn_opening = lip_opening(truth), lip_opening(drawn_at)
    correlations = [_correlation(opening, drawn_opening, lag) for lag in LAGS]
    silent = subject.speech[test.start : test.stop][seen] < SPEECH_EDGES[0]
    spread = float(np.ptp(np.percentile(opening, [2, 98])))
    return {
        "recording": subject.recording.path.stem,
        "driven_by": driven_by,
        "face_psnr_db": round(float(np.mean(face_db)), 2),
        "mouth_psnr_db": round(float(np.mean(mouth_db)), 2),
        "full_psnr_db": round(float(np.mean(full_db)), 2),
        "ssim": round(float(np.mean(similarity)), 4),
        "landmark_px": round(float(np.linalg.norm((truth - drawn_at)[:, lips], axis=-1).mean()), 2),
        "truth_px": _from_truth(subject, truth, drawn_at, seen) if landmarker is not None else None,
        "lip_r": round(correlations[LAGS.index(0)], 3),
        "lip_lag_frames": LAGS[int(np.argmax(correlations))],
        "silence_std_pct": round(100 * float(drawn_opening[silent].std()) / spread, 2) if silent.any() else None,
        "frames": len(face_db),
        "measured_by": "regression" if landmarker is None else "mediapipe",
    }


def _from_truth(
    subject: Comparison,
    recorded: Float32,  # [F, 478, 2] as FaceLandmarker sees the recorded frames
    drawn: Float32,  # [F, 478, 2] the drawn frames
    seen: npt.NDArray[np.bool_],  # [test frames] which those are
) -> float | None:
    """Mean distance in pixels of the drawn mouth's landmarks from the true ones; None where these are not known."""
    known = subject.track.landmarks
    if known.shape[1] != 68:
        return None
    truth = known[subject.test.start : subject.test.stop][seen][:, list(LAYOUTS[68].mouth)]
    recorded, drawn = recorded[:, MOUTH_OF_68], drawn[:, MOUTH_OF_68]
    bias = (recorded - truth).mean(0)
    return round(float(np.linalg.norm(drawn - bias - truth, axis=-1).mean()), 2)


def _floats(image: Image) -> Float32:
    """0..1."""
    return image.astype(np.float32) / np.float32(255)


def lip_openings(subject: Subject, driven_by: str) -> Float32:
    """Of the test frames, [T] pixels: the regression's, which needs no tracker."""
    return lip_opening(_displaced(subject, subject.weights(driven_by)))


def _displaced(subject: Subject, weights: Float32) -> Float32:
    """The landmarks [T, L, 2] that weights give in the reference view, for the test frames."""
    tracked, stop = subject.track, subject.test.start
    every = geometry.thinned(stop)
    fitted = subject.weights("coefficients")[:stop][every]
    model, _ = geometry.triangulate(tracked[every], fitted)
    points = model[0] + np.einsum("tw,wlk->tlk", weights[subject.test.start :], model[1:])
    view = geometry.reference_view(tracked.viewmats[:stop])
    return geometry.project(points, view, tracked.K)[..., :2].astype(np.float32)


def _correlation(recorded: npt.NDArray[np.float32], drawn: npt.NDArray[np.float32], lag: int) -> float:
    """Of two series [T], ``drawn`` taken ``lag`` frames later."""
    a = recorded[max(-lag, 0) : len(recorded) - max(lag, 0)]
    b = drawn[max(lag, 0) : len(drawn) - max(-lag, 0)]
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else 0.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("quality", help="compare an avatar with its recording", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("bundle", type=Path, metavar="avatars/ID")
    parser.add_argument("video", type=Path, help="the recording that it was fitted to")
    track.add_arguments(parser)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.set_defaults(run=_run)


def _subject(avatar: AnyAvatar, recording: Recording, tracked: Track) -> Comparison:
    if isinstance(avatar, Avatar):
        return Subject(avatar, recording, tracked, stage_b.hear(recording.audio, len(tracked)))
    from talksplat_export import huma1_drive  # which builds on this module

    return huma1_drive.subject(avatar, recording, tracked)


def _run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    try:
        avatar = bundle.read(args.bundle.parent, args.bundle.name, AnyAvatar)
        recording = Recording.as_fitted(args.video, args.audio, avatar.width, avatar.provenance)
        model = track.landmarker_file(args.landmarker) if args.landmarker or args.track is None else None
        tracked = track.find(recording, args.track, model)
        subject = _subject(avatar, recording, tracked)
        if not subject.test:
            raise RecordingError("The avatar was fitted to all frames of this recording: nothing is left to test with.")
        if args.track is None and isinstance(subject, Subject):
            with bars.shown(Console(), "refine", len(subject.test)) as advance:
                subject = subject.refined(advance)
        rows = []
        with Landmarker(model) if model is not None else nullcontext() as landmarker:
            for driven_by in subject.drivers:
                with bars.shown(Console(), driven_by, len(subject.test)) as advance:
                    rows.append(measure(subject, driven_by, landmarker, advance))
    except (BundleError, UnknownAvatarError, RecordingError, TrackError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _report.report("quality", rows, args.json)
    return 0
