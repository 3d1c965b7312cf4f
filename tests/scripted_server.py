"""A scripted stand-in for the talksplat server, in this process and over real gRPC.

It renders nothing: a "frame" says in JSON which audio, avatar, index and parameters it was asked for, so two streams
have the same frames exactly when they sent the same requests. What it does wrong, and when, the test says.
"""

from __future__ import annotations

import json
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

CLOCK = {
    "sample_rate": 16_000,
    "fps": 25,
    "chunk_frames": 4,
    "left_context": 10_240,
    "look_ahead": 1_920,
    "max_utterance_seconds": 30,
}

Script = Callable[
    [int, int, Any], None
]  # a request's chunk (-1: none), how often it came before, its gRPC context to abort


class Asked(NamedTuple):
    """One request."""

    model: str
    id: str
    chunk: int
    deadline_ms: int  # 0: none
    metadata: dict[str, str]
    at: float  # time.monotonic()


class ScriptedServer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # generated, untyped
    def __init__(
        self,
        *,
        port: int = 0,
        clock: dict[str, int] = CLOCK,
        delay: Callable[[int], float] = lambda chunk: 0.0,  # seconds
        script: Script = lambda chunk, before, context: None,
        certificate: tuple[bytes, bytes] | None = None,  # key and chain, PEM
    ) -> None:
        self.clock = clock
        self.delay = delay
        self.script = script
        self.count = 0  # of ModelInfer
        self._came: Counter[int] = Counter()  # by chunk
        self.open = self.most_open = 0  # at once
        self.cancelled = 0
        self.asked: deque[Asked] = deque(maxlen=10_000)  # of ModelInfer
        self.peers: set[str] = set()  # connections
        self._lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        address = f"127.0.0.1:{port}"
        if certificate is None:
            port = self._server.add_insecure_port(address)
        else:
            port = self._server.add_secure_port(address, grpc.ssl_server_credentials([certificate]))
        self.url = f"127.0.0.1:{port}"
        self._server.start()

    def __enter__(self) -> ScriptedServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._server.stop(0).wait()

    def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        if request.name != "animate":
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        response = service_pb2.ModelConfigResponse()
        for name, value in self.clock.items():
            response.config.parameters[name].string_value = str(value)
        return response

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        chunk = inputs(request).get("FRAME_INDEX", -1) // self.clock["chunk_frames"]
        with self._lock:
            before = self._came[chunk]
            self._came[chunk] += 1
            self.count += 1
            deadline = request.parameters["deadline_ms"].int64_param if "deadline_ms" in request.parameters else 0
            metadata = dict(context.invocation_metadata())
            self.asked.append(Asked(request.model_name, request.id, chunk, deadline, metadata, time.monotonic()))
            self.peers.add(context.peer())
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        try:
            self._wait(self.delay(chunk), context)
            self.script(chunk, before, context)
            response = getattr(self, f"_{request.model_name}")(request, context)
            response.model_name = request.model_name
            return response
        finally:
            with self._lock:
                self.open -= 1

    def _wait(self, seconds: float, context: Any) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if not context.is_active():
                self.cancelled += 1
                return
            time.sleep(min(left, 0.01))

    def _animate(self, request: Any, context: Any) -> Any:
        given = inputs(request)
        _require_avatar(given["AVATAR"], context)
        return answer(FRAMES=self._frames(request, given, 1), SPEECH=np.full((1, self.clock["chunk_frames"]), 0.5))

    def _speech_to_animation(self, request: Any, context: Any) -> Any:
        given = inputs(request)
        _require_avatar(given["AVATAR"], context)
        chunk = self.clock["chunk_frames"] * self.clock["sample_rate"] // self.clock["fps"]
        chunks = -(-given["AUDIO"].size // chunk)
        return answer(
            TEXT=[_text(given["AUDIO"])],
            FRAMES=self._frames(request, given, chunks),
            SPEECH=np.full((chunks, self.clock["chunk_frames"]), 0.5),
        )

    def _transcribe(self, request: Any, context: Any) -> Any:
        return answer(TEXT=[_text(inputs(request)["AUDIO"])])

    def _tts(self, request: Any, context: Any) -> Any:
        """Each sample is its number, in pieces of 1,000; a sentence has 700 samples a letter."""
        given = inputs(request)
        samples = 700 * len(given["TEXT"])
        piece = np.arange(given["START"], min(samples, given["START"] + 1000), dtype=np.float32)
        return answer(AUDIO=piece, SAMPLES=np.array([samples]))

    def _rasterizer(self, request: Any, context: Any) -> Any:
        given = inputs(request)
        avatar = given["AVATAR"]
        if "operation" not in request.parameters:
            _require_avatar(avatar, context)
            return answer(FRAMES=self._frames(request, given, 1))
        operation = request.parameters["operation"].string_param
        if operation == "list":
            report: dict[str, Any] = {"avatars": [{"id": "ava", "loaded": True}, {"id": "bob", "loaded": False}]}
        else:
            _require_avatar(avatar, context)
            report = {"avatar": avatar, "loaded": operation == "preload", "cached": False, "milliseconds": 1.5}
            report |= {"model": "animate", "width": 512, "height": 512}
        return answer(REPORT=[json.dumps(report).encode()])

    def _frames(self, request: Any, given: dict[str, Any], chunks: int) -> np.ndarray[Any, Any]:
        said = {
            "avatar": given["AVATAR"],
            "audio": hash(given["AUDIO"].tobytes()) if "AUDIO" in given else None,
            "samples": given["AUDIO"].size if "AUDIO" in given else 0,
            **{key: value.string_param or value.int64_param for key, value in sorted(request.parameters.items())},
        }
        count = chunks * self.clock["chunk_frames"]
        frames = [json.dumps({"index": given["FRAME_INDEX"] + number, **said}).encode() for number in range(count)]
        return np.array(frames, object).reshape(chunks, -1)


def _require_avatar(avatar: str, context: Any) -> None:
    if avatar != "ava":
        context.abort(grpc.StatusCode.NOT_FOUND, f"in ensemble 'animate', there is no avatar {avatar!r}")


def _text(audio: np.ndarray[Any, Any]) -> bytes:
    return f"[{audio.size}]".encode()


def inputs(request: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for tensor, data in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.datatype == "FP32":
            found[tensor.name] = np.frombuffer(data, "<f4").reshape(list(tensor.shape))
        elif tensor.datatype == "INT64":
            [found[tensor.name]] = struct.unpack("<q", data)
        else:
            assert struct.unpack_from("<I", data)[0] == len(data) - 4
            found[tensor.name] = data[4:].decode()
    return found


def answer(**outputs: Any) -> Any:
    response = service_pb2.ModelInferResponse()
    for name, value in outputs.items():
        array = np.asarray(value)
        tensor = response.outputs.add(name=name, shape=array.shape)
        if array.dtype.kind == "f":
            tensor.datatype = "FP32"
            response.raw_output_contents.append(array.astype("<f4").tobytes())
        elif array.dtype.kind == "i":
            tensor.datatype = "INT64"
            response.raw_output_contents.append(array.astype("<i8").tobytes())
        else:
            tensor.datatype = "BYTES"
            parts = [struct.pack("<I", len(item)) + item for item in array.astype(object).ravel()]
            response.raw_output_contents.append(b"".join(parts))
    return response
