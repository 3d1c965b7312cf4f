"""From audio features to the avatar's coefficients, by what is personal: two small matrices that travel as tensors.

They are inputs and not weights, so requests for different avatars share a batch.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from talksplat.avatar import COEFFICIENTS, FEATURES, HIDDEN
from talksplat.clock import CHUNK_FRAMES

from . import _onnx

TOLERANCE = 5e-5


class Deformation(nn.Module):
    """COEFFICIENTS [B, F, 20] = tanh(FEATURES · W1 + b1) · W2 + b2; the last row of an adapter matrix is its bias."""

    def forward(
        self,
        features: Tensor,  # [B, F, 128]
        adapter_in: Tensor,  # [B, 129, 64]
        adapter_out: Tensor,  # [B, 65, 20]
    ) -> Tensor:
        """Batched products: row b of every input belongs together."""
        hidden = torch.tanh(torch.matmul(features, adapter_in[:, :-1]) + adapter_in[:, -1:])
        return torch.matmul(hidden, adapter_out[:, :-1]) + adapter_out[:, -1:]


def export(repository: Path) -> None:
    """Write ``deformation/1/model.onnx`` into a model repository and check it against torch.

    Raises:
        ExportError: the graph is not as promised, or computes something else.
    """
    generator = torch.Generator().manual_seed(0)

    def example(batch: int) -> dict[str, Tensor]:
        return {
            "FEATURES": torch.randn(batch, CHUNK_FRAMES, FEATURES, generator=generator),
            "ADAPTER_IN": 0.1 * torch.randn(batch, FEATURES + 1, HIDDEN, generator=generator),
            "ADAPTER_OUT": torch.randn(batch, HIDDEN + 1, COEFFICIENTS, generator=generator),
        }

    module, path = Deformation(), repository / "deformation" / "1" / "model.onnx"
    inputs, free = example(2), {0: "batch"}
    _onnx.export(module, path, inputs, ["COEFFICIENTS"], dict.fromkeys([*inputs, "COEFFICIENTS"], free))
    for batch in (1, 5):
        _onnx.parity(module, path, example(batch), TOLERANCE)
