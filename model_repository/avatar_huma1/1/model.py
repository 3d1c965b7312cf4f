"""An avatar's id -> the baked features of its Gaussians and its deformation net."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from talksplat import avatar as bundle
from talksplat import triplanes
from talksplat.cache import AvatarCache
from talksplat.triton import Door, Failures, asks_to_unload, avatar_ids, parameters, response

CACHE_BYTES = 256 << 20  # some 90 avatars

Tensors = dict[str, bundle.Float32]


class TritonPythonModel:
    """See config.pbtxt."""

    def initialize(self, args: dict[str, str]) -> None:
        """Nothing is read before it is asked for."""
        self.failures = Failures("avatar_huma1")
        self.door = Door()
        self.encoder = json.loads(args["model_config"])["parameters"]["speech_encoder"]["string_value"]
        self.nets = AvatarCache(
            Path(os.environ["TALKSPLAT_AVATARS"]),
            self._load,
            lambda tensors: sum(tensor.nbytes for tensor in tensors.values()),
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
                    self.nets.drop(avatar_id)
                return response()
            caller.require(names)
            nets = [self._net(avatar_id) for avatar_id in names]
            tensors = {name: np.stack([net[name] for net in nets]) for name in nets[0]}
            return response(**tensors, ARRIVED=np.full((len(nets), 1), arrived))
        except Exception as error:
            return self.failures.answer(request, error)

    def _net(self, avatar_id: str) -> Tensors:
        with self.nets.use(avatar_id) as net:
            return net

    def _load(self, root: Path, avatar_id: str) -> Tensors:
        avatar = bundle.read(root, avatar_id, bundle.Huma1Avatar)
        avatar.require_encoder(self.encoder)
        return {
            "TABLE": triplanes.bake(avatar),
            **{name.upper(): tensor for name, tensor in avatar.deformation.items()},
        }
