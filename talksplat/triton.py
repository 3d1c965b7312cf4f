"""What the Python models of the repository share; it can only be imported in a stub of Triton's Python backend."""

from __future__ import annotations

import json
from typing import Any

import triton_python_backend_utils as pb_utils

from talksplat.avatar import ProfileError, SpeechEncoderError, UnknownAvatarError
from talksplat.framing import RequestError


def array(request: Any, name: str) -> Any:
    """The input ``name`` as an array.

    Raises:
        RequestError: the request lacks it, which only an optional one can be.
    """
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        raise RequestError(f"{name} is missing.")
    return tensor.as_numpy()


def avatar_ids(request: Any) -> list[str]:
    """The input AVATAR [B, 1], whose bytes may be anything."""
    return [avatar_id.decode(errors="replace") for avatar_id in array(request, "AVATAR")[:, 0]]


def asks_to_unload(request: Any) -> bool:
    """Whether the rasterizer passes on that its avatars are to be forgotten.

    A request of an ensemble has more inputs than AVATAR; an operation in it is the rasterizer's to refuse.
    """
    parameters = json.loads(request.parameters() or "{}")
    return parameters.get("operation") == "unload" and len(request.inputs()) == 1


def response(**outputs: Any) -> Any:
    """A response with these arrays."""
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, output) for name, output in outputs.items()])


def failure(error: Exception) -> Any:
    """The response that tells a client about an error, in a sentence."""
    if isinstance(error, RequestError | ProfileError | SpeechEncoderError):
        code = pb_utils.TritonError.INVALID_ARG
    elif isinstance(error, UnknownAvatarError):
        code = pb_utils.TritonError.NOT_FOUND
    else:
        code = pb_utils.TritonError.INTERNAL
    message = str(error) or type(error).__name__
    return pb_utils.InferenceResponse(
        error=pb_utils.TritonError(f"{message[:1].upper()}{message[1:].rstrip('.')}.", code)
    )
