"""Coefficients -> frames; the work is done in `talksplat.animator`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from talksplat.animator import Animator, Chunk, Options, RequestError
from talksplat.avatar import UnknownAvatarError


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
        self.operations = {
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
                responses[number] = _error(error)
        frames = self.animator.render(chunks)
        for number, span in spans.items():
            errors = [each for each in frames[span] if isinstance(each, Exception)]
            responses[number] = _error(errors[0]) if errors else _response("FRAMES", frames[span])
        return responses

    def _operate(self, request: Any, name: object) -> Any:
        if name not in self.operations:
            raise RequestError(f"The parameter operation is {name!r}, expected one of {', '.join(self.operations)}.")
        (avatar_id,) = _avatar_ids(request)[:1]
        return _response("REPORT", [[json.dumps(self.operations[str(name)](avatar_id)).encode()]])


def _chunks(request: Any, options: Options) -> list[Chunk]:
    tensors = [pb_utils.get_input_tensor_by_name(request, name) for name in ("COEFFICIENTS", "SPEECH", "FRAME_INDEX")]
    if None in tensors:
        raise RequestError("COEFFICIENTS, SPEECH and FRAME_INDEX are needed, except for operations.")
    coefficients, speech, indices = (tensor.as_numpy() for tensor in tensors)
    return [
        Chunk(avatar_id, *tensors, int(index), options)
        for avatar_id, *tensors, index in zip(_avatar_ids(request), coefficients, speech, indices[:, 0], strict=True)
    ]


def _avatar_ids(request: Any) -> list[str]:
    ids = pb_utils.get_input_tensor_by_name(request, "AVATAR").as_numpy()[:, 0]
    return [avatar_id.decode(errors="replace") for avatar_id in ids]


def _response(name: str, rows: Sequence[Sequence[bytes]]) -> Any:
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, np.array(rows, np.object_))])


def _error(error: Exception) -> Any:
    if isinstance(error, RequestError):
        code, message = pb_utils.TritonError.INVALID_ARG, str(error)
    elif isinstance(error, UnknownAvatarError):
        code, message = pb_utils.TritonError.NOT_FOUND, str(error)
    else:
        code, message = pb_utils.TritonError.INTERNAL, str(error)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
