"""Clients that vanish in the middle of a chunk: nothing of them stays on the server."""

from __future__ import annotations

import random
import select
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Self

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException
from viewers import MARKED, Verdict, Viewers

from talksplat import clock
from talksplat.server import HOST, NO_PROXY, Server
from talksplat_client import Client

VANISHING = 200
GROWTH = 24 << 20  # bytes of all processes together, that 200 lost clients may leave: a leaked chunk is 120 kB or more
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close without a farewell


class Cord:
    """Passes one connection on to the server, and cuts it after some seconds: both ends just lose each other.

    Args:
        port: of the server.
        seconds: until it is cut.
        delay: seconds that every packet takes longer.
    """

    def __init__(self, port: int, seconds: float, delay: float = 0.0) -> None:
        self._target, self._seconds, self._delay = port, seconds, delay
        self._listener = socket.create_server((HOST, 0))
        self.url = f"{HOST}:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._pass_on, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(10)

    def _pass_on(self) -> None:
        near, _ = self._listener.accept()
        self._listener.close()  # there is no second chance
        far = socket.create_connection((HOST, self._target))
        ends, deadline = {near: far, far: near}, time.monotonic() + self._seconds
        while (left := deadline - time.monotonic()) > 0:  # who has ended reads as empty
            for end in select.select(list(ends), [], [], left)[0]:
                time.sleep(self._delay)
                ends[end].sendall(end.recv(1 << 16))
        for end in ends:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            end.close()


@pytest.mark.usefixtures("marked")
def test_clients_that_vanish_in_mid_chunk_leave_nothing(server: Server, judge: Callable[[str, Verdict], None]) -> None:
    """That every request of theirs was released shows once more when the server stops: see its fixture."""
    random.seed(0)
    answered = sum(vanish(server) for _ in range(VANISHING // 4))  # whatever is done for the first time
    before, processes = memory(server), server.pid
    with Viewers([server.grpc_url]) as viewers:
        viewers.fault()
        answered += sum(vanish(server) for _ in range(VANISHING))
        viewers.wait_until_all_see()
        judge(f"{VANISHING} clients vanish in mid chunk", viewers.verdict())
    assert answered < VANISHING, "they were to vanish before they had their answer"
    server.canary(20)
    assert pending(server) == 0
    assert memory(server) - before < GROWTH
    assert server.pid == processes
    assert server.dead_processes() is None


def vanish(server: Server) -> bool:
    """Ask for a chunk and be gone within 25 ms; whether the answer was faster."""
    with (
        Cord(server.ports.grpc, random.uniform(0, 0.025)) as cord,
        triton.InferenceServerClient(cord.url, channel_args=NO_PROXY) as client,
    ):
        arrays = {
            "AUDIO": np.zeros((1, clock.WINDOW), np.float32),
            "AVATAR": np.array([[random.choice(MARKED).encode()]], np.object_),
            "FRAME_INDEX": np.zeros((1, 1), np.int64),
        }
        types = {"AUDIO": "FP32", "AVATAR": "BYTES", "FRAME_INDEX": "INT64"}
        inputs = [
            triton.InferInput(name, array.shape, types[name]).set_data_from_numpy(array)
            for name, array in arrays.items()
        ]
        try:
            client.infer("animate", inputs, client_timeout=10)
        except InferenceServerException as error:
            if error.status() != "StatusCode.UNAVAILABLE":
                raise
            return False
        return True


def pending(server: Server) -> float:
    """Requests that wait or run, by Triton's own count."""
    with urllib.request.urlopen(server.metrics_url, timeout=10) as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("nv_inference_pending_request_count{"))


def memory(server: Server) -> int:
    """Bytes of all the server's processes that are theirs alone."""
    return sum(process.memory_full_info().uss for process in server._processes() if process.pid != psutil.Process().pid)


def test_a_server_that_is_far_away_is_reached(server: Server) -> None:
    with Cord(server.ports.grpc, 2.5, delay=0.15) as cord, Client(cord.url) as client:
        assert client.clock().fps == clock.FPS
