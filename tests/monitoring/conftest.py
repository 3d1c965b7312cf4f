"""One server that is watched in every way: tenants, traces, all its log, and a Prometheus that asks it."""

import os
import shutil
import time
from collections.abc import Iterator
from unittest import mock

import pytest
import tritonclient.grpc as triton
from collector import Collector
from make_avatar import write_avatar
from prometheus import SCRAPE_SECONDS, Prometheus
from waiting import wait_for
from watched import HASH, RESTARTS, TRACED, Watched

from talksplat.log import LEVEL_VARIABLE
from talksplat.metrics import PUBLISH_SECONDS
from talksplat.server import HOST, Ports, Server, Trace


@pytest.fixture(scope="session")
def ports() -> Ports:
    """Of the watched server."""
    return Ports.free()


@pytest.fixture(scope="session")
def asking(ports: Ports, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus | None]:
    """A Prometheus that asks the watched server, and another one that is not there, from before they start.

    It takes its 5 seconds until it asks anybody while the server starts.
    """
    if shutil.which("prometheus") is None:
        yield None
        return
    others = Ports.free()
    targets = [f"{HOST}:{port}" for port in (ports.metrics, others.http)]
    with Prometheus(tmp_path_factory.mktemp("prometheus") / "copy", targets, others.grpc) as prometheus:
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


@pytest.fixture(scope="session")
def prometheus(watched: Watched, asking: Prometheus | None) -> Prometheus:
    """The real one, which knows the watched server."""
    if asking is None:
        pytest.skip("Prometheus is not installed (Debian: apt install prometheus)")
    wait_for(lambda: asking.value("sum(up)") == 1)
    return asking


@pytest.fixture
def quiet(prometheus: Prometheus) -> Prometheus:
    """Prometheus, once it knows all that happened before."""
    time.sleep(PUBLISH_SECONDS + 2 * SCRAPE_SECONDS)
    return prometheus
