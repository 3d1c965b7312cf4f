"""Coefficients or offsets -> frames; the work is done in `talksplat.animator`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from talksplat.animator import Animator, Chunk, Options
from talksplat.avatar import HUMA1_WEIGHTS, SPEECH_WIDTH, WINDOW_TOKENS, BundleError, Huma1Avatar
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
            "preload": self._preload,
            "unload": self._unload,
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

    def _preload(self, avatar_id: str) -> dict[str, Any]:
        report = self.animator.preload(avatar_id)
        if report["profile"] == Huma1Avatar.profile and not report["cached"]:
            began = time.perf_counter()
            try:
                _warm_up_huma1(avatar_id)
            except Exception:
                self.animator.unload(avatar_id)  # it can't be animated
                raise
            report["milliseconds"] += round(1e3 * (time.perf_counter() - began), 2)
        return report

    def _unload(self, avatar_id: str) -> dict[str, Any]:
        report = self.animator.unload(avatar_id)
        for model in ("avatar", "avatar_huma1"):
            _ask(model, [_name(avatar_id)], [], {"operation": "unload"})
        return report


def _warm_up_huma1(avatar_id: str) -> None:
    """Have the other processes of the profile bake the avatar's table and run the net once."""
    baked = _ask("avatar_huma1", [_name(avatar_id)], ["TABLE", *(weights.upper() for weights in HUMA1_WEIGHTS)])
    silence = pb_utils.Tensor("HIDDEN", np.zeros((1, WINDOW_TOKENS, SPEECH_WIDTH), np.float32))
    _ask("deformation_huma1", [silence, *baked], ["OFFSETS"])


def _name(avatar_id: str) -> Any:
    return pb_utils.Tensor("AVATAR", np.array([[avatar_id.encode()]], np.object_))


def _ask(model: str, inputs: list[Any], outputs: list[str], parameters: dict[str, str] | None = None) -> list[Any]:
    """The outputs of another model; raises BundleError for an error, whose code does not come along."""
    request = pb_utils.InferenceRequest(
        model_name=model, inputs=inputs, requested_output_names=outputs, parameters=parameters or {}
    )
    answer = request.exec()
    if answer.has_error():
        raise BundleError(answer.error().message())
    return list(answer.output_tensors())


def _chunks(request: Any, options: Options) -> list[Chunk]:
    has_offsets = pb_utils.get_input_tensor_by_name(request, "OFFSETS") is not None
    rows = zip(
        avatar_ids(request),
        array(request, "OFFSETS" if has_offsets else "COEFFICIENTS"),
        array(request, "SPEECH"),
        array(request, "FRAME_INDEX")[:, 0],
        strict=True,
    )
    return [Chunk(avatar_id, motion, speech, int(index), options) for avatar_id, motion, speech, index in rows]
