"""Loads of several chunks a request, of raw frames, and through shared memory; the process that takes orders."""

import asyncio
import dataclasses
import io
import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_server import ScriptedServer, answer
from tritonclient.grpc import service_pb2

from loadtests import point, streams
from loadtests.point import Order, SharedMemory
from loadtests.slo import CHUNK_SECONDS
from loadtests.streams import JPEG_BEGINS, Ask, AskError, Generator, Load, Triton, schedule, windows
from talksplat import clock
from talksplat.server import SHARED_MEMORY, Server


class _Batches(ScriptedServer):
    """Answers a request with what the generator counts as its frames, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Any] = []

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.requests.append(request)
        [chunks] = [each.shape[0] for each in request.inputs if each.name == "AUDIO"]
        return answer(FRAMES=np.full((chunks, clock.CHUNK_FRAMES), JPEG_BEGINS + b"...", object))


@given(chunks=st.integers(1, 16), index=st.integers(0, 2**40))
def test_a_request_of_several_chunks_is_a_batch_whose_frames_go_on(chunks: int, index: int) -> None:
    ask = Ask("red", 256, 7, index, b"".join(windows()[:1] * chunks), chunks)
    target = Triton("host:1", format="raw")
    request = service_pb2.ModelInferRequest.FromString(target.request("viewer-2", ask))
    assert {each.name: list(each.shape) for each in request.inputs} == {
        "AVATAR": [chunks, 1],
        "FRAME_INDEX": [chunks, 1],
        "AUDIO": [chunks, clock.WINDOW],
    }
    avatars, indices, audio = request.raw_input_contents
    assert avatars == chunks * (struct.pack("<I", 3) + b"red")
    assert np.frombuffer(indices, "<i8").tolist() == [index + 4 * chunk for chunk in range(chunks)]
    assert audio == ask.audio
    assert request.parameters["format"].string_param == "raw"
    assert "quality" not in request.parameters


@given(size=st.sampled_from([64, 128]), chunks=st.integers(1, 4), missing=st.integers(0, 1))
def test_raw_frames_are_counted_by_their_bytes(size: int, chunks: int, missing: int) -> None:
    count = clock.CHUNK_FRAMES * chunks - missing
    frames = np.full((1, count), b"\x01" * (3 * size**2), object)
    response = answer(FRAMES=frames, SPEECH=np.zeros((chunks, clock.CHUNK_FRAMES))).SerializeToString()
    assert Triton("host:1", format="raw").frames(response, Ask("red", size, 0, 0, None, chunks)) == count


def test_chunks_of_one_request_wait_for_the_voice_of_the_last(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "LEAD_SECONDS", 0.2)
    load = Load(1, ("ava",), seconds=1.3, chunks=5, chunks_per_request=3)
    with _Batches() as server:
        seen = generator.paced(Triton(server.url), load)
    expected = sum(math.ceil(stream.chunks / 3) for stream in schedule(load))
    assert len(server.requests) == expected
    assert not seen.failed_ms
    [waited] = [playout.chunk_ms for playout in seen.playouts][:1]
    assert waited[0] >= 2e3 * CHUNK_SECONDS - 1e-3  # of three: it came with the third
    assert len(waited) < 3 or waited[2] < waited[0] - 1e3 * CHUNK_SECONDS


def test_a_closed_door_is_an_error_and_no_memory_is_left(server: Server) -> None:
    """`Server(shared_memory=True)` opens it: tests/export/test_experiment.py measures through it."""

    async def ask() -> None:
        async with SharedMemory(server.grpc_url, format="raw").open("viewer-0") as connection:
            await connection.ask(Ask("red", 64, 0, 0, windows()[0]))

    with pytest.raises(AskError, match="UNAVAILABLE"):
        asyncio.run(ask())
    assert not list(SHARED_MEMORY.glob(f"talksplat-{os.getpid()}-0-*"))


def test_an_order_that_fails_is_answered_and_the_next_one_taken(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(order: Order, made_by: Generator, folder: Path) -> dict[str, Any]:
        if order.count == 1:
            raise RuntimeError("no")
        if order.count == 2:
            raise SystemExit("perf_analyzer ended with 3")
        return {"frames_per_s": 25.0}

    monkeypatch.setattr(point, "Generator", lambda: _Borrowed(generator))
    monkeypatch.setattr(point, "_MEASURES", {"concurrency": measure})
    order = Order("127.0.0.1:1", 1, "ava", 64, "concurrency", 1, 1.0)
    lines = [json.dumps(dataclasses.asdict(dataclasses.replace(order, count=count))) for count in (1, 2, 3)]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert point.main() == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"error": "RuntimeError: no"},
        {"error": "SystemExit: perf_analyzer ended with 3"},
        {"seen": {"frames_per_s": 25.0}},
    ]


class _Borrowed:
    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    def __enter__(self) -> Generator:
        return self._generator

    def __exit__(self, *_: object) -> None:
        pass
