"""Text to speech: what the voice needs around its networks, apart from who runs them. Stateless, and piece by piece.

A sentence's phonemes are encoded once. Any stretch of it is then computed by itself: the flow and the decoder see a few
frames more on either side than they answer for, so that pieces join without a seam. See `talksplat_export.voice`.
"""

from __future__ import annotations

import hashlib
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from talksplat.clock import CHUNK_SAMPLES, LOOK_AHEAD, MAX_UTTERANCE_SECONDS, SAMPLE_RATE
from talksplat.framing import RequestError
from talksplat.nets import session
from talksplat.phonemiser import MissingPhonemiserError

Array: TypeAlias = npt.NDArray[Any]

# The voice's own units
SOURCE_RATE = 22_050  # Hz
HOP = 256  # samples a frame
CHANNELS = 192
FLOW_CONTEXT = 20  # frames on either side: 32 can be felt, but the farther ones change the sound by less than 1e-4
CONTEXT = 11  # frames on either side that a frame's sound depends on

MAX_CHARACTERS = 500  # of a request's text
MAX_TOKENS = 1024  # of its phonemes, with a pad after each
MAX_FRAMES = MAX_UTTERANCE_SECONDS * SOURCE_RATE // HOP

# The first chunk of frames needs so many samples. Each further piece is as long as all before it, so that it is ready
# long before those have been heard, and the longest is such that other requests do not wait long.
FIRST_PIECE = CHUNK_SAMPLES + LOOK_AHEAD  # 4480, 280 ms
LONGEST_PIECE = 4 * FIRST_PIECE
KEPT = 16  # sentences whose phonemes stay encoded, for their further pieces


class Networks(NamedTuple):
    """The three networks as functions, wherever they run; see `talksplat_export.voice`."""

    encoder: Callable[[Array, Array], tuple[Array, Array, Array]]  # TOKENS, NOISE -> MEANS, DEVIATIONS, DURATIONS
    flow: Callable[[Array], Array]  # PRIOR -> LATENT
    decoder: Callable[[Array], Array]  # LATENT with context -> AUDIO


class Piece(NamedTuple):
    """A stretch of a sentence's speech."""

    audio: npt.NDArray[np.float32]  # [T] 16 kHz mono in [-1, 1]
    samples: int  # of the whole sentence


class Speaker:
    """Text in, speech out; from several threads, as far as `networks` and `phonemise` allow it.

    Args:
        networks: of the voice.
        symbols: the id of every IPA symbol that the voice knows, and of its marks ``^``, ``$`` and ``_``.
        replies: IPA of prepared texts.
        phonemise: text -> IPA, for all others; raises MissingPhonemiserError where there is none.
    """

    def __init__(
        self,
        networks: Networks,
        symbols: Mapping[str, int],
        replies: Mapping[str, str],
        phonemise: Callable[[str], str],
    ) -> None:
        self._networks = networks
        self._symbols = symbols
        self._replies = {spoken(text): ipa for text, ipa in replies.items()}
        self._phonemise = phonemise
        self._kept: OrderedDict[str, Array] = OrderedDict()  # text -> PRIOR
        self._lock = threading.Lock()  # of what is kept

    def __call__(self, text: str, start: int) -> Piece:
        """The speech of ``text`` from its sample ``start`` on. The same text always sounds the same.

        Raises:
            RequestError: there is no word in the text, it is too long, or not prepared and there is no phonemiser;
                ``start`` lies outside of its speech.
            PhonemiserError: the phonemiser failed.
        """
        prior = self._prior(text)
        samples = prior.shape[2] * HOP * SAMPLE_RATE // SOURCE_RATE
        if not 0 <= start < samples:
            raise RequestError(f"START is {start}, expected 0 to {samples - 1}, where the speech of TEXT ends.")
        end = min(samples, start + min(max(start, FIRST_PIECE), LONGEST_PIECE))
        first, last = start // PERIOD_OUT, -(-end // PERIOD_OUT)  # periods of the resampler
        source = self._sound(prior, first * PERIOD_IN - REACH, last * PERIOD_IN + REACH)
        audio = resample(source)[start - first * PERIOD_OUT : end - first * PERIOD_OUT]
        return Piece(np.clip(audio, -1.0, 1.0), samples)

    def asks_phonemiser(self, text: str) -> bool:
        """Whether `__call__` would ask it, and may take long: this text is neither prepared nor was it said just now.

        Raises:
            RequestError: there is no word in the text, or it is too long.
        """
        with self._lock:
            if text in self._kept:
                return False
        return _words(text) not in self._replies

    def _prior(self, text: str) -> Array:  # [1, CHANNELS, F]
        """What the flow is run from, for the whole sentence."""
        with self._lock:
            if text in self._kept:
                self._kept.move_to_end(text)
                return self._kept[text]
        ids = tokens(self.ipa(text), self._symbols)
        seed = hashlib.sha256(np.array(ids, "<i8").tobytes()).digest()
        draw = np.random.default_rng(int.from_bytes(seed, "little"))
        noise = draw.standard_normal((1, 2, len(ids)), np.float32)
        means, deviations, durations = self._networks.encoder(np.array([ids]), noise)
        frames = np.ceil(np.clip(durations[0], 1, MAX_FRAMES)).astype(np.int64)
        if frames.sum() > MAX_FRAMES:
            seconds = frames.sum() * HOP / SOURCE_RATE
            raise RequestError(f"TEXT takes {seconds:.0f} s to say, expected {MAX_UTTERANCE_SECONDS} s at most.")
        means, deviations = (np.repeat(each, frames, axis=2) for each in (means, deviations))
        prior: Array = means + deviations * draw.standard_normal(means.shape, np.float32)
        with self._lock:
            self._kept[text] = prior
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return prior

    def ipa(self, text: str) -> str:
        """How the text is said.

        Raises:
            RequestError: see `__call__`.
        """
        words = _words(text)
        if words in self._replies:
            return self._replies[words]
        try:
            return self._phonemise(" ".join("".join(c if c.isprintable() else " " for c in text).split()))
        except MissingPhonemiserError as error:
            raise RequestError(f"TEXT is no prepared reply, and to say anything else {error}") from error

    def _sound(self, prior: Array, begin: int, end: int) -> npt.NDArray[np.float32]:  # [end - begin]
        """Samples at SOURCE_RATE; beyond the sentence's ends the latent is zero."""
        frames = prior.shape[2]
        first, last = begin // HOP, -(-end // HOP)
        left, right = max(0, first - CONTEXT), min(frames, last + CONTEXT)
        # the flow itself pads, so that it is given no more than the sentence
        heard = slice(max(0, left - FLOW_CONTEXT), min(frames, right + FLOW_CONTEXT))
        latent = self._networks.flow(np.ascontiguousarray(prior[..., heard]))
        latent = latent[..., left - heard.start : right - heard.start]
        latent = np.pad(latent, ((0, 0), (0, 0), (left - (first - CONTEXT), last + CONTEXT - right)))
        audio: npt.NDArray[np.float32] = self._networks.decoder(latent)[0]
        return audio[begin - first * HOP : end - first * HOP]


def _words(text: str) -> str:
    """As `spoken`; raises RequestError where there is no word, or too much text for a sentence."""
    if len(text) > MAX_CHARACTERS:
        raise RequestError(f"TEXT has {len(text)} characters, expected {MAX_CHARACTERS} at most: a sentence.")
    words = spoken(text)
    if not words:
        raise RequestError("TEXT has neither letter nor digit, expected a sentence.")
    return words


def tokens(ipa: str, symbols: Mapping[str, int]) -> list[int]:
    """Ids with a pad after each, as the voice was trained; what has no id is left out.

    Raises:
        RequestError: nothing is left, or there are too many.
    """
    known = [symbol for symbol in unicodedata.normalize("NFD", ipa) if symbol in symbols]
    if not any(symbol.isalpha() for symbol in known):
        raise RequestError("TEXT has nothing that the voice can say.")
    pad = symbols["_"]
    ids = [symbols["^"], pad, *(each for symbol in known for each in (symbols[symbol], pad)), symbols["$"]]
    if len(ids) > MAX_TOKENS:
        raise RequestError(f"TEXT has {len(known)} phonemes, expected {MAX_TOKENS // 2} at most: a sentence.")
    return ids


def spoken(text: str) -> str:
    """What two texts that sound the same have in common: their letters and digits, in lower case."""
    letters = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    return " ".join("".join(c if c.isalnum() or c == "'" else " " for c in letters).split()).strip("' ")


# From the voice's rate to ours: each 441 samples become 320, by one matrix.

PERIOD_IN, PERIOD_OUT = 441, 320
_ZEROS, _BETA = 24, 9.0  # zero crossings of the windowed sinc on either side, and its Kaiser window's parameter
REACH = -(-_ZEROS * SOURCE_RATE // SAMPLE_RATE)  # samples that a period needs on either side: 34


def _resampler() -> npt.NDArray[np.float32]:  # [PERIOD_IN + 2 REACH, PERIOD_OUT]
    share = SAMPLE_RATE / SOURCE_RATE
    source = np.arange(PERIOD_IN + 2 * REACH)[:, None] - REACH
    apart = (source - np.arange(PERIOD_OUT) / share) * share  # in zero crossings
    inside = np.clip(1 - (apart / _ZEROS) ** 2, 0, None)
    return np.asarray(share * np.sinc(apart) * np.i0(_BETA * np.sqrt(inside)) / np.i0(_BETA) * (inside > 0), np.float32)


_RESAMPLER = _resampler()


def resample(
    source: npt.NDArray[np.float32],  # [N PERIOD_IN + 2 REACH] at SOURCE_RATE
) -> npt.NDArray[np.float32]:  # [N PERIOD_OUT] at SAMPLE_RATE
    """Whole periods, of which each is computed from its own samples and REACH on either side."""
    every = np.lib.stride_tricks.sliding_window_view(source, len(_RESAMPLER))
    audio: npt.NDArray[np.float32] = (every[::PERIOD_IN] @ _RESAMPLER).reshape(-1)
    return audio


def in_process(repository: Path, threads: int = 1) -> Networks:
    """The networks of a model repository on ONNX Runtime in this process, on the CPU, warmed up."""
    encoder, flow, decoder = (
        session(repository / name / "1" / "model.onnx", threads) for name in ("tts_encoder", "tts_flow", "tts_decoder")
    )

    def encode(tokens: Array, noise: Array) -> tuple[Array, Array, Array]:
        means, deviations, durations = encoder.run(None, {"TOKENS": tokens, "NOISE": noise})
        return means, deviations, durations

    networks = Networks(
        encode,
        flow=lambda prior: flow.run(None, {"PRIOR": prior})[0],
        decoder=lambda latent: decoder.run(None, {"LATENT": latent})[0],
    )
    networks.encoder(np.ones((1, 100), np.int64), np.zeros((1, 2, 100), np.float32))
    networks.decoder(networks.flow(np.zeros((1, CHANNELS, 60), np.float32)))
    return networks
