"""A server that is watched in every way, and what tests do to it."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from collector import Collector, Span
from tritonclient.utils import InferenceServerException, np_to_triton_dtype
from waiting import wait_for

from talksplat import avatar as bundle
from talksplat import clock, tenants
from talksplat.server import Server

RESTARTS = 2  # that the server is told of
TRACED = 25  # one request in so many
KEY, HASH = tenants.key()  # of the tenant acme


@dataclass(frozen=True)
class Watched:
    """The server, and what a test does to it."""

    server: Server
    client: Any
    collector: Collector

    def chunk(self, avatar: str = "red", index: int = 0, *, tenant: str = "acme", **more: Any) -> Any:
        """The frames of one chunk of silence, which shows the face at rest."""
        return self.ask("animate", tenant, more, AUDIO=np.zeros((1, clock.WINDOW), np.float32), **_of(avatar, index))

    def idle(self, avatar: str = "red", index: int = 0, *, tenant: str = "acme", **more: Any) -> Any:
        """The frames of one chunk of a face at rest."""
        return self.ask("rasterizer", tenant, more, **_of(avatar, index))

    def speak(self, avatar: str = "red", index: int = 0, *, tenant: str = "acme", **more: Any) -> Any:
        """The frames of one chunk of a moving face."""
        motion = np.full((1, clock.CHUNK_FRAMES, bundle.COEFFICIENTS), 0.1, np.float32)
        speech = np.ones((1, clock.CHUNK_FRAMES), np.float32)
        return self.ask("rasterizer", tenant, more, COEFFICIENTS=motion, SPEECH=speech, **_of(avatar, index))

    def operate(self, operation: str, avatar: str, *, tenant: str = "acme", **more: Any) -> Any:
        """Preload, unload or list."""
        more = more | {"parameters": {"operation": operation}}
        return self.ask("rasterizer", tenant, more, AVATAR=_of(avatar, 0)["AVATAR"])

    def ask(self, model: str, tenant: str, more: dict[str, Any], **arrays: Any) -> Any:
        """Any model, as the edge would for a tenant."""
        inputs = [
            triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)).set_data_from_numpy(array)
            for name, array in arrays.items()
        ]
        headers = {tenants.HEADER: tenant} | more.pop("headers", {})
        return self.client.infer(model, inputs, headers=headers, client_timeout=30, **more)

    def refused(self, **arguments: Any) -> str:
        """Why a chunk is refused: the status and the sentence."""
        with pytest.raises(InferenceServerException) as caught:
            self.chunk(**arguments)
        return str(caught.value)

    def log(self) -> str:
        """Of the server, until now."""
        assert self.server.run_dir is not None
        return (self.server.run_dir / "triton.log").read_text()

    def lines(self, **fields: Any) -> list[dict[str, Any]]:
        """Those of the log that are JSON and have these fields."""
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        return [line for line in lines if fields.items() <= line.items()]

    def line(self, **fields: Any) -> dict[str, Any]:
        """The only one, once it is there."""
        (line,) = wait_for(lambda: self.lines(**fields))
        return line

    def spans(self, **fields: str) -> list[Span]:
        """Those that the collector has and that have these fields."""
        spans = self.collector.spans()
        return [span for span in spans if all(getattr(span, name) == value for name, value in fields.items())]


def _of(avatar: str, index: int) -> dict[str, Any]:
    return {"AVATAR": np.array([[avatar.encode()]], np.object_), "FRAME_INDEX": np.full((1, 1), index, np.int64)}
