"""One server that is watched in every way: tenants, traces, all its log, and a Prometheus that asks it."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import tritonclient.grpc as triton
from collector import Collector
from make_avatar import write_avatar
from prometheus import SCRAPE_SECONDS, Prometheus
from waiting import wait_for
from watched import HASH, RESTARTS, TRACED, Watched

from talksplat.edge import Address, Edge, MissingNginxError, find_nginx, make_certificate
from talksplat.log import LEVEL_VARIABLE
from talksplat.metrics import PUBLISH_SECONDS
from talksplat.server import HOST, Ports, Server, Trace


@pytest.fixture(scope="session")
def ports() -> Ports:
    """Of the watched server."""
    return Ports.free()


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> Address:
    """Of the edge before it."""
    folder = tmp_path_factory.mktemp("certificate")
    return Address(folder / "certificate.pem", folder / "key.pem", port=Ports.free().http)


@pytest.fixture(scope="session")
def asking(ports: Ports, address: Address, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus | None]:
    """A Prometheus that asks the watched server and its edge, and another server that is not there.

    It is started before them: the 5 seconds that it takes until it asks anybody go by meanwhile.
    """
    if shutil.which("prometheus") is None:
        yield None
        return
    others = Ports.free()
    targets = [f"{HOST}:{port}" for port in (ports.metrics, others.http)]
    with Prometheus(tmp_path_factory.mktemp("prometheus") / "copy", targets, address.url, others.grpc) as prometheus:
        yield prometheus


@pytest.fixture(scope="session")
def watched(ports: Ports, asking: Prometheus | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Tenants: acme, who may use the avatar red, and bolt, who may use green."""
    folder = tmp_path_factory.mktemp("watched")
    for avatar_id in ("red", "green"):
        write_avatar(folder / "avatars", avatar_id)
    file = folder / "tenants.toml"
    file.write_text(
        f"""streams = 12
        [tenants.acme]
        keys = ["{HASH}"]
        avatars = ["red"]
        streams = 4
        requests_per_second = 1000
        [tenants.bolt]
        keys = []
        avatars = ["green"]
        streams = 4
        requests_per_second = 1000
        """
    )
    with Collector() as collector, mock.patch.dict(os.environ, {LEVEL_VARIABLE: "debug"}):
        trace = Trace(collector.url, every=TRACED, delay_ms=200)
        server = Server(avatars=folder / "avatars", tenants=file, trace=trace, ports=ports, run_dir=folder / "run")
        server.restarts = RESTARTS
        with server, triton.InferenceServerClient(server.grpc_url) as client:
            yield Watched(server, client, collector)
            server.kill()  # in order it would take seconds


@pytest.fixture(scope="session")
def prometheus(watched: Watched, asking: Prometheus | None) -> Prometheus:
    """The real one, which knows the watched server."""
    if asking is None:
        pytest.skip("Prometheus is not installed (Debian: apt install prometheus)")
    wait_for(lambda: asking.value("sum(up{job='talksplat'})") == 1)
    return asking


@pytest.fixture(scope="session")
def edge(watched: Watched, address: Address, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The real nginx before the watched server; its folder."""
    try:
        find_nginx()
    except MissingNginxError as error:
        pytest.skip(str(error))
    make_certificate(address.certificate, address.certificate_key, HOST)
    assert watched.server.tenants
    folder = tmp_path_factory.mktemp("edge")
    nginx = Edge(watched.server.tenants, [watched.server.ports], address, folder)
    nginx.start()
    yield folder
    nginx.stop()


@pytest.fixture
def quiet(prometheus: Prometheus) -> Prometheus:
    """Prometheus, once it knows all that happened before."""
    time.sleep(PUBLISH_SECONDS + 2 * SCRAPE_SECONDS)
    return prometheus
