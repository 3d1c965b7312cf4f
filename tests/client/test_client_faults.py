"""Connections that break, hang and come back: a stream goes on, and no frame is lost or comes twice."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_server import ScriptedServer

from talksplat_client import AsyncClient, Client, Frame, Limits, Retry, Timeout
from talksplat_client._audio import Samples

QUICK = Retry(first=0.01, longest=0.05)
FAULTS: dict[str, tuple[grpc.StatusCode, str]] = {
    "gone": (grpc.StatusCode.UNAVAILABLE, "Socket closed"),
    "stub": (grpc.StatusCode.INTERNAL, "in ensemble 'animate', Stub process 'rasterizer_0_0' is not healthy."),
    "stops": (grpc.StatusCode.CANCELLED, "server is stopping"),
    "full": (grpc.StatusCode.RESOURCE_EXHAUSTED, "all streams are taken"),
    "hangs": (grpc.StatusCode.OK, ""),
}


def noise(seconds: float, seed: int = 0) -> Samples:
    return np.random.default_rng(seed).uniform(-0.9, 0.9, round(seconds * 16_000)).astype(np.float32)


def paced(audio: Samples, seconds: float) -> Iterator[Samples]:
    """The audio, spread over so many seconds."""
    parts = np.array_split(audio, 50)
    for part in parts:
        time.sleep(seconds / len(parts))
        yield part


def windows(frames: list[Frame]) -> list[Any]:
    """What each frame was asked for with."""
    return [(frame.index, said["index"], said["audio"]) for frame in frames if (said := json.loads(frame.data))]


def play(url: Any, **options: Any) -> list[Frame]:
    """The frames of two seconds."""
    with Client(url, **options) as client:
        return list(client.animate(noise(2), avatar="ava"))


def play_asynchronously(url: Any, **options: Any) -> list[Frame]:
    async def run() -> list[Frame]:
        async with AsyncClient(url, **options) as client:
            return [frame async for frame in await client.animate(noise(2), avatar="ava")]

    return asyncio.run(run())


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    """Of `play` without a fault."""
    with ScriptedServer() as server:
        return windows(play(server.url))


@settings(max_examples=25)
@given(
    faults=st.dictionaries(
        st.tuples(st.integers(0, 12), st.integers(0, 2)),  # chunk, and how often it was asked for before
        st.sampled_from(sorted(FAULTS)),
        max_size=8,
    ),
    replicas=st.integers(1, 2),
    in_flight=st.integers(1, 4),
    play=st.sampled_from([play, play_asynchronously]),
)
def test_whatever_fails_no_frame_is_lost_and_none_comes_twice(
    expected: list[Any],
    faults: dict[tuple[int, int], str],
    replicas: int,
    in_flight: int,
    play: Callable[..., list[Frame]],
) -> None:
    def script(chunk: int, before: int, context: Any) -> None:
        fault = faults.get((chunk, before))
        if fault == "full" and chunk == 0:
            return  # a new stream that is refused ends
        if fault == "hangs":
            while context.is_active():
                time.sleep(0.005)
        elif fault:
            context.set_trailing_metadata((("retry-after", "0.02"),))
            context.abort(*FAULTS[fault])

    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(ScriptedServer(script=script)) for _ in range(replicas)]
        urls = [server.url for server in servers]
        frames = play(urls, timeout=Timeout(chunk=0.15, recovery=20), limits=Limits(in_flight), retry=QUICK)
    assert windows(frames) == expected


class Wire:
    """A relay to a server which can go silent: what is connected stays so, and nothing passes any more."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self._silent = 0  # as many of the connections
        threading.Thread(target=self._accept, daemon=True).start()

    def silence(self) -> None:
        """The connections that there are, not those to come."""
        self._silent = self.connections

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._relay, args=(near, self.connections), daemon=True).start()

    def _relay(self, near: socket.socket, number: int) -> None:
        host, _, port = self._target.rpartition(":")
        with near, socket.create_connection((host, int(port))) as far, contextlib.suppress(OSError):
            while True:
                ready, _, _ = select.select([near, far], [], [], 0.1)
                if number <= self._silent:
                    if select.select([near], [], [], 0.05)[0] and not near.recv(1, socket.MSG_PEEK):
                        return
                    time.sleep(0.05)
                    continue
                for source in ready:
                    data = source.recv(65_536)
                    if not data:
                        return
                    (far if source is near else near).sendall(data)


def test_a_peer_that_falls_silent_is_noticed_within_seconds(expected: list[Any]) -> None:
    with ScriptedServer() as server:
        wire = Wire(server.url)

        def audio() -> Iterator[Samples]:
            yield noise(2)[:16_000]
            time.sleep(0.2)
            wire.silence()
            yield noise(2)[16_000:]

        with Client(wire.url, timeout=Timeout(chunk=60)) as client:  # it isn't the chunk's time that runs out
            began = time.monotonic()
            frames = list(client.animate(audio(), avatar="ava"))
        assert windows(frames) == expected
        assert time.monotonic() - began < 20
        assert wire.connections == 2
        wire.close()


def test_streams_at_a_time_share_one_connection() -> None:
    with ScriptedServer(delay=lambda chunk: 0.01) as server, Client(server.url) as client:
        streams = [client.animate(noise(0.5), avatar="ava", seed=seed) for seed in range(20)]
        assert [len(list(stream)) for stream in streams] == [13] * 20
        assert len(server.peers) == 1


def test_a_thousand_streams_leave_nothing_behind() -> None:
    def run(client: Client, count: int) -> None:
        for number in range(count):
            stream = client.animate(noise(0.1), avatar="ava")
            if number % 3 == 0:
                next(stream)  # and no more
            elif number % 3 == 1:
                next(stream)
                stream.cancel()
            else:
                assert len(list(stream)) == 3
            del stream

    process = psutil.Process()

    def held() -> tuple[int, int, int]:
        gc.collect()
        return threading.active_count(), process.num_fds(), process.memory_info().rss

    with ScriptedServer() as server, Client(server.url) as client:
        run(client, 200)
        threads, files, memory = held()
        run(client, 1000)
        assert eventually(lambda: held()[0] <= threads + 2)
        assert held()[1] <= files + 2
        assert held()[2] - memory < 20e6
        assert len(server.peers) == 1
        assert len(client._streams) <= 2
        assert len({asked.metadata["x-talksplat-stream"] for asked in server.asked}) <= 2


def eventually(condition: Callable[[], bool], seconds: float = 5) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


NGINX = """
daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port} http2;
    keepalive_requests 5;
    location / {{ grpc_pass grpc://{upstream}; }}
  }}
}}
"""


class Nginx:
    """A real one before a server; it says GOAWAY after every fifth request."""

    def __init__(self, folder: Path, upstream: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        self.url = f"127.0.0.1:{port}"
        self._folder = folder
        (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=port, upstream=upstream))

    def start(self) -> None:
        self._process = subprocess.Popen(
            ["nginx", "-p", str(self._folder), "-c", "nginx.conf", "-e", "error.log"], stderr=subprocess.DEVNULL
        )
        host, port = self.url.split(":")
        assert eventually(lambda: socket.socket().connect_ex((host, int(port))) == 0)

    def stop(self, number: signal.Signals) -> None:
        self._process.send_signal(number)
        self._process.wait(timeout=20)

    def reload(self) -> None:
        self._process.send_signal(signal.SIGHUP)


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_an_edge_that_reloads_restarts_and_dies_costs_no_frame(tmp_path: Path, expected: list[Any]) -> None:
    with ScriptedServer() as server:
        edge = Nginx(tmp_path, server.url)
        edge.start()

        def trouble() -> Iterator[Samples]:
            for number, packet in enumerate(paced(noise(2), 1.5)):
                if number == 10:
                    edge.reload()
                elif number == 20:
                    edge.stop(signal.SIGQUIT)  # gracefully; nobody listens for a while
                elif number == 25:
                    edge.start()
                elif number == 35:
                    edge.stop(signal.SIGKILL)
                elif number == 38:
                    edge.start()
                yield packet

        try:
            with Client(edge.url) as client:
                frames = list(client.animate(trouble(), avatar="ava"))
        finally:
            edge.stop(signal.SIGTERM)
    assert windows(frames) == expected
    assert server.count == 13  # GOAWAY cost nothing; only what was refused at the door was sent again
