"""Batches of real speech for every graph: what precisions are calibrated on and what every check runs.

They come out of a recording (`demo/speech.wav`, where none is given), the avatar ava and the fp32 graphs of a model
repository, by NumPy and ONNX Runtime alone.
"""

from __future__ import annotations

import itertools
import json
import math
import wave
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from talksplat import avatar, clock, framing, speaking
from talksplat.asr import BOS
from talksplat.server import ROOT

from . import registry

Feed: TypeAlias = dict[str, npt.NDArray[Any]]  # an input's name -> its array, dim 0 the batch

REPOSITORY = ROOT / "model_repository"
SPEECH = ROOT / "demo" / "speech.wav"

WINDOW_BATCHES = (1, 4, 13)  # windows a batch, in turns
CLIPS = ((1, 0.25), (1, 1.0), (2, 1.6), (1, 4.0), (3, 0.92))  # clips of one length a batch, and their seconds
DECODED = 3  # of these clips are decoded
STEPS = (0, 1, 2, 4, 7, 12)  # of the decoder, that become feeds
SENTENCES = (1, 2, 1)  # a batch, in turns
PIECES = (26, 1, 60, 40)  # frames of speech a batch, in turns
GAUSSIANS = (1, 300, 5_000)  # of a Huma 1, in turns


class FeedsError(RuntimeError):
    """What the feeds are made from is missing, or too short."""


def speech(path: Path = SPEECH) -> npt.NDArray[np.float32]:
    """A recording, [T] 16 kHz mono.

    Raises:
        FeedsError: it is missing, or not 16-bit PCM of that kind.
    """
    try:
        with wave.open(str(path)) as file:
            if (file.getnchannels(), file.getframerate(), file.getsampwidth()) != (1, clock.SAMPLE_RATE, 2):
                raise FeedsError(f"{path} is not 16-bit mono at {clock.SAMPLE_RATE} Hz.")
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    except (OSError, wave.Error, EOFError) as error:
        raise FeedsError(f"{path} can't be read: {error}") from error
    return samples.astype(np.float32) / 2**15


def halves() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The first half of `demo/speech.wav`, to calibrate on, and the second one, to check with."""
    audio = speech()
    return audio[: len(audio) // 2], audio[len(audio) // 2 :]


def feeds(
    name: str,
    repository: Path = REPOSITORY,
    audio: npt.NDArray[np.float32] | None = None,  # [T] 16 kHz mono, from 5 s on
    own: Path | None = None,
) -> list[Feed]:
    """Batches for the graph ``name`` of several sizes and lengths, within its profile.

    Args:
        name: of `registry.GRAPHS`.
        repository: has the fp32 graphs whose outputs are this one's inputs.
        audio: what is said; default: `demo/speech.wav`.
        own: the fp32 graph itself, where it is not in the repository yet: the recogniser's decoder feeds itself.

    The tables and nets of Huma 1 are no real ones, since no such avatar is committed: they are drawn, with a seed.

    Raises:
        KeyError: there is no such graph.
        FeedsError: a graph or the recording is missing, or the recording is too short.
    """
    graph = registry.graph(name)
    audio = speech() if audio is None else audio
    makers: dict[str, Callable[[npt.NDArray[np.float32], Path], Iterator[Feed]]] = {
        "vad": _windows,
        "audio_encoder": _windows,
        "deformation": _features,
        "deformation_huma1": _heard,
        "asr_encoder": _clips,
        "asr_decoder": partial(_steps, own=own),
        "tts_encoder": _phonemes,
        "tts_flow": _drawn,
        "tts_decoder": _spoken,
    }
    made = makers[name](audio, repository)
    names = [tensor.name for tensor in graph.inputs]
    return [{name: np.array(feed[name]) for name in names} for feed in made]  # copies: torch wants to be able to write


def session(path: Path, precision: registry.Precision = "fp32", threads: int = 1) -> ort.InferenceSession:
    """The file in ONNX Runtime on the CPU.

    Raises:
        FeedsError: there is no such file.
    """
    if not path.is_file():
        raise FeedsError(f"{path} is missing: run `talksplat-export models`.")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if precision == "fp16":  # with all of its optimisations ONNX Runtime 1.31 dies of a segmentation fault there
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _windows(audio: npt.NDArray[np.float32], _: Path) -> Iterator[Feed]:
    windows = framing.windows(audio)
    sizes = itertools.cycle(WINDOW_BATCHES)
    while len(windows):
        size = next(sizes)
        yield {"AUDIO": windows[:size]}
        windows = windows[size:]


def _features(audio: npt.NDArray[np.float32], repository: Path) -> Iterator[Feed]:
    encoder = _served(repository, "audio_encoder")
    adapter_in, adapter_out = avatar.read_adapter(ROOT / "avatars", "ava")
    for feed in _windows(audio, repository):
        (features,) = encoder.run(["FEATURES"], feed)
        size = len(features)
        yield {
            "FEATURES": features,
            "ADAPTER_IN": np.broadcast_to(adapter_in, (size, *adapter_in.shape)),
            "ADAPTER_OUT": np.broadcast_to(adapter_out, (size, *adapter_out.shape)),
        }


def _heard(audio: npt.NDArray[np.float32], repository: Path) -> Iterator[Feed]:
    encoder, draw = _served(repository, "asr_encoder"), np.random.default_rng(0)
    most = registry.graph("deformation_huma1").ranges[registry.BATCH].most

    def drawn(*shape: int) -> npt.NDArray[np.float32]:
        return draw.standard_normal(shape, np.float32)

    for number, windows in enumerate(_windows(audio[: 3 * clock.SAMPLE_RATE], repository)):
        (hidden,) = encoder.run(["HIDDEN"], {"AUDIO": windows["AUDIO"][:most]})
        feed = {"HIDDEN": hidden}
        feed["TABLE"] = drawn(len(hidden), avatar.HUMA1_FEATURES, GAUSSIANS[number % len(GAUSSIANS)])
        for name, shape in avatar.HUMA1_WEIGHTS.items():
            feed[name.upper()] = drawn(len(hidden), *shape) / math.sqrt(shape[0])
        yield feed


def _clips(audio: npt.NDArray[np.float32], _: Path) -> Iterator[Feed]:
    """Clips that begin all over the recording, whatever is said there."""
    for size, seconds in CLIPS:
        samples = round(seconds * clock.SAMPLE_RATE)
        if samples > len(audio):
            raise FeedsError(f"{len(audio)} samples are too few: {samples} are needed.")
        starts = np.linspace(0, len(audio) - samples, size + 2).astype(int)[1:-1]
        yield {"AUDIO": np.stack([audio[start : start + samples] for start in starts])}


def _steps(audio: npt.NDArray[np.float32], repository: Path, own: Path | None) -> Iterator[Feed]:
    """Of a greedy run over each batch of clips; a row that has ended goes on, as in any batch."""
    encoder = _served(repository, "asr_encoder")
    decoder = _served(repository, "asr_decoder") if own is None else session(own)
    for clip in itertools.islice(_clips(audio, repository), DECODED):
        (cross,) = encoder.run(["CROSS_KV"], clip)
        token, past = np.full((len(cross), 1), BOS), np.zeros_like(cross[..., :0, :])
        for step in range(max(STEPS) + 1):
            feed = {"TOKEN": token, "CROSS_KV": cross, "PAST_KV": past}
            if step in STEPS:
                yield feed
            logits, past = decoder.run(None, feed)
            token = logits.argmax(axis=-1, keepdims=True)


def _phonemes(_: npt.NDArray[np.float32], repository: Path) -> Iterator[Feed]:
    """Of the prepared replies, in batches of one length."""
    symbols, replies = (
        json.loads((REPOSITORY / "tts" / "1" / name).read_text(encoding="utf-8"))
        for name in ("symbols.json", "replies.json")
    )
    draw = np.random.default_rng(0)
    for number, ipa in enumerate(replies.values()):
        tokens = np.array([speaking.tokens(ipa, symbols)])
        tokens = np.repeat(tokens, SENTENCES[number % len(SENTENCES)], axis=0)
        yield {"TOKENS": tokens, "NOISE": draw.standard_normal((len(tokens), 2, tokens.shape[1]), np.float32)}


def _drawn(audio: npt.NDArray[np.float32], repository: Path) -> Iterator[Feed]:
    encoder, draw = _served(repository, "tts_encoder"), np.random.default_rng(0)
    for feed in _phonemes(audio, repository):
        means, deviations, durations = encoder.run(["MEANS", "DEVIATIONS", "DURATIONS"], feed)
        frames = np.ceil(durations[0]).astype(int)
        means, deviations = (np.repeat(each, frames, axis=2) for each in (means, deviations))
        yield {"PRIOR": means + deviations * draw.standard_normal(means.shape, np.float32)}


def _spoken(audio: npt.NDArray[np.float32], repository: Path) -> Iterator[Feed]:
    """The beginnings of sentences, silence before them."""
    flow = _served(repository, "tts_flow")
    for number, feed in enumerate(_drawn(audio, repository)):
        (latent,) = flow.run(["LATENT"], feed)
        latent = np.pad(latent, ((0, 0), (0, 0), (speaking.CONTEXT, 0)))
        yield {"LATENT": latent[..., : PIECES[number % len(PIECES)] + 2 * speaking.CONTEXT]}


def _served(repository: Path, name: str) -> ort.InferenceSession:
    return session(repository / name / "1" / "model.onnx")
