"""An avatar's id -> the head of its deformation net."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from talksplat import avatar as bundle
from talksplat.cache import AvatarCache

CACHE_BYTES = 64 << 20  # some 1700 heads


class TritonPythonModel:
    """See config.pbtxt."""

    def initialize(self, args: dict[str, str]) -> None:
        """Nothing is read before it is asked for."""
        self.heads = AvatarCache(
            Path(os.environ["TALKSPLAT_AVATARS"]),
            bundle.read_adapter,
            lambda head: sum(tensor.nbytes for tensor in head),
            CACHE_BYTES,
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request."""
        return [self._look_up(request) for request in requests]

    def _look_up(self, request: Any) -> Any:
        ids = pb_utils.get_input_tensor_by_name(request, "AVATAR").as_numpy()[:, 0]
        try:
            heads = [self._head(avatar_id.decode(errors="replace")) for avatar_id in ids]
        except bundle.UnknownAvatarError as error:
            return _error(error, pb_utils.TritonError.NOT_FOUND)
        except bundle.BundleError as error:
            return _error(error, pb_utils.TritonError.INTERNAL)
        adapter_in, adapter_out = (np.stack(tensors) for tensors in zip(*heads, strict=True))
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor("ADAPTER_IN", adapter_in), pb_utils.Tensor("ADAPTER_OUT", adapter_out)]
        )

    def _head(self, avatar_id: str) -> tuple[bundle.Float32, bundle.Float32]:
        with self.heads.use(avatar_id) as head:
            return head


def _error(error: Exception, code: int) -> Any:
    message = f"{error.args[0][:1].upper()}{error.args[0][1:]}."
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
