"""Huma 1's deformation net: from speech to what each Gaussian does, by cross-attention.

The two-step pipeline of GaussianTalker (https://arxiv.org/abs/2404.16012) and TalkingGaussian
(https://arxiv.org/abs/2404.15264): canonical Gaussians, each with features out of triplanes, look at tokens of speech
around the frame and answer with offsets of all their attributes. Speech is what the recogniser's encoder (Moonshine
base) hears in the window that `animate_huma1` gets.

The attention is laid out so that as little as possible is done per Gaussian and frame: queries are made once a chunk,
values are as wide as the answer (so nothing is projected after the attention), and Gaussians run along the last dim
from the table to the offsets, so nothing is transposed. A net is personal, 49,294 weights that travel as tensors: one
graph serves all avatars.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talksplat import clock
from talksplat.avatar import (
    HEADS,
    HUMA1_FEATURES,
    HUMA1_WEIGHTS,
    KEY,
    SPEECH_TOKENS,
    SPEECH_WIDTH,
    VALUE,
    WINDOW_TOKENS,
)
from talksplat.triplanes import AXES

from .registry import Graph, graph

# Moonshine's convolutions: a token of 384 samples' stride, whose centre lies 447 samples after the first one's start.
TOKEN_STRIDE = 64 * 3 * 2
TOKEN_CENTRE = 63 + 64 * 3 + 64 * 3


def sample(
    planes: Tensor,  # [3, C, S, S]
    places: Tensor,  # [N, 3], the box is -1..1
) -> Tensor:  # [C, N]
    """`talksplat.triplanes.sample`, with gradients."""
    grids = torch.stack([places[:, list(axes)] for axes in AXES])[:, None]  # [3, 1, N, 2]
    found = F.grid_sample(planes, grids, mode="bilinear", padding_mode="border", align_corners=True)
    return found[:, :, 0].prod(dim=0)


def token_mixture() -> Tensor:  # [CHUNK_FRAMES * SPEECH_TOKENS, WINDOW_TOKENS]
    """What takes a window's tokens to those around each of its frames, at the same places relative to the frame.

    A frame is 1 2/3 tokens long, so its tokens are interpolated linearly between the window's.
    """
    frames = clock.LEFT_CONTEXT + np.arange(clock.CHUNK_FRAMES) * clock.SAMPLES_PER_FRAME
    around = (np.arange(SPEECH_TOKENS) - (SPEECH_TOKENS - 1) / 2) * TOKEN_STRIDE
    place = ((frames[:, None] + around - TOKEN_CENTRE).reshape(-1, 1) / TOKEN_STRIDE).clip(0, WINDOW_TOKENS - 1)
    return torch.tensor(np.maximum(1 - np.abs(place - np.arange(WINDOW_TOKENS)), 0), dtype=torch.float32)


def offsets(
    speech: Tensor,  # [B, F, SPEECH_TOKENS, W] tokens around each frame
    table: Tensor,  # [B, 32, N] features of the Gaussians
    weights: Mapping[str, Tensor],  # [B, ...] of each name in HUMA1_WEIGHTS
) -> Tensor:  # [B, F, 14, N]
    """What every Gaussian adds to its attributes in every frame."""
    speech_in, positions = weights["speech_in"][:, None], weights["positions"][:, None]
    heard = torch.relu(speech @ speech_in[:, :, :-1] + speech_in[:, :, -1:] + positions[:, :, :-1])
    nothing = positions[:, :, -1:].expand(-1, heard.shape[1], -1, -1)
    keys_values = _affine(torch.cat([heard, nothing], dim=2), weights["keys_values"][:, None])  # [B, F, T, H (K + V)]
    keys = split(keys_values[..., : HEADS * KEY], -1, HEADS).transpose(2, 3)  # [B, F, H, T, K]
    values = split(keys_values[..., HEADS * KEY :], -1, HEADS)  # [B, F, T, H, V]
    values = values.permute(0, 1, 4, 3, 2).flatten(3)  # [B, F, V, H T]

    query_base = _affine_planar(weights["query_base"], table)  # [B, H K + V, N]
    queries = split(query_base[:, : HEADS * KEY], 1, HEADS)[:, None]  # [B, 1, H, K, N]
    attention = torch.softmax((keys / math.sqrt(KEY)) @ queries, dim=3).flatten(2, 3)  # [B, F, H T, N]
    answer = torch.relu(values @ attention + query_base[:, None, HEADS * KEY :])  # [B, F, V, N]
    mixed = torch.relu(_affine_planar(weights["mixing"][:, None], answer))
    return _affine_planar(weights["offsets_out"][:, None], mixed)


def split(x: Tensor, dim: int, parts: int) -> Tensor:
    """Cut dim ``dim`` into ``parts`` equal ones, a dim of its own."""
    y: Tensor = x.unflatten(dim, (parts, -1))  # type: ignore[no-untyped-call]
    return y


def _affine(x: Tensor, matrix: Tensor) -> Tensor:  # [..., T, I], [..., I + 1, O] -> [..., T, O]
    return x @ matrix[..., :-1, :] + matrix[..., -1:, :]


def _affine_planar(matrix: Tensor, x: Tensor) -> Tensor:  # [..., I + 1, O], [..., I, N] -> [..., O, N]
    return matrix[..., :-1, :].mT @ x + matrix[..., -1:, :].mT


class DeformationHuma1(nn.Module):
    """`HIDDEN` [B, S, W], `TABLE` [B, 32, N], a net's weights -> `OFFSETS` [B, 4, 14, N], before the voice's gate."""

    mixture: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mixture", token_mixture(), persistent=False)

    def forward(
        self,
        hidden: Tensor,
        table: Tensor,
        speech_in: Tensor,
        positions: Tensor,
        keys_values: Tensor,
        query_base: Tensor,
        mixing: Tensor,
        offsets_out: Tensor,
    ) -> Tensor:
        """Row b of every input belongs together."""
        speech = split(self.mixture @ hidden, 1, clock.CHUNK_FRAMES)
        weights = (speech_in, positions, keys_values, query_base, mixing, offsets_out)
        return offsets(speech, table, dict(zip(HUMA1_WEIGHTS, weights, strict=True)))


def multiply_adds(gaussians: int) -> dict[str, int]:
    """Of the deformation net, for one frame, by part."""
    tokens = SPEECH_TOKENS + 1
    speech = SPEECH_TOKENS * (WINDOW_TOKENS * SPEECH_WIDTH + SPEECH_WIDTH * VALUE) + tokens * VALUE * HEADS * (
        KEY + VALUE
    )
    queries = HUMA1_FEATURES * (HEADS * KEY + VALUE) / clock.CHUNK_FRAMES
    attention = HEADS * tokens * (KEY + VALUE)
    answer = VALUE * VALUE + VALUE * HUMA1_WEIGHTS["offsets_out"][1]
    return {"speech": speech, "gaussians": round(gaussians * (queries + attention + answer))}


def graphs() -> list[tuple[Graph, nn.Module]]:
    """What is exported, and the module that computes it."""
    return [(graph("deformation_huma1"), DeformationHuma1())]
