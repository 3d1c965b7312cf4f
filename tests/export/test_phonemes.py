import importlib.util

import numpy as np
import pytest

from talksplat_export import phonemes, texts
from talksplat_export.phonemes import PHONEMES
from talksplat_export.synthesis import Espeak, voices

needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="the wheel espeakng-loader is not installed"
)


def symbols(indices: list[int]) -> list[str]:
    return [PHONEMES[index].symbol for index in indices]


def test_every_spelling_belongs_to_one_phoneme() -> None:
    for column in ("ipa", "arpabet"):
        spellings = [s for p in PHONEMES for s in (p.ipa if column == "ipa" else p.arpabet.split())]
        assert len(spellings) == len(set(spellings))


def test_every_phoneme_but_silence_is_spelt_by_its_own_symbol() -> None:
    assert PHONEMES[phonemes.SILENCE].symbol == "sil"
    for index, phoneme in enumerate(PHONEMES):
        if index != phonemes.SILENCE:
            assert phonemes.from_ipa(phoneme.symbol) == [index]


def test_stress_length_ties_and_diacritics_are_passed_over() -> None:
    assert symbols(phonemes.from_ipa("ˈt͡ʃɑːɹm̩ˌ")) == ["t", "ʃ", "ɑ", "ɹ", "m"]  # noqa: RUF001


def test_diphthongs_are_two_phonemes() -> None:
    assert phonemes.from_ipa("aɪ") == phonemes.from_arpabet("AY1")  # noqa: RUF001


def test_an_unknown_letter_is_named() -> None:
    with pytest.raises(phonemes.UnknownSymbolError, match="☃"):
        phonemes.from_ipa("a☃")
    with pytest.raises(phonemes.UnknownSymbolError, match="snow"):
        phonemes.from_arpabet("snow")


def test_lips_close_on_p_b_m_and_on_nothing_else_that_is_said() -> None:
    closure = phonemes.articulation()[:, 4]
    assert {PHONEMES[i].symbol for i in np.flatnonzero(closure == 1)} == {"p", "b", "m"}
    assert not closure[np.arange(len(PHONEMES)) != phonemes.SILENCE][closure[1:] < 1].any()


def test_articulation_lies_between_0_and_1() -> None:
    table = phonemes.articulation()
    assert table.shape == (len(PHONEMES), 6)
    assert table.min() >= 0
    assert table.max() <= 1


@needs_espeak
def test_everything_that_the_voices_say_is_in_the_table() -> None:
    languages = {(v.name.split("+")[0], v.language) for v in voices() if v.engine == "espeak"}
    generators = {"english": texts.english(5), "invented": texts.invented(5)}
    said: set[int] = set()
    with Espeak() as espeak:
        for name, language in sorted(languages):
            for _ in range(12):
                for sentence in espeak.ipa(next(generators[language]), name):
                    said |= set(phonemes.from_ipa(sentence))
    assert len(said) >= len(PHONEMES) - 2
