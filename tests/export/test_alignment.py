import csv
import importlib.util
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile

from talksplat_export import alignment, phonemes
from talksplat_export.phonemes import PHONEMES, SILENCE
from talksplat_export.synthesis import Audio

LogProbabilities = npt.NDArray[np.float32]


def opinion(labels: list[int], confidence: float = 0.5, seed: int = 0) -> LogProbabilities:
    """Log-probabilities that favour ``labels``, with noise."""
    scores = np.random.default_rng(seed).normal(0, 0.3, (len(labels), len(PHONEMES)))
    scores[np.arange(len(labels)), labels] += 10 * confidence
    scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return scores.astype(np.float32)


def test_times_are_found_with_and_without_pauses_between_words() -> None:
    said = [SILENCE] * 8 + [5] * 6 + [20] * 9 + [7] * 5 + [SILENCE] * 12 + [20] * 4 + [5] * 7
    found = alignment.viterbi(opinion(said), [[5, 20], [7], [20, 5]])
    assert found is not None
    np.testing.assert_array_equal(found.labels, said)


def test_the_order_of_words_is_kept_where_the_sound_says_otherwise() -> None:
    said_otherwise = [5] * 10 + [9] * 10 + [7] * 10
    found = alignment.viterbi(opinion(said_otherwise), [[5, 20, 7]])
    assert found is not None
    assert [label for label, _ in groupby(found.labels) if label != SILENCE] == [5, 20, 7]


def test_a_wrong_transcript_scores_worse() -> None:
    said = [SILENCE] * 8 + [5] * 6 + [20] * 9 + [7] * 5
    right, wrong = (alignment.viterbi(opinion(said), [word]) for word in ([5, 20, 7], [9, 30, 12]))
    assert right is not None
    assert wrong is not None
    assert right.score > wrong.score + 1


def test_words_that_do_not_fit_into_the_time_have_no_alignment() -> None:
    assert alignment.viterbi(opinion([5] * 8), [[5, 20, 7]]) is None


@pytest.mark.skipif(importlib.util.find_spec("espeakng_loader") is None, reason="espeakng-loader is not installed")
def test_the_worst_clips_of_a_folder_are_left_out(tmp_path: Path) -> None:
    words = [index for word in ("həloʊ", "ðɛɹ") for index in phonemes.from_ipa(word)]
    said = [index for index in words for _ in range(8)]
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, ["file", "transcript"])
        rows.writeheader()
        for name, transcript in (("a", "Hello there."), ("b", "Hello there!"), ("c", "Seven blue umbrellas")):
            soundfile.write(tmp_path / f"{name}.wav", np.full(len(said) * 160 + 70, 0.1, np.float32), 16000)
            rows.writerow({"file": f"{name}.wav", "transcript": transcript})

    def posteriors(audio: Audio) -> LogProbabilities:
        return opinion(said)[: len(audio) // 160]

    (recording,) = alignment.recordings(tmp_path, posteriors, keep=0.6)
    np.testing.assert_array_equal(recording.labels, said * 2)
    assert len(recording.audio) == 160 * len(recording.labels)
