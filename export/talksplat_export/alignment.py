"""Phoneme times of real recordings whose words are known: Viterbi alignment with the encoder's own phoneme posteriors.

An encoder pretrained on synthetic speech, whose times are exact, labels real speech; trained on both, it hears both.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from talksplat.clock import SAMPLE_RATE

from . import phonemes
from .synthesis import LABEL_SAMPLES, LEVEL, Audio, Espeak, Recording

Posteriors: TypeAlias = Callable[[Audio], npt.NDArray[np.float32]]  # audio [T] -> log-probabilities [T / 160, phonemes]

_SHORTEST = 3  # labels (30 ms) that a phoneme takes at least
_CLIPS = 20  # in one recording


class Alignment(NamedTuple):
    """What is said when."""

    labels: npt.NDArray[np.uint8]  # indices of phonemes.PHONEMES
    score: float  # mean log-probability a label


def viterbi(log_probabilities: npt.NDArray[np.float32], words: Sequence[Sequence[int]]) -> Alignment | None:
    """The likeliest times of ``words`` (phoneme indices) with optional pauses around each; None where none fit.

    Args:
        log_probabilities: [labels, phonemes].
        words: the phonemes of each word, in order.
    """
    if not words:
        return None
    phones = np.array([phonemes.SILENCE, *(p for word in words for p in (*word, phonemes.SILENCE))])
    optional = phones == phonemes.SILENCE
    labels, states = len(log_probabilities), len(phones) * _SHORTEST  # a phone is _SHORTEST states in a row
    first = np.arange(states) % _SHORTEST == 0
    last = np.arange(states) % _SHORTEST == _SHORTEST - 1
    skips = first & np.repeat(np.roll(optional, 1), _SHORTEST)  # this phone may follow the one before a pause
    skips[: 2 * _SHORTEST] = False
    emission = log_probabilities[:, np.repeat(phones, _SHORTEST)]
    step = np.array([0, 1, _SHORTEST + 1])  # stay in a phone's last state, go on, go on past a pause
    came = np.zeros((labels, states), np.int8)
    score = np.full(states, -np.inf, np.float32)
    score[[0, _SHORTEST]] = emission[0, [0, _SHORTEST]]
    for label in range(1, labels):
        stay = np.where(last, score, -np.inf)
        go = np.concatenate([[-np.inf], score[:-1]])
        skip = np.where(skips, np.concatenate([np.full(step[2], -np.inf), score[: -step[2]]]), -np.inf)
        choices = np.stack([stay, go, skip])
        came[label] = choices.argmax(axis=0)
        score = choices.max(axis=0) + emission[label]
    ends = [states - 1, states - 1 - _SHORTEST]  # the last pause may be missing
    state = max(ends, key=lambda end: float(score[end]))
    best = float(score[state])
    if not np.isfinite(best):
        return None
    path = np.empty(labels, np.uint8)
    for label in range(labels - 1, -1, -1):
        path[label] = phones[state // _SHORTEST]
        state -= step[came[label, state]]
    return Alignment(path, best / labels)


def recordings(folder: Path, posteriors: Posteriors, keep: float = 0.85) -> Iterator[Recording]:
    """Clips of a folder with their phoneme times, joined with pauses to recordings of some 20 clips.

    Args:
        folder: holds ``manifest.csv`` with the columns ``file`` and ``transcript``, and the files.
        posteriors: the encoder's opinion at LABEL_RATE.
        keep: share of the clips that is kept, the best aligned ones: transcripts made by machine err.

    Raises:
        OSError, KeyError: the manifest or a file is missing, or the manifest has no such columns.
    """
    aligned: list[tuple[float, Audio, npt.NDArray[np.uint8]]] = []
    with (folder / "manifest.csv").open(newline="", encoding="utf-8") as file, Espeak() as espeak:
        for row in csv.DictReader(file):
            audio, sample_rate = soundfile.read(folder / row["file"], dtype="float32")
            audio = soxr.resample(audio, sample_rate, SAMPLE_RATE)
            audio = audio[: len(audio) // LABEL_SAMPLES * LABEL_SAMPLES]
            log_probabilities = posteriors(audio)
            audio *= LEVEL / max(float(np.sqrt(np.mean(audio**2))), 1e-6)
            words = [phonemes.from_ipa(word) for word in " ".join(espeak.ipa(row["transcript"])).split()]
            found = viterbi(log_probabilities, [word for word in words if word])
            if found is not None:
                aligned.append((found.score, audio, found.labels))
    worst = np.quantile([score for score, _, _ in aligned], 1 - keep)
    kept = [(audio, labels) for score, audio, labels in aligned if score >= worst]
    for first in range(0, len(kept), _CLIPS):
        clips, labels = zip(*kept[first : first + _CLIPS], strict=True)
        samples = np.clip(np.concatenate(clips) * 32768, -32768, 32767).astype(np.int16)
        yield Recording(f"real-{folder.name}-{first // _CLIPS}", samples, np.concatenate(labels))
