"""`talksplat-export robustness`: what an avatar does when the sound is bad, when nobody speaks, and in other voices.

The avatar is driven as it is served (audio encoder, adapter, voice activity's gate), and its movement is measured on
its Gaussians: the displacement of all of them. ``opening`` stands for the movement's first principal component over
all clean speech, which in a talking face is the jaw with the lower lip. Three kinds of rows:

================ ======================================================================================================
``degradation``  each speaker's speech, degraded, against the same speech as it is: ``movement_r`` correlates the
                 movement (all directions pooled), ``opening_r`` the opening; means of the speakers, and the worst one
``rest``         sounds without speech: ``opening_std_pct`` is the opening's standard deviation, ``opening_max_pct`` its
                 greatest distance from rest, both in percent of the range in clean speech (2nd to 98th percentile)
``sync``         one voice, and how far its opening follows its loudness: ``opening_r`` at the lag where it is largest,
                 ``lag_frames``, positive where the lips are late (-5 to 5)
================ ======================================================================================================

Speech comes from the files and folders given, or is synthesised by espeak-ng in voices that are not trained on. The
languages of ``sync`` are espeak-ng's, too, and are missing where it is not installed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
import torch
from rich.console import Console

from talksplat import avatar as bundle
from talksplat.avatar import COEFFICIENTS, Avatar, BundleError, UnknownAvatarError
from talksplat.bench import _report
from talksplat.clock import SAMPLE_RATE, SAMPLES_PER_FRAME
from talksplat_export import augment, bars, stage_b, synthesis, texts
from talksplat_export.augment import Audio, Generator
from talksplat_export.stage_b import Adapter

SECONDS = 30.0  # of each speaker
LAGS = range(-5, 6)
CROWD = 5  # voices of a babble
PAUSE = 0.3  # seconds between two clips of a speaker
REST_SECONDS = 20.0
REST_LEVELS = {  # dBFS (RMS) of sounds that are no speech
    "silence": None,
    "room_noise": -60.0,
    "white_noise": -35.0,
    "breath": -35.0,
    "music": -35.0,
    "keyboard": -35.0,
}
SPEECH_FILES = (".flac", ".wav", ".ogg", ".mp3")

VOICES = ("en-us+f2", "en-us+m3", "en-gb+Andy", "en-gb+belinda")
LANGUAGES = {
    "de": "Guten Morgen. Ich heiße Anna und wohne mit meiner Familie in einer kleinen Stadt am Fluss.",
    "da": "God morgen. Jeg hedder Anna, og jeg bor i en lille by ved havet med min mor og min far.",
    "sk": "Dobré ráno. Volám sa Anna a bývam s mamou v malom meste pri rieke.",
    "af": "Goeie môre. My naam is Anna en ek woon saam met my ma in 'n klein dorpie by die see.",
    "el": "Καλημέρα. Με λένε Άννα και μένω με τη μητέρα μου σε μια μικρή πόλη δίπλα στη θάλασσα.",
}

Movement: TypeAlias = npt.NDArray[np.float32]  # [T, 20] in a basis where squared length is the Gaussians' mean square
Degrade: TypeAlias = Callable[[Audio, Audio, Generator], Audio]  # of speech [T] and babble [T]


class SpeechError(ValueError):
    """There is no speech to measure with."""


@dataclass(frozen=True)
class Degradation:
    """One way to spoil speech."""

    name: str
    level: float
    unit: str
    apply: Degrade


def _noisy(name: str, make: Callable[[Audio, Audio, Generator], Audio], *levels: float) -> list[Degradation]:
    """Speech with something added, at several signal-to-noise ratios."""

    def apply(level: float) -> Degrade:
        return lambda audio, babble, rng: augment.mix(audio, make(audio, babble, rng), level)

    return [Degradation(name, level, "db_snr", apply(level)) for level in levels]


def _spoilt(
    name: str, unit: str, apply: Callable[[Audio, float, Generator], Audio], *levels: float
) -> list[Degradation]:
    def at(level: float) -> Degrade:
        return lambda audio, babble, rng: apply(audio, level, rng)

    return [Degradation(name, level, unit, at(level)) for level in levels]


DEGRADATIONS: Sequence[Degradation] = (
    *_noisy("white_noise", lambda audio, _, rng: augment.coloured_noise(len(audio), 0, rng), 20, 10, 5, 0),
    *_noisy("pink_noise", lambda audio, _, rng: augment.coloured_noise(len(audio), 1, rng), 20, 10, 5, 0),
    *_noisy("babble", lambda _, babble, __: babble, 20, 10, 5, 0),
    *_noisy("music", lambda audio, _, rng: augment.music(len(audio), rng), 20, 10),
    *_noisy("keyboard", lambda audio, _, rng: augment.clicks(len(audio), rng), 20, 10),
    *_spoilt("reverb", "s_rt60", augment.reverb, 0.3, 0.5, 0.8),
    *_spoilt("gain", "db", lambda audio, db, _: np.clip(augment.gain(audio, db), -1, 1), -30, -20, -10, 6),
    *_spoilt("band_limit", "hz", lambda audio, hz, _: augment.band_limit(audio, 0, hz), 4000),
    *_spoilt("clipping", "db_below_peak", lambda audio, db, _: augment.clip(audio, db), 6, 12),
    *_spoilt("g711", "bit_per_s", lambda audio, _, __: augment.telephone(audio), 64000),
    *_spoilt("opus", "bit_per_s", lambda audio, bits, _: augment.opus(audio, int(bits)), 8000, 12000, 24000),
    *_spoilt("packet_loss", "pct", lambda audio, pct, rng: augment.packet_loss(audio, pct / 100, rng), 2, 5, 10),
)


def rests(samples: int, rng: Generator) -> dict[str, Audio]:
    """Sounds [samples] without speech: those of `REST_LEVELS`."""
    breathing = np.zeros(samples, np.float32)
    for start in range(0, samples - 2 * SAMPLE_RATE, 2 * SAMPLE_RATE):
        length = int(rng.uniform(0.3, 1.2) * SAMPLE_RATE)
        breathing[start : start + length] = augment.breath(length, rng)
    sounds = {
        "silence": np.zeros(samples, np.float32),
        "room_noise": augment.coloured_noise(samples, 1, rng),
        "white_noise": augment.coloured_noise(samples, 0, rng),
        "breath": breathing,
        "music": augment.music(samples, rng),
        "keyboard": augment.clicks(samples, rng),
    }
    for name, db in REST_LEVELS.items():
        if db is not None:
            sounds[name] = augment.gain(sounds[name] / np.sqrt(np.mean(sounds[name] ** 2)), db)
    return sounds


class Driven:
    """An avatar that audio moves.

    Args:
        avatar: with its adapter and its bases.
    """

    def __init__(self, avatar: Avatar) -> None:
        self._adapter = Adapter(avatar.adapter_in, avatar.adapter_out)
        moved = avatar.bases[:3, :COEFFICIENTS].astype(np.float32) * avatar.basis_scales[:3, :COEFFICIENTS, None]
        metric = np.einsum("kcn,kdn->cd", moved, moved, dtype=np.float64) / avatar.gaussians
        values, vectors = np.linalg.eigh(metric)
        self._basis = (vectors * np.sqrt(values.clip(0))).astype(np.float32)

    def __call__(self, audio: Audio) -> Movement:
        """The movement of every whole frame of ``audio`` [samples]."""
        return np.asarray(self._adapter(stage_b.hear(audio, len(audio) // SAMPLES_PER_FRAME)) @ self._basis)


@dataclass(frozen=True, eq=False)
class Opening:
    """The direction in which clean speech moves the face most, away from rest."""

    direction: npt.NDArray[np.float32]  # [20]
    span: float  # from the 2nd to the 98th percentile of clean speech

    @classmethod
    def of(cls, clean: Movement) -> Opening:
        """Of the movement in clean speech, [T, 20]."""
        direction = np.linalg.svd(clean - clean.mean(0), full_matrices=False)[2][0]
        direction = direction * np.sign(clean.mean(0) @ direction)
        low, high = np.percentile(clean @ direction, [2, 98])
        return cls(direction.astype(np.float32), float(high - low))

    def __call__(self, movement: Movement) -> npt.NDArray[np.float32]:
        """Of each frame, [T]."""
        return np.asarray(movement @ self.direction)


def pooled_r(one: Movement, other: Movement) -> float:
    """Correlation of two movements [T, D], every direction centred, all pooled."""
    a, b = (movement - movement.mean(0) for movement in (one, other))
    return float(np.sum(a * b) / max(np.sqrt(np.sum(a**2) * np.sum(b**2)), 1e-30))


def lagged_r(opening: npt.NDArray[np.float32], audio: Audio) -> tuple[float, int]:
    """How far the opening [T] follows the loudness of ``audio``: the largest correlation, and the frames it lags."""
    padded = np.pad(audio, (SAMPLES_PER_FRAME // 2, SAMPLES_PER_FRAME))[: len(opening) * SAMPLES_PER_FRAME]
    power = np.mean(padded.reshape(-1, SAMPLES_PER_FRAME) ** 2, axis=1)  # around each frame's instant
    loudness = np.log10(power + 1e-4 * power.max() + 1e-12)
    reach = max(map(abs, LAGS))
    inner = loudness[reach:-reach]
    found = [float(np.corrcoef(inner, opening[reach + lag : len(opening) - reach + lag])[0, 1]) for lag in LAGS]
    best = int(np.argmax(found))
    return found[best], LAGS[best]


def measure(
    driven: Driven,
    speakers: Mapping[str, Audio],
    voices: Mapping[str, Audio],
    seed: int = 0,
    advance: Callable[[int], object] = lambda done: None,
) -> list[_report.Row]:
    """All rows; see the module.

    Args:
        driven: the avatar.
        speakers: clean speech by speaker.
        voices: more voices, only for the rows ``sync``.
        seed: of noises.
        advance: called with the number of signals done, of `signals`.
    """
    done = 0

    def drive(audio: Audio) -> Movement:
        nonlocal done
        movement = driven(audio)
        done += 1
        advance(done)
        return movement

    clean = {name: drive(audio) for name, audio in speakers.items()}
    opening = Opening.of(np.concatenate(list(clean.values())))
    rows: list[_report.Row] = []
    for number, degradation in enumerate(DEGRADATIONS):
        pairs = []
        for index, (name, audio) in enumerate(speakers.items()):
            rng = np.random.default_rng((seed, number, index))
            others = [other for other in speakers if other != name] or [name]
            spoilt = degradation.apply(audio, babble([speakers[other] for other in others], audio, rng), rng)
            pairs.append((clean[name], drive(spoilt)))
        rows.append(_compared(degradation, pairs, opening))
    for name, audio in rests(int(REST_SECONDS * SAMPLE_RATE), np.random.default_rng(seed)).items():
        moved = 100 * opening(drive(audio)) / opening.span
        rows.append(
            {
                "check": "rest",
                "name": name,
                "level": REST_LEVELS[name],
                "unit": "dbfs",
                "opening_std_pct": round(float(moved.std()), 2),
                "opening_max_pct": round(float(np.abs(moved).max()), 2),
            }
        )
    for name, audio in (*speakers.items(), *voices.items()):
        r, lag = lagged_r(opening(clean[name] if name in clean else drive(audio)), audio)
        rows.append({"check": "sync", "name": name, "opening_r": round(r, 3), "lag_frames": lag})
    return rows


def _compared(degradation: Degradation, pairs: Sequence[tuple[Movement, Movement]], opening: Opening) -> _report.Row:
    """A row of ``degradation``, from each speaker's movement in clean and in degraded speech."""
    movement_r = [pooled_r(clean, spoilt) for clean, spoilt in pairs]
    opening_r = [float(np.corrcoef(opening(clean), opening(spoilt))[0, 1]) for clean, spoilt in pairs]
    return {
        "check": "degradation",
        "name": degradation.name,
        "level": degradation.level,
        "unit": degradation.unit,
        "movement_r": round(float(np.mean(movement_r)), 3),
        "movement_r_worst": round(min(movement_r), 3),
        "opening_r": round(float(np.mean(opening_r)), 3),
        "opening_r_worst": round(min(opening_r), 3),
        "speakers": len(pairs),
    }


def signals(speakers: Mapping[str, Audio], voices: Mapping[str, Audio]) -> int:
    """How many signals `measure` drives the avatar with."""
    return len(speakers) * (1 + len(DEGRADATIONS)) + len(REST_LEVELS) + len(voices)


def babble(others: Sequence[Audio], like: Audio, rng: Generator) -> Audio:
    """`CROWD` voices at once, from random places of other people's speech."""
    crowd = np.zeros_like(like)
    for _ in range(CROWD):
        other = others[int(rng.integers(len(others)))]
        voice = np.resize(np.roll(other, int(rng.integers(len(other)))), like.shape)
        crowd += voice / max(float(np.sqrt(np.mean(voice**2))), 1e-9)
    return crowd


def read_speech(paths: Sequence[Path]) -> dict[str, Audio]:
    """Speech by speaker, up to `SECONDS` of each: a file is a speaker, and so is a folder inside a given folder.

    Raises:
        SpeechError: a file can't be read, or there is none.
    """
    clips: dict[str, list[Path]] = {}
    for path in paths:
        if not path.is_dir():
            clips.setdefault(path.stem, []).append(path)
            continue
        for file in sorted(file for file in path.rglob("*") if file.suffix.lower() in SPEECH_FILES):
            inside = file.relative_to(path).parts
            clips.setdefault(inside[0] if len(inside) > 1 else file.stem, []).append(file)
    if not clips:
        raise SpeechError(f"No speech in {', '.join(map(str, paths))}: expected files {', '.join(SPEECH_FILES)}.")
    return {name: _joined(files) for name, files in clips.items()}


def _joined(files: Sequence[Path]) -> Audio:
    wanted = int(SECONDS * SAMPLE_RATE)
    parts: list[Audio] = []
    for file in files:
        if sum(map(len, parts)) >= wanted:
            break
        try:
            audio, rate = soundfile.read(file, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, OSError) as error:
            raise SpeechError(f"{file} can't be read: {error}") from error
        parts += [soxr.resample(audio.mean(1), rate, SAMPLE_RATE), np.zeros(int(PAUSE * SAMPLE_RATE), np.float32)]
    return np.concatenate(parts)[:wanted].astype(np.float32)


def synthesised(voices: Mapping[str, str], seconds: float = SECONDS) -> dict[str, Audio]:
    """Speech of espeak-ng, by voice.

    Args:
        voices: what each voice says, over and over; where it is empty, English sentences.
        seconds: of each.

    Raises:
        synthesis.SynthesisError: espeak-ng is not installed.
    """
    said: dict[str, Audio] = {}
    with synthesis.Espeak() as espeak:
        for voice, text in voices.items():
            sentences = itertools.repeat(text) if text else texts.english(len(said))
            parts: list[Audio] = []
            while sum(map(len, parts)) < seconds * SAMPLE_RATE:
                audio, _ = synthesis.label(espeak.say(next(sentences), voice))
                parts += [audio, np.zeros(int(PAUSE * SAMPLE_RATE), np.float32)]
            said[voice] = np.concatenate(parts)[: int(seconds * SAMPLE_RATE)]
    return said


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "robustness", help="how an avatar stands bad sound, silence and strangers", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("bundle", type=Path, metavar="avatars/ID", nargs="?", default=Path("avatars/ava"))
    parser.add_argument("--speech", type=Path, nargs="+", metavar="PATH", help="files, or folders with a folder each")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    try:
        avatar = bundle.read(args.bundle.parent, args.bundle.name)
        speakers = read_speech(args.speech) if args.speech else synthesised(dict.fromkeys(VOICES, ""))
    except (BundleError, UnknownAvatarError, SpeechError, synthesis.SynthesisError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console = Console()
    try:
        voices = synthesised(LANGUAGES)
    except synthesis.SynthesisError as error:
        console.print(f"no rows for other languages: {error}")
        voices = {}
    with bars.shown(console, "robustness", signals(speakers, voices)) as advance:
        rows = measure(Driven(avatar), speakers, voices, advance=advance)
    _report.report("robustness", rows, args.json)
    return 0
