"""What is good and bad about a recording, found before and while it is fitted: findings, each with its place in time.

Looks at two pictures a second (one face throughout, sharp, well lit), at the sound (level, clipping, noise, speech),
at the file, and at the track (rest, blinks, a mouth that moves, sound and picture in step). A finding is a refusal
where no avatar worth having can come of the recording, else a warning or a note, and the fit goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import torch

from talksplat import clock
from talksplat.animator import SPEECH_EDGES
from talksplat_export import audio_encoder, vad
from talksplat_export._npz import Npz
from talksplat_export.recording import Float32, Image, Recording, RecordingError, Square
from talksplat_export.track import MAX_MISSING, Landmarker, Track

Float64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

# The file.
SHORTEST, SHORT = 10.0, 60.0  # seconds: refused below the first, warned about below the second
LONGEST = 240.0  # seconds that are used
SLOWEST = 20.0  # frames a second
STILL = 0.5  # seconds without a new frame

# The picture. A face's box is that of its landmarks: brows to chin, ear to ear.
PROBE_STEP = clock.FPS // 2  # frames from one look to the next
THOROUGH_LOOKS = 20  # for as many, a face is searched in small parts of the picture
LOOK_SIZE = 960  # pixels that a picture is reduced to for a look
HEAD = 2.2  # side of the square that shows head and shoulders, in heights of the face's box
HEAD_ROOM = 1.25  # squares up to this much larger are taken whole
FACE_PLACE = 0.41  # of the square's height, from its top, at which the middle of the face belongs
SMALL_FACE, TINY_FACE = 100, 40  # pixels high in the recording: warned about, refused
MAX_SECOND = 0.05  # of the looks may show a second face
SECOND_FACE = 0.4  # of the height of the first, from which on a second face is another person nearby
FACE_WIDTH = 160  # pixels at which sharpness is measured
BLURRED = 0.035  # sharpness below it; a face out of focus by a fiftieth of its height has it
BLURRED_NOW = 0.6  # of the usual sharpness: a face that moves or is out of focus for a moment
DARK, BRIGHT = 40.0, 215.0  # mean luma of a face, of whatever skin
BURNT = 0.08  # of a face's pixels may be pure white
EXPOSURE = 0.25  # by which the light on the face may change, relative to its median

# The sound.
SILENT = 1e-3  # peak
QUIET_DB = -45.0  # of full scale, of speech
CLIPPED = 0.985  # of full scale
MAX_CLIPPED = 5e-4  # of the samples
NOISY_DB = 15.0  # speech to noise
MIN_SPEECH = 3.0  # seconds
LITTLE_SPEECH = 0.35  # of the recording

# The track.
TURNED = 35.0  # degrees away from the usual
LEAST_OPENING = 0.04  # distances between the eyes by which lips that speak part
REST_SECONDS = 0.2

# Sound against picture.
LAGS = np.arange(-0.6, 0.601, 0.02)  # seconds that are tried: every half frame
OFFSET_PIECE = 12.0  # seconds of each of the pieces that have to agree
AGREEMENT = 0.06  # seconds by which a piece may differ
MIN_AGREEING = 0.7  # of the pieces
LEAST_CORRELATION = 0.2  # geometric mean of that of the lips' opening and that of its speed
LEAST_OFFSET = 0.08  # seconds that are corrected: what is natural stays below
RIDGE = 300.0


class Severity(StrEnum):
    """What follows from a finding."""

    NOTE = "note"
    WARNING = "warning"
    REFUSAL = "refusal"


@dataclass(frozen=True)
class Finding:
    """A sentence about a recording, and when it is true."""

    severity: Severity
    sentence: str
    spans: tuple[tuple[float, float], ...] = ()  # seconds: begin and end; none: throughout

    def __str__(self) -> str:
        return f"{self.sentence[:-1]} ({self.when})." if self.spans else self.sentence

    @property
    def when(self) -> str:
        """Its time stamps in words."""
        return times(self.spans) if self.spans else "the whole recording"


class RefusedError(RecordingError):
    """No avatar can be made of the recording; ``findings`` say why, refusals first."""

    def __init__(self, findings: Iterable[Finding]) -> None:
        order = list(Severity)[::-1]
        self.findings = sorted(findings, key=lambda finding: order.index(finding.severity))
        super().__init__(" ".join(str(finding) for finding in self.findings if finding.severity is Severity.REFUSAL))


def require(findings: Sequence[Finding]) -> None:
    """Raise `RefusedError` where a finding is a refusal."""
    if any(finding.severity is Severity.REFUSAL for finding in findings):
        raise RefusedError(findings)


def times(spans: Sequence[tuple[float, float]], most: int = 6) -> str:
    """Spans of seconds in words, ``at 0:03.2, 0:10.0-0:12.5``; the longest where there are more than ``most``."""
    shown = sorted(sorted(spans, key=lambda span: span[0] - span[1])[:most])

    def clock_time(seconds: float) -> str:
        return f"{int(seconds // 60)}:{seconds % 60:04.1f}"

    words = [clock_time(a) if b - a < 0.1 else f"{clock_time(a)}-{clock_time(b)}" for a, b in shown]
    more = f" and {len(spans) - most} more" if len(spans) > most else ""
    return f"at {', '.join(words)}{more}"


def spans(where: Bools, at: Float64, lasts: float) -> tuple[tuple[float, float], ...]:
    """Runs of true values, each value at a time and lasting some seconds."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], where, [False]])))
    return tuple((float(at[a]), float(at[b - 1] + lasts)) for a, b in edges.reshape(-1, 2))


# --- the file ----------------------------------------------------------------------------------------------------


def of_file(recording: Recording) -> list[Finding]:
    """Findings about length, frame rate, size and whether the file is whole."""
    found = []
    seconds = recording.length / clock.FPS
    if recording.lost > max(1.0, 0.02 * seconds):
        found.append(
            Finding(
                Severity.REFUSAL,
                f"The file breaks off: it promises {recording.lost:.1f} s more than the {seconds:.1f} s that it holds.",
            )
        )
    if seconds < SHORTEST:
        found.append(Finding(Severity.REFUSAL, f"The recording is {seconds:.1f} s long: {SHORTEST:.0f} s are needed."))
    elif round(seconds) < SHORT:
        found.append(
            Finding(
                Severity.WARNING,
                f"The recording is {seconds:.1f} s long: two or three minutes make the best avatar, one a fair one.",
            )
        )
    whole = recording.whole / clock.FPS
    if whole > seconds + 1:
        found.append(
            Finding(
                Severity.NOTE,
                f"The first {seconds:.0f} s of {whole:.0f} s are used.",
            )
        )
    if recording.rate < SLOWEST:
        found.append(
            Finding(Severity.WARNING, f"There are {recording.rate:.1f} frames a second: {clock.FPS} are wanted.")
        )
    elif abs(recording.rate - clock.FPS) > 0.1 or not recording.is_even:
        evenly = "" if recording.is_even else ", unevenly spaced"
        sentence = f"The file has {recording.rate:.1f} frames a second{evenly}: {clock.FPS} a second are taken from it."
        found.append(Finding(Severity.NOTE, sentence))
    if gaps := recording.gaps(STILL):
        found.append(Finding(Severity.WARNING, "The picture stands still.", tuple(gaps)))
    return found


# --- the picture -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Looks(Npz):
    """What S looks at a recording found, two a second. Of a look without a face, all but ``faces`` is NaN."""

    picture: npt.NDArray[np.int64]  # [2] width and height of the upright picture
    faces: npt.NDArray[np.int64]  # [S] how many there are, at most 2
    boxes: Float32  # [S, 4] left, top, right, bottom of the largest face, pixels of the upright picture
    second: Float32  # [S] height of the next face, relative to the largest
    sharpness: Float32  # [S] how much of the face's contrast is in its finest detail
    luma: Float32  # [S] 0..255, mean of the face
    burnt: Float32  # [S] share of the face's pixels that are white

    @property
    def times(self) -> Float64:
        """Seconds of the looks, [S]."""
        return np.arange(len(self.faces)) * (PROBE_STEP / clock.FPS)


def look(recording: Recording, model: Path, advance: Callable[[int], object] = lambda done: None) -> Looks:
    """Look at whole pictures of a recording, two a second.

    Args:
        model: of FaceLandmarker.
        advance: called with the number of looks done.
    """
    rows: list[tuple[float, ...]] = []
    last: Float32 | None = None  # where the face was
    with Landmarker(model, faces=2) as landmarker:
        for picture in recording.pictures(PROBE_STEP, LOOK_SIZE):
            boxes = _boxes(picture, landmarker, last, thorough=last is None and len(rows) < THOROUGH_LOOKS)
            if len(boxes):
                last = boxes[0]
                heights = boxes[:, 3] - boxes[:, 1]
                second = heights[1] / heights[0] if len(boxes) > 1 else np.nan
                left, top, right, bottom = np.rint(last).astype(int).clip(0)
                scale = max(recording.picture) / max(picture.shape)
                rows.append((len(boxes), *(last * scale), second, *_measured(picture[top:bottom, left:right])))
            else:
                rows.append((0, *(np.nan,) * 8))
            advance(len(rows))
    table = np.array(rows, np.float32)
    return Looks(
        np.array(recording.picture), table[:, 0].astype(int), table[:, 1:5], *np.ascontiguousarray(table[:, 5:].T)
    )


def _boxes(picture: Image, landmarker: Landmarker, last: Float32 | None, thorough: bool) -> Float32:
    """Boxes [F, 4] of the faces in a picture, the largest first.

    The detector misses faces that are small in what it is shown: where it finds none, it is shown parts of the
    picture, first those around where the face was.
    """
    height, width = picture.shape[:2]
    side = min(height, width)
    squares = [(x, y, side) for x, y in zip(_places(width, side, 3), _places(height, side, 3), strict=True)]
    if last is not None:
        x, y = (last[:2] + last[2:]) / 2
        near = int(min(3 * (last[3] - last[1]), side))
        squares.insert(
            0, (int(min(max(x - near / 2, 0), width - near)), int(min(max(y - near / 2, 0), height - near)), near)
        )
    if thorough:
        half = side // 2
        squares += [(x, y, half) for y in _places(height, half, 3) for x in _places(width, half, 6)]
    faces = landmarker.every(picture)
    for x, y, edge in dict.fromkeys(squares):
        if faces:
            break
        part = landmarker.every(picture[y : y + edge, x : x + edge])
        faces = [face + np.array([x, y], np.float32) for face in part]
    boxes = np.array([[*face.min(0), *face.max(0)] for face in faces], np.float32).reshape(-1, 4)
    boxes = boxes[np.argsort(boxes[:, 1] - boxes[:, 3])]
    overlap = np.minimum(boxes[:, 2:], boxes[:1, 2:]) - np.maximum(boxes[:, :2], boxes[:1, :2])
    same = overlap.clip(0).prod(1) > 0.5 * (boxes[:, 2:] - boxes[:, :2]).prod(1)  # one face found twice
    return np.asarray(boxes[~same | (np.arange(len(boxes)) == 0)], np.float32)


def _places(length: int, side: int, count: int) -> list[int]:
    """``count`` starts of parts of a length, from one end to the other."""
    return [(length - side) * part // (count - 1) for part in range(count)]


def _measured(face: Image) -> tuple[float, float, float]:
    """Sharpness, mean luma and share of white of a face."""
    if min(face.shape[:2]) < 8:
        return (np.nan,) * 3
    height = max(round(FACE_WIDTH * face.shape[0] / face.shape[1] / 2) * 2, 2)
    grey = av.VideoFrame.from_ndarray(np.ascontiguousarray(face), format="rgb24").reformat(
        FACE_WIDTH, height, "gray", interpolation="AREA"
    )
    luma = grey.to_ndarray().astype(np.float32)
    fine = luma[1:-1, 1:-1] - (luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]) / 4
    return float(fine.std() / max(luma.std(), 1.0)), float(luma.mean()), float(np.mean(face.min(-1) >= 250))


def of_picture(looks: Looks) -> list[Finding]:
    """Findings about faces, sharpness and light."""
    found = []
    at, lasts = looks.times, PROBE_STEP / clock.FPS
    none = looks.faces == 0
    if none.all():
        return [Finding(Severity.REFUSAL, "There is no face in the recording that speaks to the camera.")]
    if none.any():
        severity = Severity.REFUSAL if none.mean() > MAX_MISSING else Severity.WARNING
        share = f"There is no face in {_percent(none.mean())} of the recording."
        found.append(Finding(severity, share, spans(none, at, lasts)))
    other = looks.second >= SECOND_FACE
    if other.mean() > MAX_SECOND:
        sentence = f"There are two faces in {_percent(other.mean())} of the recording, one is expected."
        found.append(Finding(Severity.REFUSAL, sentence, spans(other, at, lasts)))
    elif (looks.faces > 1).any():
        sentence = "There is a second face: only the larger one is followed."
        found.append(Finding(Severity.WARNING, sentence, spans(looks.faces > 1, at, lasts)))

    height = float(np.nanmedian(looks.boxes[:, 3] - looks.boxes[:, 1]))
    if height < TINY_FACE:
        sentence = f"The face is {height:.0f} pixels high, {TINY_FACE} are needed: come closer to the camera."
        found.append(Finding(Severity.REFUSAL, sentence))
    elif height < SMALL_FACE:
        sentence = f"The face is {height:.0f} pixels high: {SMALL_FACE} or more are better."
        found.append(Finding(Severity.WARNING, sentence))
    away = _outside(looks)
    if away.any():
        sentence = "The face leaves the square that is cut from the picture."
        found.append(Finding(Severity.WARNING, sentence, spans(away, at, lasts)))

    usual = float(np.nanmedian(looks.sharpness))
    if usual < BLURRED:
        found.append(Finding(Severity.WARNING, "The face is not sharp: focus on it, and use a larger picture."))
    elif (blurred := looks.sharpness < BLURRED_NOW * usual).any():
        found.append(Finding(Severity.WARNING, "The face is not sharp.", spans(blurred, at, lasts)))
    luma = float(np.nanmedian(looks.luma))
    burnt = looks.burnt > BURNT
    if luma < DARK:
        found.append(Finding(Severity.WARNING, f"The face is too dark (mean brightness {luma:.0f} of 255)."))
    if luma > BRIGHT:
        found.append(Finding(Severity.WARNING, f"The face is too bright (mean brightness {luma:.0f} of 255)."))
    elif burnt.any():
        found.append(Finding(Severity.WARNING, "Parts of the face are burnt out to white.", spans(burnt, at, lasts)))
    changed = np.abs(looks.luma / luma - 1) > EXPOSURE
    if changed.any():
        sentence = f"The light on the face changes by more than {_percent(EXPOSURE)}: fix the camera's exposure."
        found.append(Finding(Severity.WARNING, sentence, spans(changed, at, lasts)))
    return found


def square(looks: Looks) -> Square:
    """The part of the picture that shows head and shoulders, wherever the face is: one for the whole recording."""
    short = int(looks.picture.min())
    boxes = looks.boxes[looks.faces > 0]
    left, top = np.percentile(boxes[:, :2], 2, axis=0)
    right, bottom = np.percentile(boxes[:, 2:], 98, axis=0)
    height = float(np.median(boxes[:, 3] - boxes[:, 1]))
    wanted = max(HEAD * height, 1.2 * (right - left), 1.4 * (bottom - top))
    side = short if short <= HEAD_ROOM * wanted else round(wanted / 2) * 2
    corner = np.rint([(left + right) / 2 - side / 2, (top + bottom) / 2 - FACE_PLACE * side]).astype(int)
    x, y = corner.clip(0, looks.picture - side)
    return Square(int(x), int(y), side)


def _outside(looks: Looks) -> Bools:
    """Looks in which the face is not all in the square, [S]."""
    cut = square(looks)
    low, high = np.array([cut.left, cut.top]), np.array([cut.left, cut.top]) + cut.side
    slack = 0.02 * cut.side  # landmarks may lie a little beyond the picture
    return np.asarray(((looks.boxes[:, :2] < low - slack) | (looks.boxes[:, 2:] > high + slack)).any(1))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


# --- the sound ---------------------------------------------------------------------------------------------------


def of_sound(audio: Float32, seconds: float) -> list[Finding]:
    """Findings about level, clipping, noise and speech.

    Args:
        audio: [samples].
        seconds: how long the picture is.
    """
    found = []
    audio = audio[: round(seconds * clock.SAMPLE_RATE)]
    if len(audio) / clock.SAMPLE_RATE < seconds - 1:
        ends = len(audio) / clock.SAMPLE_RATE
        found.append(Finding(Severity.WARNING, "The sound ends before the picture.", ((ends, seconds),)))
    if not len(audio) or np.abs(audio).max() < SILENT:
        return [Finding(Severity.REFUSAL, "The sound is silent.")]
    frames = len(audio) // clock.SAMPLES_PER_FRAME
    at = np.arange(frames) / clock.FPS
    speech = vad.detect(audio, frames)
    speaks, rests = speech > SPEECH_EDGES[1], speech < SPEECH_EDGES[0]
    if speaks.sum() / clock.FPS < MIN_SPEECH:
        sentence = f"There are {speaks.sum() / clock.FPS:.1f} s of speech in the sound, {MIN_SPEECH:.0f} s are needed."
        return [*found, Finding(Severity.REFUSAL, sentence)]
    if speaks.mean() < LITTLE_SPEECH:
        sentence = f"There is speech in {_percent(float(speaks.mean()))} of the recording only."
        found.append(Finding(Severity.WARNING, sentence))
    pieces = audio[: frames * clock.SAMPLES_PER_FRAME].reshape(frames, clock.SAMPLES_PER_FRAME)
    power = np.mean(np.square(pieces, dtype=np.float64), 1)
    voice = float(power[speaks].mean())
    if 10 * np.log10(voice) < QUIET_DB:
        found.append(Finding(Severity.WARNING, f"The voice is quiet ({10 * np.log10(voice):.0f} dB of full scale)."))
    clipped = np.mean(np.abs(pieces) >= CLIPPED, 1)
    if clipped.mean() > MAX_CLIPPED:
        found.append(Finding(Severity.WARNING, "The sound is clipped.", spans(clipped > 0.01, at, 1 / clock.FPS)))
    if rests.any():
        noise = max(float(power[rests].mean()), 1e-12)
        ratio = 10 * np.log10(max(voice / noise - 1, 1e-3))
        if ratio < NOISY_DB:
            found.append(Finding(Severity.WARNING, f"There is noise: the voice is {ratio:.0f} dB above it."))
    else:
        sentence = "There is no pause in the speech or the noise is loud: a second of silence helps."
        found.append(Finding(Severity.WARNING, sentence))
    return found


# --- the track ---------------------------------------------------------------------------------------------------


def of_track(track: Track) -> list[Finding]:
    """Findings about what the mouth, the eyes and the head do."""
    found = []
    at, lasts = np.arange(len(track)) / clock.FPS, 1 / clock.FPS
    if not track.seen.all():
        sentence = "There is no face in some frames: they are left out."
        found.append(Finding(Severity.WARNING, sentence, spans(~track.seen, at, lasts)))
    opening = openings(track)
    low, high = np.percentile(opening[track.seen], [1, 99])
    if high - low < LEAST_OPENING:
        found.append(Finding(Severity.WARNING, "The lips hardly part: speak as to somebody across a table."))
    shut = (opening < low + 0.15 * (high - low)) & track.seen
    rest = tuple(span for span in spans(shut, at, lasts) if span[1] - span[0] >= REST_SECONDS - 1e-6)
    if rest:
        longest = sorted(rest, key=lambda span: span[0] - span[1])[:3]
        found.append(Finding(Severity.NOTE, "The mouth was found closed and at rest.", tuple(sorted(longest))))
    else:
        found.append(Finding(Severity.WARNING, "The mouth never rests closed: keep it shut for a second."))
    if not (track.blink > 0.5).any():
        found.append(Finding(Severity.WARNING, "The eyes never blink: the avatar's lids will not shut."))
    rotations = track.viewmats[:, :3, :3].astype(np.float64)
    u, _, vt = np.linalg.svd(rotations[track.seen].mean(0))
    cosine = (np.einsum("tij,ij->t", rotations, u @ vt) - 1) / 2
    turned = np.degrees(np.arccos(cosine.clip(-1, 1))) > TURNED
    if turned.any():
        sentence = f"The head is turned by more than {TURNED:.0f} degrees."
        found.append(Finding(Severity.WARNING, sentence, spans(turned, at, lasts)))
    return found


def openings(track: Track) -> Float32:
    """The lips' opening in distances between the eyes, [T]."""
    left, right = (track.landmarks[:, list(eye)].mean(1) for eye in track.layout.eyes)
    return np.asarray(track.lip_opening / np.linalg.norm(right - left, axis=1), np.float32)


# --- sound against picture ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Offset:
    """By how much the sound lags the picture."""

    seconds: float
    correlation: float  # of what the sound says about the lips with the lips: 0 nothing .. 1 all
    agreeing: float  # share of the recording's parts that say the same

    @property
    def is_sure(self) -> bool:
        """Whether it can be relied on."""
        at_edge = abs(self.seconds) > float(LAGS[-2])
        return self.correlation >= LEAST_CORRELATION and self.agreeing >= MIN_AGREEING and not at_edge

    @property
    def delay(self) -> float:
        """What has to be corrected, in seconds: 0 where it is little or uncertain."""
        return round(self.seconds, 3) if self.is_sure and abs(self.seconds) >= LEAST_OFFSET else 0.0

    @property
    def finding(self) -> Finding:
        """It as a sentence."""
        reason = f"{_percent(self.agreeing)} of the parts agree, correlation {self.correlation:.2f}"
        milliseconds = abs(round(1000 * self.seconds))
        if not self.is_sure:
            sentence = f"Whether sound and picture are in step can't be told for certain ({reason})."
            return Finding(Severity.WARNING, sentence)
        if not self.delay:
            return Finding(Severity.NOTE, f"Sound and picture are in step, to {milliseconds} ms ({reason}).")
        late = "later" if self.seconds > 0 else "earlier"
        sentence = f"The sound came {milliseconds} ms {late} than the picture, which is corrected ({reason})."
        return Finding(Severity.WARNING, sentence)


def offset(audio: Float32, track: Track) -> Offset:
    """Estimate by how much the sound lags the lips.

    For every lag, the lips' opening and the speed of it are predicted from what the audio encoder hears at that moment
    (ridge regression, cross-validated over blocks of 5 s). The lag at which the geometric mean of both correlations
    is largest is the offset; parts of the recording vote on it.

    Args:
        audio: [samples].
    """
    lips = openings(track).astype(np.float64)
    targets = np.stack([lips, np.gradient(lips)])  # [2, T]
    features = _features(audio)
    predicted = np.zeros((len(LAGS), *targets.shape))
    heard = np.zeros((len(LAGS), len(lips)), bool)
    seen = np.convolve(~track.seen, np.ones(3), "same") == 0  # both neighbours, too: the speed needs them
    fold = np.arange(len(lips)) // (5 * clock.FPS) % 4
    ridge = RIDGE * np.eye(features.shape[1])
    for index, lag in enumerate(LAGS):
        instant = np.rint((np.arange(len(lips)) / clock.FPS + lag) * 2 * clock.FPS).astype(int)
        heard[index] = (instant >= 0) & (instant < len(features)) & seen
        inputs = features[instant.clip(0, len(features) - 1)]
        for part in range(4):
            known, asked = heard[index] & (fold != part), heard[index] & (fold == part)
            if not known.any():
                continue
            mean, spread = inputs[known].mean(0), inputs[known].std(0) + 1e-6
            known_inputs = (inputs[known] - mean) / spread
            goal = targets[:, known] - targets[:, known].mean(1, keepdims=True)
            solved = np.linalg.solve(known_inputs.T @ known_inputs + ridge, known_inputs.T @ goal.T)
            predicted[index][:, asked] = ((inputs[asked] - mean) / spread @ solved).T

    def best(part: slice) -> tuple[float, float]:
        scores = np.array(
            [
                np.prod([_correlation(p[part][h[part]], t[part][h[part]]) for p, t in zip(both, targets, strict=True)])
                for both, h in zip(predicted, heard, strict=True)
            ]
        )
        top = int(np.argmax(scores))
        shift = 0.0
        if 0 < top < len(LAGS) - 1:
            before, here, after = scores[top - 1 : top + 2]
            shift = 0.5 * (before - after) / min(before - 2 * here + after, -1e-12)
        return float(LAGS[top] + shift * (LAGS[1] - LAGS[0])), float(np.sqrt(scores[top]))

    seconds, correlation = best(slice(None))
    count = int(np.clip(len(lips) / clock.FPS / OFFSET_PIECE, 2, 8))
    edges = np.linspace(0, len(lips), count + 1).astype(int)
    votes = [best(slice(a, b))[0] for a, b in pairwise(edges)]
    return Offset(seconds, correlation, float(np.mean(np.abs(np.array(votes) - seconds) <= AGREEMENT)))


def _features(audio: Float32) -> Float64:
    """What the audio encoder hears, one row every half frame."""
    encoder, samples = audio_encoder.load(), torch.from_numpy(audio)
    rows = [encoder.encode(samples[start:]) for start in (0, clock.SAMPLES_PER_FRAME // 2)]
    count = min(map(len, rows))
    return torch.stack([row[:count] for row in rows], 1).flatten(0, 1).numpy().astype(np.float64)


def _correlation(a: Float64, b: Float64) -> float:
    """At least 0."""
    return max(float(np.corrcoef(a, b)[0, 1]), 0.0) if len(a) > 2 and a.std() > 0 and b.std() > 0 else 0.0
