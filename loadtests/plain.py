"""A plain server to compare with: FastAPI on uvicorn, one process, one request after the other, nothing batched.

It is the usual design of such services, done with care: the same nets in the same runtime, the same rasterizer, caches
and JPEG encoder, the same protocol (a window of audio in, the JPEGs of its chunk out), all cores inside a request (the
frames of a chunk are drawn by all threads; the nets, too small to be shared out, run in one). Requests wait for one
worker thread, so that the event loop stays free to read and write; whose client has gone meanwhile is passed over. What
it lacks is what Triton adds:
batches, steps of different requests side by side, processes without a common GIL.

``POST /animate?avatar=ava&frame_index=0&size=512&seed=0``, body: f32 [WINDOW]; answer: four JPEGs, one after the other,
their lengths in the header ``x-frame-bytes``. 404: no such avatar; 422: a request that makes no chunk.

    python -m loadtests.plain --port 8000
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import uvicorn
from fastapi import FastAPI, Request, Response

from loadtests.streams import JPEG_BEGINS, TIMEOUT_SECONDS, Ask, AskError, Connection
from talksplat import avatar as bundle
from talksplat import clock
from talksplat.animator import Animator, Chunk, Options
from talksplat.framing import RequestError
from talksplat.server import HOST, ROOT

Float32 = npt.NDArray[np.float32]

START_SECONDS = 30.0
NET_THREADS = 1  # at 0.2 to 2 ms a net, two threads cost more than they bring


class Pipeline:
    """From a window of audio to the frames of its chunk, in the thread that calls it."""

    def __init__(self, avatars: Path, repository: Path = ROOT / "model_repository") -> None:
        self._encoder, self._vad, self._deformation = (
            _net(repository / name / "1" / "model.onnx") for name in ("audio_encoder", "vad", "deformation")
        )
        self._head = functools.lru_cache(None)(functools.partial(bundle.read_adapter, avatars))
        self.animator = Animator(avatars)

    def animate(self, audio: bytes, avatar: str, frame_index: int, options: Options) -> list[bytes]:
        """The frames, as JPEG.

        Raises:
            RequestError: the audio is not one window.
            UnknownAvatarError: there is no such avatar.
            BundleError: it can't be read, or is of another profile than huma2.
        """
        if len(audio) != 4 * clock.WINDOW:
            raise RequestError(f"The body has {len(audio)} bytes, expected {4 * clock.WINDOW}: f32 [{clock.WINDOW}].")
        motion, speech = self.motion(np.frombuffer(audio, "<f4"), avatar)
        [frames] = self.animator.render([Chunk(avatar, motion, speech, frame_index, options)])
        if isinstance(frames, Exception):
            raise frames
        return frames

    def motion(
        self,
        window: Float32,  # [WINDOW]
        avatar: str,
    ) -> tuple[Float32, Float32]:  # [4, 20] coefficients, [4] probability
        """What a window of audio makes of a face, and whether it is speech; raises as `animate` does."""
        head_in, head_out = self._head(avatar)
        [features] = self._encoder.run(["FEATURES"], {"AUDIO": window[None]})
        [speech] = self._vad.run(["SPEECH"], {"AUDIO": window[None]})
        feeds = {"FEATURES": features, "ADAPTER_IN": head_in[None], "ADAPTER_OUT": head_out[None]}
        [motion] = self._deformation.run(["COEFFICIENTS"], feeds)
        return motion[0], speech[0]


def _net(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = NET_THREADS
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def application(avatars: Path) -> FastAPI:
    """The server's routes."""
    pipeline = Pipeline(avatars)
    worker, turn = ThreadPoolExecutor(1), asyncio.Lock()
    app = FastAPI()

    @app.get("/health")
    async def health() -> str:
        return "ready"

    @app.post("/animate")
    async def animate(request: Request, avatar: str, frame_index: int, size: int | None = None, seed: int = 0) -> Any:
        audio = await request.body()
        try:
            options = Options(size=size, seed=seed)
            async with turn:
                if await request.is_disconnected():
                    return Response(status_code=499)  # nobody reads it
                frames = await asyncio.get_running_loop().run_in_executor(
                    worker, pipeline.animate, audio, avatar, frame_index, options
                )
        except RequestError as error:
            return Response(str(error), 422)
        except (bundle.UnknownAvatarError, bundle.BundleError) as error:
            return Response(str(error), 404)
        lengths = ",".join(str(len(frame)) for frame in frames)
        return Response(b"".join(frames), media_type="application/octet-stream", headers={"x-frame-bytes": lengths})

    return app


class PlainServer:
    """The server in a process of its own; a context manager."""

    def __init__(self, avatars: Path) -> None:
        self._avatars = avatars

    def __enter__(self) -> Self:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self.port = int(probe.getsockname()[1])
        command = [sys.executable, "-m", "loadtests.plain", "--port", str(self.port), "--avatars", str(self._avatars)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL)
        try:
            self._wait_until_ready(time.monotonic() + START_SECONDS)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    @property
    def target(self) -> Plain:
        """For the load's generator."""
        return Plain(self.port)

    def _wait_until_ready(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            if (code := self._process.poll()) is not None:
                raise RuntimeError(f"The plain server ended with {code} while starting.")
            with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), 1):
                return
            time.sleep(0.05)
        raise RuntimeError(f"The plain server was not ready after {START_SECONDS} s.")

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass(frozen=True)
class Plain:
    """The plain server as a target of the load's generator."""

    port: int

    @contextlib.asynccontextmanager
    async def open(self, stream_id: str) -> AsyncIterator[Connection]:
        """See `loadtests.streams.Target`."""
        connection = _HttpConnection(self.port)
        try:
            yield connection
        finally:
            connection.close()


class _HttpConnection:
    """Keeps TCP connections open: one, and further ones while several chunks of the stream are under way."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    def close(self) -> None:
        for _, writer in self._free:
            writer.close()

    async def ask(self, ask: Ask) -> int:
        """See `loadtests.streams.Connection`."""
        if ask.audio is None or ask.chunks > 1:
            raise AskError("UNIMPLEMENTED")  # it has no idle chunks, and a request is one
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                reader, writer = (
                    self._free.pop() if self._free else await asyncio.open_connection(HOST, self._port, limit=1 << 20)
                )
                status, answer = await _exchange(reader, writer, ask, ask.audio)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            if writer is not None:
                writer.close()
            raise AskError(type(error).__name__) from error
        self._free.append((reader, writer))
        if status != 200:
            raise AskError(f"HTTP_{status}")
        return answer.count(JPEG_BEGINS)


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ask: Ask, audio: bytes
) -> tuple[int, bytes]:
    query = f"avatar={ask.avatar}&frame_index={ask.frame_index}&size={ask.size}&seed={ask.seed}"
    head = f"POST /animate?{query} HTTP/1.1\r\nhost: {HOST}\r\ncontent-length: {len(audio)}\r\n\r\n"
    writer.writelines([head.encode(), audio])
    status_line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines if line)
    return int(status_line.split(" ", 2)[1]), await reader.readexactly(int(headers["content-length"]))


def main(argv: list[str] | None = None) -> int:
    """Serve until it is told to stop; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.plain", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, default=8000, help="on the loopback interface; default: %(default)s")
    parser.add_argument(
        "--avatars", type=Path, default=ROOT / "avatars", help="folder of bundles; default: %(default)s"
    )
    arguments = parser.parse_args(argv)
    uvicorn.run(application(arguments.avatars), host=HOST, port=arguments.port, log_level="warning", access_log=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
