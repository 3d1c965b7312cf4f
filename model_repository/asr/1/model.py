"""Audio -> text; the work is done in `talksplat.asr`."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from talksplat import asr, clock, tenants
from talksplat.fair import FairQueue
from talksplat.log import Fields
from talksplat.schedule import DeadlineError
from talksplat.triton import Failures, array, ask, parameters, response, send

# Of one tenant's audio that waits, 38 MB and some 20 s of work. Triton does not tell a step of an ensemble that its
# request was given up, so that without this whoever sends and gives up could fill hours.
MOST_SAMPLES = 20 * clock.MAX_UTTERANCE_SECONDS * clock.SAMPLE_RATE

_log = logging.getLogger("asr")


class _Utterance(NamedTuple):
    """A request until it is answered."""

    request: Any
    sender: Any
    audio: npt.NDArray[np.float32]  # [T]
    arrived: float  # seconds of the monotonic clock


class TritonPythonModel:
    """See config.pbtxt.

    `execute` hands requests over and returns at once; tenants are served in turn.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Load the networks, or leave them to Triton.

        Raises:
            TritonModelException: the parameter `networks` says neither.
        """
        self.failures = Failures("asr")
        parameters = {
            name: value["string_value"] for name, value in json.loads(args["model_config"])["parameters"].items()
        }
        folder = Path(args["model_repository"])
        if parameters["networks"] == "in_process":
            threads, precision = int(parameters["intra_op_thread_count"]), parameters["precision"]
            networks = asr.in_process(folder.parent, threads, precision)
        elif parameters["networks"] == "triton":
            networks = _through_triton()
        else:
            raise pb_utils.TritonModelException("asr: the parameter networks is neither in_process nor triton.")
        tokenizer = asr.Tokenizer((folder / args["model_version"] / "tokenizer.bin").read_bytes())
        self.transcribe = asr.Transcriber(networks, tokenizer)
        self.waiting = FairQueue(self._respond, self._drop, MOST_SAMPLES, "transcribe")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """None for a request that is answered later, by its sender."""
        return [self._take_up(request) for request in requests]

    def finalize(self) -> None:
        """End the thread."""
        self.waiting.close()

    def _take_up(self, request: Any) -> Any:
        try:
            tenant = str(parameters(request).get(tenants.HEADER, ""))
            audio = array(request, "AUDIO").copy()  # Triton uses its memory again
        except Exception as error:
            return self.failures.answer(request, error)
        utterance = _Utterance(request, request.get_response_sender(), audio, time.monotonic())
        self.waiting.add(tenant, utterance, len(audio))
        return None

    def _respond(self, utterance: _Utterance) -> None:
        try:
            answer = response(TEXT=np.array([self.transcribe(utterance.audio).encode()], np.object_))
        except Exception as error:
            answer = self.failures.answer(utterance.request, error)
        else:
            # that it was done, but never what was said
            milliseconds = 1e3 * (time.monotonic() - utterance.arrived)
            told = Fields(request_id=utterance.request.request_id(), milliseconds=milliseconds)
            _log.debug("transcribed", extra=told)
        send(utterance.sender, answer)

    def _drop(self, utterance: _Utterance) -> None:
        error = DeadlineError("too much newer audio of the same tenant waits for its text")
        send(utterance.sender, self.failures.answer(utterance.request, error))


def _through_triton() -> asr.Networks:
    """By requests to Triton's own models, whatever backend serves them."""

    def step(token: Any, cross: Any, past: Any) -> tuple[Any, Any]:
        logits, present = ask("asr_decoder", ["LOGITS", "PRESENT_KV"], TOKEN=token, CROSS_KV=cross, PAST_KV=past)
        return logits, present

    return asr.Networks(
        vad=lambda windows: ask("vad", ["SPEECH"], AUDIO=windows)[0],
        encoder=lambda audio: ask("asr_encoder", ["CROSS_KV"], AUDIO=audio)[0],
        decoder=step,
    )
