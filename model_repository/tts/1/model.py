"""Text -> audio; the work is done in `talksplat.speaking`."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from talksplat import speaking
from talksplat.framing import RequestError
from talksplat.log import Fields
from talksplat.phonemiser import Espeak, PhonemiserError
from talksplat.schedule import DeadlineError
from talksplat.triton import Failures, array, ask, response, send

_log = logging.getLogger("tts")


class TritonPythonModel:
    """See config.pbtxt.

    What the phonemiser is needed for is answered by a thread of its own: while it hangs, all else is said.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Load the networks, or leave them to Triton; start the phonemiser, if it is installed.

        Raises:
            TritonModelException: the parameter `networks` says neither.
        """
        self.failures = Failures("tts")
        self.espeak = Espeak()
        parameters = {
            name: value["string_value"] for name, value in json.loads(args["model_config"])["parameters"].items()
        }
        folder = Path(args["model_repository"])
        if parameters["networks"] == "in_process":
            networks = speaking.in_process(folder.parent, int(parameters["intra_op_thread_count"]))
        elif parameters["networks"] == "triton":
            networks = _through_triton()
        else:
            raise pb_utils.TritonModelException("tts: the parameter networks is neither in_process nor triton.")
        files = folder / args["model_version"]
        symbols, replies = (
            json.loads((files / name).read_text(encoding="utf-8")) for name in ("symbols.json", "replies.json")
        )
        with contextlib.suppress(PhonemiserError):  # prepared replies can be said; whoever wants more is told why not
            self.espeak.start()
        self.speak = speaking.Speaker(networks, symbols, replies, lambda text: " ".join(self.espeak.ipa(text)))
        self.phonemising = ThreadPoolExecutor(1, thread_name_prefix="phonemise")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request, one after the other; None for one that is answered later, by its sender."""
        return [self._take_up(request) for request in requests]

    def finalize(self) -> None:
        """End the phonemiser."""
        self.phonemising.shutdown()
        self.espeak.close()

    def _take_up(self, request: Any) -> Any:
        began = time.monotonic()
        try:
            if request.is_cancelled():
                raise DeadlineError("nobody waits for it any more")
            text, start = _text(array(request, "TEXT")[0]), int(array(request, "START")[0])
            if self.speak.asks_phonemiser(text):
                self.phonemising.submit(self._send, request, request.get_response_sender(), text, start, began)
                return None
        except Exception as error:
            return self.failures.answer(request, error)
        return self._respond(request, text, start, began)

    def _send(self, request: Any, sender: Any, text: str, start: int, began: float) -> None:
        if sender.is_cancelled():
            answer = self.failures.answer(request, DeadlineError("nobody waits for it any more"))
        else:
            answer = self._respond(request, text, start, began)
        send(sender, answer)

    def _respond(self, request: Any, text: str, start: int, began: float) -> Any:
        try:
            piece = self.speak(text, start)
        except Exception as error:
            return self.failures.answer(request, error)
        # that it was done, but never what was said
        told = Fields(request_id=request.request_id(), milliseconds=1e3 * (time.monotonic() - began))
        _log.debug("spoken", extra=told)
        return response(AUDIO=piece.audio, SAMPLES=np.array([piece.samples]))


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise RequestError("TEXT is no UTF-8.") from None


def _through_triton() -> speaking.Networks:
    """By requests to Triton's own models, whatever backend serves them."""

    def encode(tokens: Any, noise: Any) -> tuple[Any, Any, Any]:
        outputs = ["MEANS", "DEVIATIONS", "DURATIONS"]
        means, deviations, durations = ask("tts_encoder", outputs, TOKENS=tokens, NOISE=noise)
        return means, deviations, durations

    return speaking.Networks(
        encode,
        flow=lambda prior: ask("tts_flow", ["LATENT"], PRIOR=prior)[0],
        decoder=lambda latent: ask("tts_decoder", ["AUDIO"], LATENT=latent)[0],
    )
