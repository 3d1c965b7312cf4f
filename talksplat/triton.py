"""What the Python models of the repository share; it can only be imported in a stub of Triton's Python backend."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import triton_python_backend_utils as pb_utils

from talksplat import log, tenants
from talksplat.avatar import unknown
from talksplat.framing import RequestError
from talksplat.log import Fields
from talksplat.metrics import Page, reason
from talksplat.tenants import Tenants, TenantsFile

_log = logging.getLogger(__name__)


def array(request: Any, name: str) -> Any:
    """The input ``name`` as an array, which is gone when the request is answered.

    Raises:
        RequestError: the request lacks it, which only an optional one can be.
    """
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        raise RequestError(f"{name} is missing.")
    return tensor.as_numpy()


def handed_on(request: Any, name: str) -> dict[str, Any]:
    """The input ``name`` as an output, where the request has it; see `animate/config.pbtxt`."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return {} if tensor is None else {name: tensor.as_numpy()}


def avatar_ids(request: Any) -> list[str]:
    """The input AVATAR [B, 1], whose bytes may be anything."""
    return [avatar_id.decode(errors="replace") for avatar_id in array(request, "AVATAR")[:, 0]]


def parameters(request: Any) -> dict[str, Any]:
    """The request's parameters, the headers that Triton forwards among them, by name in lower case.

    Raises:
        RequestError: a name stands twice: a client has sent a parameter with the name of a header that the edge sets.
    """
    return dict(json.loads(request.parameters() or "{}", object_pairs_hook=_without_doubles))


def _without_doubles(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    named = {name.lower(): value for name, value in pairs}
    if len(named) < len(pairs):
        raise RequestError("A parameter stands twice in the request, or is a header too.")
    return named


@dataclass(frozen=True)
class Caller:
    """Who asks: a tenant, or without tenants somebody who may do everything."""

    tenant: str  # its name; "" without tenants, and for the server's own canary
    forwarded: Mapping[str, str]  # parameters with which other models are asked on its behalf
    _name: str
    _tenants: Tenants | None

    def may_use(self, avatar_id: str) -> bool:
        """Whether an avatar of this id is the caller's, should there be one."""
        return self._tenants is None or self._tenants.may_use(self._name, avatar_id)

    def require(self, avatar_ids: Sequence[str]) -> None:
        """Raise UnknownAvatarError, as for one that is not there, if an avatar is not the caller's."""
        for avatar_id in avatar_ids:
            if not self.may_use(avatar_id):
                raise unknown(avatar_id)

    def require_alone(self, avatar_ids: Sequence[str]) -> None:
        """As `require`; raise RequestError if an avatar is another tenant's too."""
        self.require(avatar_ids)
        for avatar_id in avatar_ids:
            if self._tenants is not None and self._tenants.others(self._name, avatar_id):
                raise RequestError(f"Avatar {avatar_id!r} is not yours alone, so you can't unload it.")


class Door:
    """Tells callers by what the edge has written into their requests.

    Raises:
        TenantsError: on construction, when the tenants file is broken.
    """

    def __init__(self) -> None:
        self._file = TenantsFile.of_environment()

    def caller(self, parameters: Mapping[str, Any]) -> Caller:
        """Who sent a request with these parameters.

        Raises:
            RequestError: there are tenants, and it is none of them.
        """
        if self._file is None:
            return Caller("", {}, "", None)
        known, name = self._file.tenants, parameters.get(tenants.HEADER)
        if not isinstance(name, str) or not known.knows(name):
            raise RequestError(f"The header {tenants.HEADER}, which the edge sets, names no tenant.")
        return Caller(name if name in known.by_name else "", {tenants.HEADER: name}, name, known)


def asks_to_unload(request: Any, parameters: Mapping[str, Any]) -> bool:
    """Whether the rasterizer passes on that its avatars are to be forgotten.

    A request of an ensemble has more inputs than AVATAR; an operation in it is the rasterizer's to refuse.
    """
    return parameters.get("operation") == "unload" and len(request.inputs()) == 1


def ask(
    model: str,
    outputs: list[str],
    **inputs: Any,  # arrays
) -> list[Any]:
    """The outputs of another of the server's models, on the CPU: those of plans would stay on the GPU.

    Raises:
        TritonModelException: it fails.
    """
    tensors = [pb_utils.Tensor(name, array) for name, array in inputs.items()]
    on_cpu = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)
    request = pb_utils.InferenceRequest(
        model_name=model, inputs=tensors, requested_output_names=outputs, preferred_memory=on_cpu
    )
    answer = request.exec()
    if answer.has_error():
        raise pb_utils.TritonModelException(f"{model} failed: {answer.error().message()}")
    return [pb_utils.get_output_tensor_by_name(answer, name).as_numpy() for name in outputs]


def response(**outputs: Any) -> Any:
    """A response with these arrays."""
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, output) for name, output in outputs.items()])


def send(sender: Any, answer: Any) -> None:
    """Answer, once; where the answer can't be handed over, as without shared memory for it, say at least that."""
    final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
    try:
        sender.send(answer, flags=final)
    except Exception as error:
        _log.exception("a response could not be sent")
        sender.send(failure(error), flags=final)


# of pb_utils.TritonError, which is not there yet when this is imported
_CODES = {"request": "INVALID_ARG", "avatar": "NOT_FOUND", "deadline": "CANCELLED", "busy": "UNAVAILABLE"}


def failure(error: BaseException) -> Any:
    """The response that tells a client about an error, in a sentence."""
    code = getattr(pb_utils.TritonError, _CODES.get(reason(error), "INTERNAL"))
    message = str(error) or type(error).__name__
    return pb_utils.InferenceResponse(
        error=pb_utils.TritonError(f"{message[:1].upper()}{message[1:].rstrip('.')}.", code)
    )


def log_failure(logger: logging.Logger, error: BaseException, fields: Fields) -> None:
    """The line about a request that is answered with an error."""
    why = reason(error)
    told = Fields(**fields, error=why)
    if why == "deadline":
        logger.warning("dropped", extra=told)
    elif why in ("bundle", "internal"):
        logger.error("failed", extra=told, exc_info=error if why == "internal" else None)
    else:
        logger.warning("refused", extra=told)


class Failures:
    """Answers, counts and logs what a model can't do, from any of its threads.

    Args:
        model: its name.
    """

    def __init__(self, model: str) -> None:
        log.configure()
        self._log = logging.getLogger(model)
        self._page = Page(pb_utils.MetricFamily)
        self._one = threading.Lock()  # Triton dies when two threads touch metrics

    def answer(self, request: Any, error: Exception) -> Any:
        """The response to a request."""
        log_failure(self._log, error, Fields(request_id=request.request_id()))
        with self._one:
            self._page.add("talksplat_refused_total", 1, reason=reason(error))
        return failure(error)
