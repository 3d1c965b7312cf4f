"""An utterance -> the batch of windows that the steps of `animate` take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from talksplat import clock, framing


class TritonPythonModel:
    """See config.pbtxt."""

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request."""
        return [self._cut(request) for request in requests]

    def _cut(self, request: Any) -> Any:
        audio, avatar, first = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in ("AUDIO", "AVATAR", "FRAME_INDEX")
        )
        try:
            windows = framing.windows(audio)
        except ValueError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        count = len(windows)
        indices = first + clock.CHUNK_FRAMES * np.arange(count, dtype=np.int64)
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("WINDOWS", windows),
                pb_utils.Tensor("AVATARS", np.repeat(avatar[None], count, axis=0)),
                pb_utils.Tensor("FRAME_INDICES", indices[:, None]),
            ]
        )
