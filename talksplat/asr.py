"""Speech to text: Moonshine's greedy loop and what it needs around it, apart from who runs the networks.

Moonshine is made for one stretch of speech: with a second of silence in front it answers nothing for half of all
clips, and on noise it makes words up. So silero's voice activity decides what it gets to hear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from talksplat import framing
from talksplat.clock import SAMPLE_RATE, SAMPLES_PER_FRAME, WINDOW
from talksplat.nets import session

Array: TypeAlias = npt.NDArray[Any]

BOS, EOS = 1, 2
TOKENS_PER_SECOND, SPARE_TOKENS = 6.5, 8  # the authors' cap, and what fast speech in a short span needs on top

SPEECH_THRESHOLD = 0.5
MARGIN = 6  # frames kept on either side of speech, 240 ms
MIN_SAMPLES = SAMPLE_RATE // 10  # anything shorter is padded: the encoder's convolutions need 895
SPAN_FRAMES = 15 * SAMPLE_RATE // SAMPLES_PER_FRAME  # decoded at once, if there are pauses: 15 s


class Networks(NamedTuple):
    """The three networks as functions, wherever they run; see `talksplat_export.vad` and `.moonshine`."""

    vad: Callable[[Array], Array]  # AUDIO [N, WINDOW] -> SPEECH [N, CHUNK_FRAMES]
    encoder: Callable[[Array], Array]  # AUDIO [1, T] -> CROSS_KV [1, 2, L, H, S, D]
    decoder: Callable[[Array, Array, Array], tuple[Array, Array]]  # TOKEN, CROSS_KV, PAST_KV -> LOGITS, PRESENT_KV


@dataclass(frozen=True)
class Transcriber:
    """Audio in, text out."""

    networks: Networks
    tokenizer: Tokenizer

    def __call__(
        self,
        audio: npt.NDArray[np.float32],  # [T] 16 kHz mono
    ) -> str:
        """The words that are spoken, with punctuation; empty where nobody speaks.

        Raises:
            RequestError: the audio is empty, too long, or not finite; see `talksplat.framing.windows`.
        """
        speech = self.networks.vad(framing.windows(audio)).reshape(-1)
        texts = (self._decode(audio[span]) for span in spans(speech, len(audio)))
        return " ".join(text for text in texts if text)

    def _decode(self, audio: npt.NDArray[np.float32]) -> str:
        cap = int(len(audio) / SAMPLE_RATE * TOKENS_PER_SECOND) + SPARE_TOKENS
        audio = np.pad(audio, (0, max(0, MIN_SAMPLES - len(audio))))
        return self.tokenizer.decode(greedy(self.networks.decoder, self.networks.encoder(audio[None]), cap).tokens)


def spans(
    speech: npt.NDArray[np.float32],  # [F or more] probability a frame
    samples: int,
) -> list[slice]:
    """The stretches of speech in ``samples`` of audio, with a margin on either side.

    Speech whose margins touch is one stretch. Stretches that follow each other are joined as long as they stay
    within SPAN_FRAMES, since the recogniser hears better with context; so a pause is cut at where it must be.
    """
    stretches: list[list[int]] = []  # first and last frame
    for frame in np.flatnonzero(speech >= SPEECH_THRESHOLD).tolist():
        if stretches and (frame - stretches[-1][1] <= 2 * MARGIN or frame - stretches[-1][0] < SPAN_FRAMES):
            stretches[-1][1] = frame
        else:
            stretches.append([frame, frame])
    return [
        slice(max(0, (first - MARGIN) * SAMPLES_PER_FRAME), min(samples, (last + 1 + MARGIN) * SAMPLES_PER_FRAME))
        for first, last in stretches
    ]


class Decoded(NamedTuple):
    """Tokens without BOS and EOS, and why there are no more."""

    tokens: list[int]
    stop: Literal["end", "cap", "loop"]


def greedy(
    decoder: Callable[[Array, Array, Array], tuple[Array, Array]],
    cross: Array,  # CROSS_KV [1, 2, L, H, S, D]
    cap: int,  # of tokens
) -> Decoded:
    """The likeliest token at each step until EOS, until the cap, or until the output goes round in a loop."""
    cache = np.zeros_like(cross[..., :0, :])
    tokens: list[int] = []
    token = BOS
    while len(tokens) < cap:
        logits, cache = decoder(np.array([[token]]), cross, cache)
        token = int(logits[0].argmax())
        if token == EOS:
            return Decoded(tokens, "end")
        tokens.append(token)
        if surplus := looping(tokens):
            return Decoded(tokens[:-surplus], "loop")
    return Decoded(tokens, "cap")


def looping(tokens: Sequence[int]) -> int:
    """How many tokens at the end only repeat the phrase before them, if that can't be speech any more; else 0.

    People do say "no, no, no", digits, and a sentence twice, so short phrases may come more often than long ones:
    one token seven times in a row, two or three tokens four times, longer phrases three times.
    """
    for length in range(1, len(tokens) // 4 + 1):
        repeats = 7 if length == 1 else 4 if length <= 3 else 3
        tail = length * repeats
        if len(tokens) >= length + tail and tokens[-tail:] == tokens[-tail - length : -length]:
            return tail
    return 0


class Tokenizer:
    """Pieces of text by token, from the table that Moonshine's wheels carry."""

    def __init__(
        self,
        table: bytes,  # per token its length, in two bytes from 128 on, and its UTF-8
    ) -> None:
        self._pieces: list[bytes] = []
        position = 0
        while position < len(table):
            size = table[position]
            position += 1
            if size >= 128:
                size += 128 * (table[position] - 1)
                position += 1
            self._pieces.append(table[position : position + size])
            position += size

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``; marks such as ``<s>`` say nothing, ``<0x41>`` is a byte, ``▁`` a space."""
        text = bytearray()
        for piece in (self._pieces[token] for token in tokens):
            if piece.startswith(b"<0x") and piece.endswith(b">"):
                text.append(int(piece[3:-1], 16))
            elif not (piece.startswith(b"<") and piece.endswith(b">") and len(piece) > 2):
                text += piece
        return text.decode(errors="replace").replace("\u2581", " ").strip()


def in_process(
    repository: Path,  # with the exported models
    threads: int = 1,
    precision: Literal["fp32", "int8"] = "int8",  # of encoder and decoder
) -> Networks:
    """The networks of a model repository on ONNX Runtime in this process, on the CPU, warmed up.

    In int8 an utterance takes less than half of the time, and a quarter of the memory: see `talksplat_export.dynamic`.
    """
    vad, encoder, decoder = (session(repository / file, threads) for file in ("vad/1/model.onnx", *_FILES[precision]))
    clip = [node.name for node in decoder.get_inputs() if node.name.startswith("CROSS_KV")]

    def step(token: Array, cross: Array, past: Array) -> tuple[Array, Array]:
        """In int8 each layer takes its keys and values by themselves, [1, H, S, D]: views of ``cross``."""
        parts = [cross] if len(clip) == 1 else cross.reshape(-1, 1, *cross.shape[3:])
        logits, present = decoder.run(None, {"TOKEN": token, "PAST_KV": past, **dict(zip(clip, parts, strict=True))})
        return logits, present

    networks = Networks(
        vad=lambda windows: vad.run(["SPEECH"], {"AUDIO": windows})[0],
        encoder=lambda audio: encoder.run(["CROSS_KV"], {"AUDIO": audio})[0],
        decoder=step,
    )
    networks.vad(np.zeros((1, WINDOW), np.float32))
    greedy(networks.decoder, networks.encoder(np.zeros((1, SAMPLE_RATE), np.float32)), cap=2)
    return networks


_FILES = {
    "fp32": ("asr_encoder/1/model.onnx", "asr_decoder/1/model.onnx"),
    "int8": ("asr/1/encoder.onnx", "asr/1/decoder.onnx"),
}
