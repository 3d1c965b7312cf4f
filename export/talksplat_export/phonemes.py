# ruff: noqa: RUF001, RUF002  (IPA letters look like others)
"""The one phoneme set: its IPA and ARPAbet spellings, and what each phoneme does to the lips.

Diphthongs and affricates are sequences here (``aɪ`` is ``a`` then ``ɪ``, ``tʃ`` is ``t`` then ``ʃ``), because that is
what the mouth does. Sounds of other languages are filed under the phoneme that looks most alike.
"""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Phoneme(NamedTuple):
    """One row of the table; the last six values lie in [0, 1] and describe the lips at the phoneme's centre."""

    symbol: str
    ipa: str  # every IPA letter filed under this phoneme
    arpabet: str  # spellings in ARPAbet, without stress
    jaw: float  # how far the jaw drops
    opening: float  # distance of the lips
    rounding: float  # lips pushed forward and narrow
    spreading: float  # corners pulled apart
    closure: float  # lips pressed together
    labiodental: float  # lower lip against the upper teeth


PHONEMES: tuple[Phoneme, ...] = (
    Phoneme("sil", "", "pau sil", 0.0, 0.0, 0.0, 0.0, 0.2, 0.0),
    # vowels
    Phoneme("i", "iɨ", "iy", 0.25, 0.35, 0.0, 0.9, 0.0, 0.0),
    Phoneme("ɪ", "ɪᵻ", "ih", 0.3, 0.4, 0.0, 0.6, 0.0, 0.0),
    Phoneme("e", "e", "", 0.4, 0.5, 0.0, 0.7, 0.0, 0.0),
    Phoneme("ɛ", "ɛε", "eh", 0.55, 0.6, 0.0, 0.5, 0.0, 0.0),
    Phoneme("æ", "æ", "ae", 0.8, 0.8, 0.0, 0.5, 0.0, 0.0),
    Phoneme("a", "a", "", 0.9, 0.9, 0.0, 0.2, 0.0, 0.0),
    Phoneme("ɑ", "ɑ", "aa", 1.0, 1.0, 0.05, 0.05, 0.0, 0.0),
    Phoneme("ɔ", "ɔɒ", "ao", 0.75, 0.75, 0.55, 0.0, 0.0, 0.0),
    Phoneme("o", "oɤ", "", 0.55, 0.55, 0.75, 0.0, 0.0, 0.0),
    Phoneme("ʊ", "ʊ", "uh", 0.35, 0.4, 0.65, 0.0, 0.0, 0.0),
    Phoneme("u", "uɯʉ", "uw", 0.25, 0.25, 1.0, 0.0, 0.0, 0.0),
    Phoneme("y", "yʏøœɵ", "", 0.3, 0.3, 0.9, 0.0, 0.0, 0.0),
    Phoneme("ʌ", "ʌɐ", "ah", 0.65, 0.65, 0.0, 0.2, 0.0, 0.0),
    Phoneme("ə", "əɘ", "ax", 0.4, 0.45, 0.0, 0.2, 0.0, 0.0),
    Phoneme("ɜ", "ɜɚɝ", "er", 0.4, 0.4, 0.5, 0.0, 0.0, 0.0),
    # consonants made by the lips
    Phoneme("p", "p", "p", 0.1, 0.0, 0.0, 0.0, 1.0, 0.0),
    Phoneme("b", "bɓ", "b", 0.1, 0.0, 0.0, 0.0, 1.0, 0.0),
    Phoneme("m", "m", "m", 0.1, 0.0, 0.0, 0.0, 1.0, 0.0),
    Phoneme("f", "fɸ", "f", 0.15, 0.15, 0.0, 0.1, 0.0, 1.0),
    Phoneme("v", "vʋβⱱ", "v", 0.15, 0.15, 0.0, 0.1, 0.0, 1.0),
    Phoneme("w", "wʍɥ", "w", 0.2, 0.15, 1.0, 0.0, 0.0, 0.0),
    # consonants made by the tongue
    Phoneme("θ", "θ", "th", 0.25, 0.35, 0.0, 0.2, 0.0, 0.0),
    Phoneme("ð", "ð", "dh", 0.25, 0.35, 0.0, 0.2, 0.0, 0.0),
    Phoneme("t", "tʈʔ", "t", 0.15, 0.3, 0.0, 0.25, 0.0, 0.0),
    Phoneme("d", "dɖɗ", "d", 0.2, 0.3, 0.0, 0.25, 0.0, 0.0),
    Phoneme("ɾ", "ɾrɽ", "dx", 0.25, 0.35, 0.0, 0.2, 0.0, 0.0),
    Phoneme("n", "nɲɳ", "n", 0.2, 0.3, 0.0, 0.2, 0.0, 0.0),
    Phoneme("l", "lɫɭʎɬ", "l", 0.35, 0.4, 0.0, 0.2, 0.0, 0.0),
    Phoneme("s", "s", "s", 0.1, 0.3, 0.0, 0.5, 0.0, 0.0),
    Phoneme("z", "z", "z", 0.1, 0.3, 0.0, 0.5, 0.0, 0.0),
    Phoneme("ʃ", "ʃʂɕ", "sh", 0.15, 0.35, 0.7, 0.0, 0.0, 0.0),
    Phoneme("ʒ", "ʒʐʑ", "zh", 0.15, 0.35, 0.7, 0.0, 0.0, 0.0),
    Phoneme("ɹ", "ɹɻ", "r", 0.25, 0.3, 0.6, 0.0, 0.0, 0.0),
    Phoneme("j", "jʝɟ", "y", 0.2, 0.3, 0.0, 0.7, 0.0, 0.0),
    Phoneme("k", "kcq", "k", 0.3, 0.4, 0.0, 0.2, 0.0, 0.0),
    Phoneme("ɡ", "ɡgɠɢ", "g", 0.3, 0.4, 0.0, 0.2, 0.0, 0.0),
    Phoneme("ŋ", "ŋɴ", "ng", 0.3, 0.4, 0.0, 0.2, 0.0, 0.0),
    Phoneme("x", "xχʁɣħʕ", "", 0.35, 0.4, 0.0, 0.2, 0.0, 0.0),
    Phoneme("h", "hɦ", "hh", 0.4, 0.5, 0.0, 0.1, 0.0, 0.0),
)

SILENCE = 0

_BY_IPA = {letter: index for index, phoneme in enumerate(PHONEMES) for letter in phoneme.ipa}
_BY_ARPABET = {name: [index] for index, phoneme in enumerate(PHONEMES) for name in phoneme.arpabet.split()} | {
    name: [_BY_IPA[letter] for letter in ipa]
    for name, ipa in {"ay": "aɪ", "ey": "eɪ", "oy": "ɔɪ", "aw": "aʊ", "ow": "oʊ", "ch": "tʃ", "jh": "dʒ"}.items()
}
_NOT_A_SOUND = " ˈˌːˑ:()-_‿^',.;!?"


class UnknownSymbolError(ValueError):
    """A phonetic symbol that the table does not know."""


def from_ipa(ipa: str) -> list[int]:
    """Indices into `PHONEMES` of an IPA string; stress, length and diacritics are passed over.

    Raises:
        UnknownSymbolError: the string holds a letter that the table does not know.
    """
    letters = (c for c in unicodedata.normalize("NFD", ipa) if unicodedata.category(c) not in ("Mn", "Lm", "Sk"))
    try:
        return [_BY_IPA[letter] for letter in letters if letter not in _NOT_A_SOUND and not letter.isspace()]
    except KeyError as error:
        raise UnknownSymbolError(f"no phoneme for the IPA letter {error} in {ipa!r}") from None


def from_arpabet(name: str) -> list[int]:
    """Indices into `PHONEMES` of one ARPAbet symbol, for example ``ay`` or ``AY1``.

    Raises:
        UnknownSymbolError: the table does not know the symbol.
    """
    try:
        return _BY_ARPABET[name.lower().rstrip("012")]
    except KeyError:
        raise UnknownSymbolError(f"no phoneme for the ARPAbet symbol {name!r}") from None


def articulation() -> npt.NDArray[np.float32]:
    """[phonemes, 6]: jaw, opening, rounding, spreading, closure and labiodental of every phoneme."""
    return np.array([phoneme[3:] for phoneme in PHONEMES], dtype=np.float32)
