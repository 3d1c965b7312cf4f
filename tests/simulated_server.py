"""Minutes in a moment: an event loop whose time passes only by waiting, and a talksplat server without a network."""

from __future__ import annotations

import asyncio
import functools
import json
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

import numpy as np
import simplejpeg
from scripted_server import CLOCK, answer, inputs
from tritonclient.grpc import service_pb2

from talksplat_client import AsyncClient, Clock
from talksplat_client._transport import CallCancelledError

THE_CLOCK = Clock(**CLOCK)
SIDE = 16  # pixels of a frame
T = TypeVar("T")


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Whenever nothing is left to do but to wait, the wait is over."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_Skipping(self))

    def time(self) -> float:
        return self._now

    def skip(self, seconds: float) -> None:
        self._now += seconds


class _Skipping(selectors.DefaultSelector):
    def __init__(self, loop: SimulatedLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "the simulation waits for something that never comes"
        self._loop.skip(timeout)
        return super().select(0)


def simulate(work: Coroutine[Any, Any, T]) -> T:
    """What it returns, in no time."""
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(work)


class SimulatedServer:
    """A stand-in for a server and the network before it: a frame is as bright as the sound in its middle is loud.

    Attributes:
        seconds: from a request to its answer; may be changed while it runs.
        models: of the requests that were answered.
        cancelled: how many were not, since nobody wanted them any more.
    """

    def __init__(self, seconds: float = 0.03) -> None:
        self.seconds = seconds
        self.models: list[str] = []
        self.cancelled = 0

    def client(self) -> AsyncClient:
        client = AsyncClient()
        client.__dict__["_transport"] = self
        return client

    def call(self, method: str, request: Any, terms: object) -> SimulatedCall:
        return SimulatedCall(self, request)

    async def close(self) -> None:
        pass


class SimulatedCall:
    def __init__(self, server: SimulatedServer, request: Any) -> None:
        self._task = asyncio.ensure_future(self._answer(server, request))

    async def result(self) -> Any:
        try:
            return await asyncio.shield(self._task)
        except asyncio.CancelledError:
            if self._task.cancelled():
                raise CallCancelledError from None
            raise

    def cancel(self) -> None:
        self._task.cancel()

    async def _answer(self, server: SimulatedServer, request: Any) -> Any:
        if isinstance(request, service_pb2.ModelConfigRequest):
            response = service_pb2.ModelConfigResponse()
            for name, value in CLOCK.items():
                response.config.parameters[name].string_value = str(value)
            return response
        try:
            await asyncio.sleep(server.seconds)
        except asyncio.CancelledError:
            server.cancelled += 1
            raise
        server.models.append(request.model_name)
        if "operation" in request.parameters:
            report = {"avatar": "ava", "model": "animate", "cached": True, "milliseconds": 1.0}
            return answer(REPORT=[json.dumps(report | {"width": SIDE, "height": SIDE}).encode()])
        given = inputs(request)
        samples = given["AUDIO"][0] if "AUDIO" in given else np.zeros(THE_CLOCK.window(0)[1] + THE_CLOCK.left_context)
        middle = THE_CLOCK.left_context + THE_CLOCK.samples_per_frame // 2
        loud = samples[middle :: THE_CLOCK.samples_per_frame][: THE_CLOCK.chunk_frames]
        frames = [_picture(brightness(level), request.parameters["format"].string_param) for level in loud]
        response = answer(FRAMES=np.array([frames], object), SPEECH=np.zeros((1, THE_CLOCK.chunk_frames)))
        response.model_name = request.model_name
        return response


def brightness(level: float) -> int:  # 0 to 255
    """Of a frame with a sample of this level in its middle, -1 to 1."""
    return round(127.5 + 127.5 * float(level))


@functools.cache
def _picture(value: int, format: str) -> bytes:
    pixels = np.full((SIDE, SIDE, 3), value, np.uint8)
    if format == "raw":
        return pixels.tobytes()
    return bytes(simplejpeg.encode_jpeg(pixels, quality=95, colorsubsampling="420"))  # as the real one
