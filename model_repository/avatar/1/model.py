"""An avatar's id -> the head of its deformation net."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from talksplat import avatar as bundle
from talksplat.cache import AvatarCache
from talksplat.triton import Door, Failures, asks_to_unload, avatar_ids, parameters, response

CACHE_BYTES = 64 << 20  # some 1700 heads


class TritonPythonModel:
    """See config.pbtxt."""

    def initialize(self, args: dict[str, str]) -> None:
        """Nothing is read before it is asked for."""
        self.failures = Failures("avatar")
        self.door = Door()
        self.heads = AvatarCache(
            Path(os.environ["TALKSPLAT_AVATARS"]),
            bundle.read_adapter,
            lambda head: sum(tensor.nbytes for tensor in head),
            CACHE_BYTES,
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request."""
        arrived = time.monotonic()
        return [self._look_up(request, arrived) for request in requests]

    def _look_up(self, request: Any, arrived: float) -> Any:
        try:
            asked, names = parameters(request), avatar_ids(request)
            caller = self.door.caller(asked)
            if asks_to_unload(request, asked):
                caller.require_alone(names)
                for avatar_id in names:
                    self.heads.drop(avatar_id)
                return response()
            caller.require(names)
            heads = [self._head(avatar_id) for avatar_id in names]
        except Exception as error:
            return self.failures.answer(request, error)
        adapter_in, adapter_out = (np.stack(tensors) for tensors in zip(*heads, strict=True))
        return response(
            ADAPTER_IN=adapter_in,
            ADAPTER_OUT=adapter_out,
            ARRIVED=np.full((len(heads), 1), arrived),
        )

    def _head(self, avatar_id: str) -> tuple[bundle.Float32, bundle.Float32]:
        with self.heads.use(avatar_id) as head:
            return head
