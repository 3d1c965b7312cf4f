"""Every graph that can be exported: its tensors, the sizes that may change, its precisions, and what they may cost.

The one place that says so: exporters, precisions, the ahead-of-time gate, plans and derived repositories read it.
Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from talksplat import avatar as bundle
from talksplat import clock, framing, speaking
from talksplat.asr import MIN_SAMPLES, SPARE_TOKENS, TOKENS_PER_SECOND

Precision: TypeAlias = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

BATCH = "batch"  # the name of dim 0 of every tensor


@dataclass(frozen=True)
class Tensor:
    """An input or output of a graph, dim 0 left out: that is the batch, everywhere."""

    name: str
    dims: tuple[int | str, ...]  # a name stands for a size that may change
    dtype: Literal["float32", "int64"] = "float32"


@dataclass(frozen=True)
class Range:
    """The sizes that a dim may have, as TensorRT's profiles want them."""

    least: int
    usual: int  # that is optimised for
    most: int


@dataclass(frozen=True)
class Tolerance:
    """How far a graph may be from the module in PyTorch, on real speech."""

    difference: float = math.inf  # the largest, as a share of the output's largest magnitude
    correlation: float = 0.0  # Pearson's, over all values of an output


@dataclass(frozen=True)
class Graph:
    """One ONNX file, and the model of that name in the model repository."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    ranges: Mapping[str, Range]  # of `BATCH` and of every other named dim of an input
    tolerances: Mapping[Precision, Tolerance]  # the precisions that it is offered in
    # By precision, how the names of weights begin that stay in fp32; see `precision.kept` for what does with them.
    keep: Mapping[Precision, tuple[str, ...]] = field(default_factory=dict)

    def profile(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """By input: its least, usual and largest shape."""
        return {
            tensor.name: (self._shape(tensor, "least"), self._shape(tensor, "usual"), self._shape(tensor, "most"))
            for tensor in self.inputs
        }

    def _shape(self, tensor: Tensor, end: Literal["least", "usual", "most"]) -> tuple[int, ...]:
        dims: tuple[int | str, ...] = (BATCH, *tensor.dims)
        return tuple(dim if isinstance(dim, int) else int(getattr(self.ranges[dim], end)) for dim in dims)


def graph(name: str) -> Graph:
    """One of `GRAPHS`; KeyError where there is none."""
    return {each.name: each for each in GRAPHS}[name]


def _clip_frames(samples: int) -> int:
    """Of Moonshine's encoder: unpadded convolutions of widths 127, 7 and 3, strides 64, 3 and 2."""
    for width, stride in ((127, 64), (7, 3), (3, 2)):
        samples = (samples - width) // stride + 1
    return samples


_LAYERS, _HEADS, _CHANNELS = 8, 8, 52  # of Moonshine base, whose dims the committed configs have
_CACHE = (2, _LAYERS, _HEADS)  # keys and values, layer, head
_MOST_TOKENS = int(clock.MAX_UTTERANCE_SECONDS * TOKENS_PER_SECOND) + SPARE_TOKENS

_WINDOWS = Range(1, 4, 192)  # as the configs' max_batch_size: an utterance of 30 s is 188
_CLIPS = Range(1, 1, 8)
_FEW = Range(1, 1, 4)  # of Huma 1, whose chunks are large
_SAMPLES = Range(MIN_SAMPLES, 5 * clock.SAMPLE_RATE, framing.MAX_SAMPLES)
_FRAMES = Range(*(_clip_frames(size) for size in (_SAMPLES.least, _SAMPLES.usual, _SAMPLES.most)))

_PHONEMES = Range(5, 100, speaking.MAX_TOKENS)
_VOICED = Range(5, 200, speaking.MAX_FRAMES)
_PIECE = Range(2 * speaking.CONTEXT + 1, 60, 250)

_EXACT = Tolerance(difference=1e-4)
_HALF = Tolerance(difference=5e-3)
_QUANTISED = Tolerance(correlation=0.99)

GRAPHS: tuple[Graph, ...] = (
    Graph(
        "vad",
        (Tensor("AUDIO", (clock.WINDOW,)),),
        (Tensor("SPEECH", (clock.CHUNK_FRAMES,)), Tensor("LATEST", (clock.CHUNK_FRAMES,))),
        {BATCH: _WINDOWS},
        {"fp32": _EXACT, "fp16": _HALF, "int8": _QUANTISED},
        # With every product in int8 the correlation is 0.79, and 0.990 with the first layer, which sees magnitudes.
        {"int8": ("spectrum", "encoder.0")},
    ),
    Graph(
        "audio_encoder",
        (Tensor("AUDIO", (clock.WINDOW,)),),
        (Tensor("FEATURES", (clock.CHUNK_FRAMES, bundle.FEATURES)), Tensor("WINDOW", (clock.WINDOW,))),
        {BATCH: _WINDOWS},
        {"fp32": _EXACT, "fp16": _HALF, "int8": _QUANTISED},
        # The log-mel's powers span ten decades: in fp16 it differs by 8 %.
        dict.fromkeys(("fp16", "int8"), ("encoder.mel_power", "encoder.level")),
    ),
    Graph(
        "deformation",
        (
            Tensor("FEATURES", (clock.CHUNK_FRAMES, bundle.FEATURES)),
            Tensor("ADAPTER_IN", (bundle.FEATURES + 1, bundle.HIDDEN)),
            Tensor("ADAPTER_OUT", (bundle.HIDDEN + 1, bundle.COEFFICIENTS)),
        ),
        (Tensor("COEFFICIENTS", (clock.CHUNK_FRAMES, bundle.COEFFICIENTS)),),
        {BATCH: _WINDOWS},
        {"fp32": _EXACT, "fp16": _HALF},  # its weights are inputs: there is nothing to quantise ahead of time
    ),
    Graph(
        "deformation_huma1",
        (
            Tensor("HIDDEN", (bundle.WINDOW_TOKENS, bundle.SPEECH_WIDTH)),
            Tensor("TABLE", (bundle.HUMA1_FEATURES, "gaussians")),
            *(Tensor(name.upper(), shape) for name, shape in bundle.HUMA1_WEIGHTS.items()),
        ),
        (Tensor("OFFSETS", (clock.CHUNK_FRAMES, bundle.ATTRIBUTES, "gaussians")),),
        {BATCH: _FEW, "gaussians": Range(1, 6_000, 20_000)},
        {"fp32": _EXACT, "fp16": _HALF},
    ),
    Graph(
        "asr_encoder",
        (Tensor("AUDIO", ("samples",)),),
        (
            Tensor("CROSS_KV", (*_CACHE, "frames", _CHANNELS)),
            Tensor("HIDDEN", ("frames", bundle.SPEECH_WIDTH)),
            Tensor("WINDOW", ("samples",)),
        ),
        {BATCH: _CLIPS, "samples": _SAMPLES},
        # No int8: CROSS_KV correlates by 0.67, by 0.983 with its convolutions in fp32, by 0.989 with its MLPs, too.
        {"fp32": _EXACT, "fp16": _HALF},
    ),
    Graph(
        "asr_decoder",
        (
            Tensor("TOKEN", (1,), "int64"),
            Tensor("CROSS_KV", (*_CACHE, "frames", _CHANNELS)),
            Tensor("PAST_KV", (*_CACHE, "past", _CHANNELS)),
        ),
        (Tensor("LOGITS", (32_768,)), Tensor("PRESENT_KV", (*_CACHE, "present", _CHANNELS))),
        {BATCH: _CLIPS, "frames": _FRAMES, "past": Range(0, 20, _MOST_TOKENS)},
        {"fp32": _EXACT, "fp16": _HALF, "int8": _QUANTISED},
    ),
    Graph(
        "tts_encoder",
        (Tensor("TOKENS", ("tokens",), "int64"), Tensor("NOISE", (2, "tokens"))),
        (
            Tensor("MEANS", (speaking.CHANNELS, "tokens")),
            Tensor("DEVIATIONS", (speaking.CHANNELS, "tokens")),
            Tensor("DURATIONS", ("tokens",)),
        ),
        {BATCH: _FEW, "tokens": _PHONEMES},
        {"fp32": _EXACT, "fp16": _HALF},
    ),
    Graph(
        "tts_flow",
        (Tensor("PRIOR", (speaking.CHANNELS, "frames")),),
        (Tensor("LATENT", (speaking.CHANNELS, "frames")),),
        {BATCH: _FEW, "frames": _VOICED},
        {"fp32": _EXACT, "fp16": _HALF},
    ),
    Graph(
        "tts_decoder",
        (Tensor("LATENT", (speaking.CHANNELS, "frames")),),
        (Tensor("AUDIO", ("samples",)),),
        {BATCH: _FEW, "frames": _PIECE},
        {"fp32": _EXACT, "fp16": _HALF},
    ),
)
