"""An utterance -> the batch of windows that `animate` takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from talksplat import clock, framing
from talksplat.triton import Failures, array, handed_on, response


class TritonPythonModel:
    """See config.pbtxt."""

    def initialize(self, args: dict[str, str]) -> None:
        """Nothing is loaded."""
        self.failures = Failures("framing")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request."""
        return [self._cut(request) for request in requests]

    def _cut(self, request: Any) -> Any:
        try:
            windows = framing.windows(array(request, "AUDIO"))
            count = len(windows)
            indices = array(request, "FRAME_INDEX") + clock.CHUNK_FRAMES * np.arange(count, dtype=np.int64)
            avatars = np.repeat(array(request, "AVATAR")[None], count, axis=0)
        except Exception as error:
            return self.failures.answer(request, error)
        return response(WINDOWS=windows, AVATARS=avatars, FRAME_INDICES=indices[:, None], **handed_on(request, "TEXT"))
