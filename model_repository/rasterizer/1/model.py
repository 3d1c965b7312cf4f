"""Coefficients or offsets -> frames; the work is done in `talksplat.animator`."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from talksplat import clock, log
from talksplat.animator import CHUNK_SECONDS, Animator, Chunk, Options
from talksplat.avatar import HUMA1_WEIGHTS, SPEECH_WIDTH, WINDOW_TOKENS, BundleError, Huma1Avatar
from talksplat.drawing import Drawer, GatheringDrawer
from talksplat.framing import RequestError
from talksplat.log import SLOW_MS, Fields
from talksplat.metrics import RESTARTS_VARIABLE, Page, Publisher
from talksplat.triton import (
    Caller,
    Door,
    array,
    avatar_ids,
    failure,
    handed_on,
    log_failure,
    parameters,
    response,
    send,
)

OPERATING_THREADS = 2  # run preload, unload and list: who asks for a third one waits, but nobody who wants frames

_log = logging.getLogger("rasterizer")


class TritonPythonModel:
    """See config.pbtxt.

    `execute` hands requests over and returns at once; a request is answered by the thread that has done the last of it.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Start the threads; avatars are read when they are asked for."""
        settings = json.loads(args["model_config"])["parameters"]
        budgets = {
            f"{kept}_bytes": int(settings[f"{kept}_megabytes"]["string_value"]) << 20
            for kept in ("avatar", "plate", "resting")
        }
        log.configure()
        self.door = Door()
        drawer = _drawer(settings["device"]["string_value"])
        self.animator = Animator(Path(os.environ["TALKSPLAT_AVATARS"]), **budgets, drawer=drawer)
        self.metrics = Publisher(
            Page(pb_utils.MetricFamily), self.animator, int(os.environ.get(RESTARTS_VARIABLE, "0"))
        )
        self.operators = ThreadPoolExecutor(OPERATING_THREADS, thread_name_prefix="operate")
        self.operations: dict[str, Callable[[Caller, str], dict[str, Any]]] = {
            "preload": self._preload,
            "unload": self._unload,
            "list": self._list,
        }

    def execute(self, requests: Sequence[Any]) -> None:
        """Take up requests; each is answered later, through its response sender."""
        for request in requests:
            ticket = _Ticket(request.get_response_sender(), Fields(request_id=request.request_id()), time.monotonic())
            try:
                self._take_up(request, ticket)
            except Exception as error:
                self._fail(ticket, error)

    def finalize(self) -> None:
        """End the threads."""
        self.operators.shutdown(cancel_futures=True)
        self.animator.close()
        self.metrics.close()

    def _take_up(self, request: Any, ticket: _Ticket) -> None:
        asked = parameters(request)
        caller = self.door.caller(asked)
        ticket.told["tenant"] = caller.tenant
        if "operation" in asked:
            operation = self._operation(request, asked["operation"])
            names = avatar_ids(request)
            ticket.told["avatar"] = ", ".join(names)
            done = self.operators.submit(lambda: [operation(caller, name) for name in names])
            self._answer(ticket, done, _reports, asked["operation"])
        else:
            chunks = _chunks(request, Options.parse(asked), caller)
            ticket.tell_of(chunks)
            speech = {name: tensor.copy() for name, tensor in handed_on(request, "SPEECH").items()}
            self._answer(
                ticket, self.animator.submit(chunks), lambda results: {**_frames(results), **speech}, "rendered"
            )

    def _answer(
        self, ticket: _Ticket, future: Future[Any], outputs: Callable[[Any], Mapping[str, Any]], event: str
    ) -> None:
        """Answer a request when its future ends, whichever way."""

        def finish(done: Future[Any]) -> None:
            try:
                answer = response(**outputs(done.result()))
            except BaseException as error:
                self._fail(ticket, error)
            else:
                send(ticket.sender, answer)
                _log_answer(ticket, event)

        future.add_done_callback(finish)

    def _fail(self, ticket: _Ticket, error: BaseException) -> None:
        self.metrics.refused(error)
        log_failure(_log, error, Fields(**ticket.told, age_ms=1e3 * (time.monotonic() - ticket.arrived)))
        send(ticket.sender, failure(error))

    def _operation(self, request: Any, name: object) -> Callable[[Caller, str], dict[str, Any]]:
        if name not in self.operations:
            raise RequestError(f"The parameter operation is {name!r}, expected one of {', '.join(self.operations)}.")
        if len(request.inputs()) > 1:  # who may animate may not do this by the way
            raise RequestError("An operation takes AVATAR alone: ask the model rasterizer for it.")
        return self.operations[str(name)]

    def _list(self, caller: Caller, _: str) -> dict[str, Any]:
        report = self.animator.catalogue()
        return {**report, "avatars": [each for each in report["avatars"] if caller.may_use(each["id"])]}

    def _preload(self, caller: Caller, avatar_id: str) -> dict[str, Any]:
        caller.require([avatar_id])
        report = self.animator.preload(avatar_id)
        if report["profile"] == Huma1Avatar.profile and not report["cached"]:
            began = time.perf_counter()
            try:
                _warm_up_huma1(caller, avatar_id)
            except Exception:
                self.animator.unload(avatar_id)  # it can't be animated
                raise
            report["milliseconds"] += round(1e3 * (time.perf_counter() - began), 2)
        return report

    def _unload(self, caller: Caller, avatar_id: str) -> dict[str, Any]:
        caller.require_alone([avatar_id])
        report = self.animator.unload(avatar_id)
        for model in ("avatar", "avatar_huma1"):
            _ask(model, [_name(avatar_id)], [], {**caller.forwarded, "operation": "unload"})
        return report


def _drawer(device: str) -> Drawer | None:
    """Who draws; None: the animator's own, on the CPU. Raises TritonModelException where the device can't be had."""
    if device == "cpu":
        return None
    if device != "cuda":
        raise pb_utils.TritonModelException(f"rasterizer: the parameter device is {device!r}, expected cpu or cuda.")
    try:
        from talksplat.splat.cuda import Renderer  # imports torch

        return GatheringDrawer(Renderer().pictures)
    except (ImportError, RuntimeError) as error:
        raise pb_utils.TritonModelException(f"rasterizer: the device cuda can't be used: {error}") from error


@dataclass
class _Ticket:
    """A request until it is answered."""

    sender: Any
    told: Fields  # what the log says about it
    arrived: float  # seconds of the monotonic clock
    late: float = 0.0  # ms that its last chunk may be answered after it arrived

    def tell_of(self, chunks: Sequence[Chunk]) -> None:
        self.arrived = min((chunk.arrived for chunk in chunks), default=self.arrived)
        self.late = SLOW_MS + 1e3 * CHUNK_SECONDS * (len(chunks) - 1)
        self.told["avatar"] = ", ".join(sorted({chunk.avatar for chunk in chunks}))
        self.told["frames"] = clock.CHUNK_FRAMES * len(chunks)


def _log_answer(ticket: _Ticket, event: str) -> None:
    age_ms = 1e3 * (time.monotonic() - ticket.arrived)
    if event in ("preload", "unload"):
        _log.info(event, extra=Fields(**ticket.told, milliseconds=age_ms))
    elif event == "rendered" and age_ms > ticket.late:
        _log.warning("slow", extra=Fields(**ticket.told, age_ms=age_ms))
    else:
        _log.debug(event, extra=Fields(**ticket.told, age_ms=age_ms))


def _frames(results: list[list[bytes] | Exception]) -> dict[str, Any]:
    """FRAMES [B, 4]; raises the first error: a request is answered as a whole."""
    for result in results:
        if isinstance(result, Exception):
            raise result
    return {"FRAMES": np.array(results, np.object_)}


def _reports(reports: list[dict[str, Any]]) -> dict[str, Any]:
    return {"REPORT": np.array([[json.dumps(report).encode()] for report in reports], np.object_)}


def _warm_up_huma1(caller: Caller, avatar_id: str) -> None:
    """Have the other processes of the profile bake the avatar's table and run the net once."""
    outputs = ["TABLE", *(weights.upper() for weights in HUMA1_WEIGHTS)]
    baked = _ask("avatar_huma1", [_name(avatar_id)], outputs, caller.forwarded)
    silence = pb_utils.Tensor("HIDDEN", np.zeros((1, WINDOW_TOKENS, SPEECH_WIDTH), np.float32))
    _ask("deformation_huma1", [silence, *baked], ["OFFSETS"], {})


def _name(avatar_id: str) -> Any:
    return pb_utils.Tensor("AVATAR", np.array([[avatar_id.encode()]], np.object_))


def _ask(model: str, inputs: list[Any], outputs: list[str], parameters: Mapping[str, str]) -> list[Any]:
    """The outputs of another model; raises BundleError for an error, whose code does not come along."""
    request = pb_utils.InferenceRequest(
        model_name=model,
        inputs=inputs,
        requested_output_names=outputs,
        parameters=dict(parameters),
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
    )
    answer = request.exec()
    if answer.has_error():
        raise BundleError(answer.error().message())
    return list(answer.output_tensors())


def _chunks(request: Any, options: Options, caller: Caller) -> list[Chunk]:
    """A request's chunks. Its tensors are copied: they lie in shared memory that Triton uses again."""
    names = avatar_ids(request)
    caller.require(names)
    present = {tensor.name() for tensor in request.inputs()}
    indices = array(request, "FRAME_INDEX")[:, 0].tolist()
    arrived = [time.monotonic()] * len(names)
    if "ARRIVED" in present:
        arrived = array(request, "ARRIVED")[:, 0].tolist()
        if not np.isfinite(arrived).all():
            raise RequestError("ARRIVED holds NaN or infinity, expected seconds.")
    motions: Sequence[Any] = [None] * len(names)
    speeches: Sequence[Any] = motions
    if present & {"COEFFICIENTS", "OFFSETS", "SPEECH"}:  # else nobody speaks
        motions = array(request, "OFFSETS" if "OFFSETS" in present else "COEFFICIENTS").copy()
        speeches = array(request, "SPEECH").copy()
    rows = zip(names, motions, speeches, indices, arrived, strict=True)
    return [
        Chunk(name, motion, speech, index, options, since, caller.tenant) for name, motion, speech, index, since in rows
    ]
