"""Audio -> text; the work is done in `talksplat.asr`."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from talksplat import asr
from talksplat.log import Fields
from talksplat.triton import Failures, array, ask, response

_log = logging.getLogger("asr")


class TritonPythonModel:
    """See config.pbtxt."""

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

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request, one after the other."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        began = time.monotonic()
        try:
            text = self.transcribe(array(request, "AUDIO"))
        except Exception as error:
            return self.failures.answer(request, error)
        # that it was done, but never what was said
        told = Fields(request_id=request.request_id(), milliseconds=1e3 * (time.monotonic() - began))
        _log.debug("transcribed", extra=told)
        return response(TEXT=np.array([text.encode()], np.object_))


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
