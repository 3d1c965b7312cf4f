"""Coefficients -> frames; the work is done in `talksplat.animator`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from talksplat.animator import Animator, Chunk, Options
from talksplat.framing import RequestError
from talksplat.triton import array, avatar_ids, failure, response


class TritonPythonModel:
    """See config.pbtxt."""

    def initialize(self, args: dict[str, str]) -> None:
        """Start the threads; avatars are read when they are asked for."""
        parameters = json.loads(args["model_config"])["parameters"]
        avatar_bytes, plate_bytes = (
            int(parameters[name]["string_value"]) << 20 for name in ("avatar_megabytes", "plate_megabytes")
        )
        root = Path(os.environ["TALKSPLAT_AVATARS"])
        self.animator = Animator(root, avatar_bytes=avatar_bytes, plate_bytes=plate_bytes)
        self.operations: dict[str, Callable[[str], dict[str, Any]]] = {
            "preload": self.animator.preload,
            "unload": self.animator.unload,
            "list": lambda _: self.animator.catalogue(),
        }

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request; the chunks of all of them are rendered together."""
        responses: list[Any] = [None] * len(requests)
        chunks: list[Chunk] = []
        spans: dict[int, slice] = {}  # of a request's chunks
        for number, request in enumerate(requests):
            try:
                parameters = json.loads(request.parameters() or "{}")
                if "operation" in parameters:
                    responses[number] = self._operate(request, parameters["operation"])
                else:
                    own = _chunks(request, Options.parse(parameters))
                    spans[number] = slice(len(chunks), len(chunks) + len(own))
                    chunks += own
            except Exception as error:
                responses[number] = failure(error)
        frames = self.animator.render(chunks)
        for number, span in spans.items():
            errors = [each for each in frames[span] if isinstance(each, Exception)]
            responses[number] = failure(errors[0]) if errors else response(FRAMES=np.array(frames[span], np.object_))
        return responses

    def _operate(self, request: Any, name: object) -> Any:
        if name not in self.operations:
            raise RequestError(f"The parameter operation is {name!r}, expected one of {', '.join(self.operations)}.")
        if len(request.inputs()) > 1:  # who may animate may not do this by the way
            raise RequestError("An operation takes AVATAR alone: ask the model rasterizer for it.")
        operation = self.operations[str(name)]
        reports = [[json.dumps(operation(avatar_id)).encode()] for avatar_id in avatar_ids(request)]
        return response(REPORT=np.array(reports, np.object_))


def _chunks(request: Any, options: Options) -> list[Chunk]:
    rows = zip(
        avatar_ids(request),
        array(request, "COEFFICIENTS"),
        array(request, "SPEECH"),
        array(request, "FRAME_INDEX")[:, 0],
        strict=True,
    )
    return [
        Chunk(avatar_id, coefficients, speech, int(index), options) for avatar_id, coefficients, speech, index in rows
    ]
