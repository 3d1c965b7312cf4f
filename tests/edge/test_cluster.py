"""The edge alone, before servers that DNS lists: the real nginx, another DNS."""

import contextlib
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import wait_for

from talksplat import edge
from talksplat.edge import Address, Cluster, MissingNginxError
from talksplat.server import CANARY_FILE, HOST, Ports, Server

HEALTH = "/healthz"
READY = "/v2/health/ready"


class StopError(Exception):
    pass


class Running:
    """A cluster's edge in a thread, and the DNS that it asks."""

    def __init__(self, folder: Path, ports: Ports) -> None:
        self.hosts: list[str] | None = []
        self.is_over = False
        self.said: list[str] = []
        self.certificate, key = folder / "certificate.pem", folder / "certificate-key.pem"
        edge.make_certificate(self.certificate, key, HOST)
        self.key = edge.make_tenants(folder / "tenants.toml")
        address = Address(self.certificate, key, HOST, Ports.free().http)
        self.port = address.port
        self.cluster = Cluster(folder / "tenants.toml", "replicas", ports, address, folder / "edge", self.said.append)
        self.serving = threading.Event()
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with contextlib.suppress(StopError):
            self.cluster.run(self.serving.set)

    def addresses(self, _: str) -> list[str] | None:
        if self.is_over:
            raise StopError
        return self.hosts

    def stop(self) -> None:
        self.is_over = True
        self.thread.join(10)
        assert not self.thread.is_alive()

    def get(self, path: str) -> tuple[int, bytes]:
        context = ssl.create_default_context(cafile=str(self.certificate))
        connection = http.client.HTTPSConnection(HOST, self.port, timeout=10, context=context)
        try:
            connection.request("GET", path, headers={"Authorization": f"Bearer {self.key}"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def becomes(self, path: str, status: int) -> None:
        wait_for(lambda: self.get(path)[0] == status)


@pytest.fixture
def running(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    try:
        running = Running(tmp_path, server.ports)
    except MissingNginxError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(edge, "_DNS_SECONDS", 0.05)
    monkeypatch.setattr(edge, "addresses", running.addresses)
    running.thread.start()
    assert running.serving.wait(10)
    yield running
    running.stop()


def test_the_edge_follows_the_replicas_that_dns_lists(running: Running) -> None:
    assert running.get(READY)[0] == 503  # there is none yet, which is an answer, too
    status, body = running.get(HEALTH)
    assert (status, json.loads(body)) == (503, {"error": "No replica answers."})

    running.hosts = [HOST]
    running.becomes(READY, 200)
    running.becomes(HEALTH, 200)
    running.hosts = None  # DNS itself is down: what was known stays
    running.becomes(READY, 200)
    running.hosts = []
    running.becomes(READY, 503)
    assert running.said == ["Replicas: none.", f"Replicas: {HOST}.", "Replicas: none."]


def test_a_new_certificate_is_taken(running: Running) -> None:
    before = ssl.get_server_certificate((HOST, running.port))
    edge.make_certificate(running.certificate, running.certificate.with_name("certificate-key.pem"), HOST)
    after = running.certificate.read_text().strip()
    assert after != before.strip()
    wait_for(lambda: ssl.get_server_certificate((HOST, running.port)).strip() == after)


def test_dns_tells_nobody_from_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert edge.addresses("localhost") == [HOST]

    def fails(number: int) -> None:
        def ask(*_: object) -> None:
            raise socket.gaierror(number, "no")

        monkeypatch.setattr(socket, "getaddrinfo", ask)

    fails(socket.EAI_NONAME)
    assert edge.addresses("replicas") == []
    fails(socket.EAI_AGAIN)
    assert edge.addresses("replicas") is None


def test_a_file_is_as_old_as_the_last_canary(server: Server) -> None:
    assert server.run_dir is not None
    file = server.run_dir / CANARY_FILE
    began = time.time()
    server.canary(10)
    assert file.stat().st_mtime > began - 0.1
