"""From audio features to the avatar's coefficients, by what is personal: two small matrices that travel as tensors.

They are inputs and not weights, so requests for different avatars share a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .registry import Graph, graph


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


def graphs() -> list[tuple[Graph, nn.Module]]:
    """What is exported, and the module that computes it."""
    return [(graph("deformation"), Deformation())]
