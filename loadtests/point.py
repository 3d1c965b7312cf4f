"""``python -m loadtests.point``: measures servers one order after the other, for `talksplat-export experiment`.

An order comes as a line of JSON, the fields of `Order`, and is answered with one: ``{"seen": {...}}``, or
``{"error": "..."}`` when the load failed. Two kinds of load: ``concurrency`` keeps so many requests under way, by
NVIDIA's perf_analyzer; ``streams`` are viewers in real time, by `loadtests.streams`. It ends with its input.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import resource
import struct
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import grpc
from tritonclient.grpc import service_pb2

from loadtests import perf_analyzer
from loadtests.slo import Summary
from loadtests.streams import METHOD, TIMEOUT_SECONDS, Ask, AskError, Connection, Generator, Load, Triton
from loadtests.usage import Watch
from talksplat import clock
from talksplat.bench._report import Row
from talksplat.server import SHARED_MEMORY

SERVICE = METHOD.rsplit("/", 1)[0]
STREAM_CHUNKS = 8  # of a viewer's stream: the ramp lasts as long


@dataclass(frozen=True)
class Order:
    """One server, what its viewers ask for, and one load."""

    url: str  # gRPC, host:port
    pid: int
    avatar: str
    size: int  # pixels a side
    kind: Literal["concurrency", "streams"]
    count: int  # requests or viewers at a time
    seconds: float
    format: Literal["jpeg", "raw"] = "jpeg"
    quality: int = 85  # of JPEG
    chunks: int = 1  # that a request carries
    shared_memory: bool = False  # frames come back through the system's

    @property
    def target(self) -> Triton:
        """What the viewers connect to."""
        kind = SharedMemory if self.shared_memory else Triton
        return kind(self.url, format=self.format, quality=self.quality if self.format == "jpeg" else None)


def main() -> int:
    """Answer orders until there are no more."""
    with Generator() as generator, tempfile.TemporaryDirectory(prefix="talksplat-point-") as folder:
        for line in sys.stdin:
            order = Order(**json.loads(line))
            try:
                answer: dict[str, object] = {"seen": _MEASURES[order.kind](order, generator, Path(folder))}
            except (Exception, SystemExit) as error:  # of perf_analyzer; the next order may go well
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), flush=True)
    return 0


def concurrency(order: Order, generator: Generator, folder: Path) -> Row:
    """So many requests at a time, each the next as soon as one is answered."""
    data = folder / f"{order.avatar}.json"
    if not data.is_file():
        data.write_text(json.dumps({"data": perf_analyzer.windows(order.avatar)}))
    options = [f"--request-parameter=size:{order.size}:int", f"--request-parameter=format:{order.format}:string"]
    if order.format == "jpeg":
        options.append(f"--request-parameter=quality:{order.quality}:int")
    if order.shared_memory:
        options += ["--shared-memory=system", f"--output-shared-memory-size={_chunk_bytes(order.size)}"]
    watch, before = Watch(order.pid, order.url), _children_cpu()
    watch()
    seen = perf_analyzer.analyze(
        perf_analyzer.install(), order.url, data, order.count, round(order.seconds), f"-b{order.chunks}", *options
    )
    watch()
    frames = clock.CHUNK_FRAMES * watch.models["rasterizer"].inferences
    cpu, own = sum(watch.cpu_seconds.values()), _children_cpu() - before
    return {
        "frames_per_s": clock.CHUNK_FRAMES * seen["Inferences/Second"],
        "request_p50_ms": seen["p50 latency"] / 1e3,
        "request_p95_ms": seen["p95 latency"] / 1e3,
        "server_cpu_ms_per_frame": 1e3 * cpu / frames,
        "generator_cpu_share_pct": 100 * own / (own + cpu),
        **watch.batches,
    }


def streams(order: Order, generator: Generator, folder: Path) -> Row:
    """Viewers in real time."""
    load = Load(
        order.count,
        (order.avatar,),
        order.size,
        order.seconds,
        chunks=STREAM_CHUNKS,
        chunks_per_request=order.chunks,
    )
    watch = Watch(order.pid, order.url)
    seen = generator.paced(order.target, load, watch)
    if seen.failed_ms:
        statuses = ", ".join(f"{len(failed)} x {status}" for status, failed in seen.failed_ms.items())
        raise RuntimeError(f"Requests failed: {statuses}.")
    summary, cpu = Summary.of(seen.playouts), sum(watch.cpu_seconds.values())
    wanted = ("first_frame_p95_ms", "chunk_p50_ms", "chunk_p95_ms", "deadline_miss_pct")
    return {
        **{name: summary.row()[name] for name in wanted},
        "slo_ok": int(summary.ok()),
        "server_cpu_s_per_stream_s": cpu / (order.count * order.seconds),
        "generator_cpu_share_pct": 100 * seen.cpu_seconds / (seen.cpu_seconds + cpu),
        "generator_lag_p99_ms": seen.lag_p99_ms,
        **watch.batches,
    }


_MEASURES = {"concurrency": concurrency, "streams": streams}


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _chunk_bytes(size: int) -> int:
    """As large as a chunk's frames can be: raw, each after its length."""
    return clock.CHUNK_FRAMES * (3 * size**2 + 4)


@dataclass(frozen=True)
class SharedMemory(Triton):
    """A server on this machine that writes frames where the viewer reads them: gRPC carries only the request."""

    @contextlib.asynccontextmanager
    async def open(self, stream_id: str) -> AsyncIterator[Connection]:
        """See `loadtests.streams.Target`."""
        async with self.channel() as channel:
            connection = _SharedConnection(self, stream_id, channel, self.metadata(stream_id))
            try:
                yield connection
            finally:
                await connection.close()


@dataclass
class _SharedConnection:
    target: Triton
    stream_id: str
    channel: Any
    metadata: Sequence[tuple[str, str]]
    regions: list[_Region] = field(default_factory=list)
    free: list[_Region] = field(default_factory=list)  # one whose request timed out may still be written: never again

    async def ask(self, ask: Ask) -> int:
        region = self.free.pop() if self.free else await self._register(ask)
        region.clear()
        output = service_pb2.ModelInferRequest()
        wanted = output.outputs.add(name="FRAMES")
        wanted.parameters["shared_memory_region"].string_param = region.name
        wanted.parameters["shared_memory_byte_size"].int64_param = region.size
        request = self.target.request(self.stream_id, ask) + output.SerializeToString()
        try:
            call = self.channel.unary_unary(METHOD)
            await call(request, timeout=TIMEOUT_SECONDS, metadata=self.metadata)
        except grpc.RpcError as error:
            raise AskError(error.code().name) from error
        self.free.append(region)
        return sum(1 for _ in region.frames(ask.chunks * clock.CHUNK_FRAMES))

    async def close(self) -> None:
        for region in self.regions:
            with contextlib.suppress(grpc.RpcError, asyncio.CancelledError):
                await self._operate("SystemSharedMemoryUnregister", name=region.name)
            region.close()

    async def _register(self, ask: Ask) -> _Region:
        # begins as a server's do: the next one that starts removes what a killed process has left
        name = f"talksplat-{os.getpid()}-0-{self.stream_id}-{time.monotonic_ns()}"
        region = _Region(name, ask.chunks * _chunk_bytes(ask.size))
        self.regions.append(region)
        try:
            await self._operate("SystemSharedMemoryRegister", name=name, key=f"/{name}", byte_size=region.size)
        except grpc.RpcError as error:
            raise AskError(error.code().name) from error
        return region

    async def _operate(self, operation: str, **what: Any) -> None:
        message = getattr(service_pb2, f"{operation}Request")(**what)
        call = self.channel.unary_unary(f"{SERVICE}/{operation}")
        await call(message.SerializeToString(), timeout=TIMEOUT_SECONDS, metadata=self.metadata)


class _Region:
    """Shared memory into which frames are written, each after its length."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size
        self._path = SHARED_MEMORY / name
        with self._path.open("xb+") as file:
            file.truncate(size)
            self._memory = mmap.mmap(file.fileno(), size)

    def clear(self) -> None:
        self._memory[:4] = bytes(4)

    def frames(self, most: int) -> Iterator[memoryview]:
        begin = 0
        for _ in range(most):
            [length] = struct.unpack_from("<I", self._memory, begin)
            if not 0 < length <= self.size - begin - 4:
                return
            yield memoryview(self._memory)[begin + 4 : begin + 4 + length]
            begin += 4 + length

    def close(self) -> None:
        self._memory.close()
        self._path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
