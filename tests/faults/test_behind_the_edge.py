"""The same faults behind nginx, before two replicas: viewers know one address, and nothing of what breaks behind it."""

from __future__ import annotations

import re
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from supervised import stop_at_once
from viewers import PATIENCE, Verdict, Viewers, thorough

from talksplat import edge, tenants
from talksplat.server import ROOT, Ports
from talksplat_client import Tls

REPLICAS = 2
TENANTS = """streams = 99
[tenants.viewers]
keys = ["{}"]
avatars = ["*"]
streams = 99
requests_per_second = 9999
"""


@dataclass
class Secured:
    """`talksplat-server secure`, and the address that viewers know."""

    process: subprocess.Popen[bytes]
    output: Path
    url: str
    api_key: str
    tls: Tls

    def children(self, name: str) -> list[psutil.Process]:
        """Its processes with this in their name."""
        return [child for child in psutil.Process(self.process.pid).children() if name in child.name()]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.05)

    def is_whole(self) -> bool:
        """Whether nginx is healthy and every replica serves, by its metrics, which come last."""
        pages = re.findall(r"metrics +(http://\S+)", self.output.read_text())
        trust = ssl.create_default_context(cafile=self.tls.ca)
        try:
            urllib.request.urlopen(f"https://{self.url}/healthz", timeout=5, context=trust).close()
            for page in pages:
                urllib.request.urlopen(page, timeout=5).close()
        except OSError:
            return False
        return len(self.children("triton")) == REPLICAS


@pytest.fixture(scope="module")
def secured(marked_avatars: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    try:
        edge.find_nginx()
    except edge.MissingNginxError as error:
        pytest.skip(str(error))
    run_dir = tmp_path_factory.mktemp("secured")
    command = [sys.executable, "-m", "talksplat.cli", "secure", "--replicas", str(REPLICAS)]
    command += ["--free-ports", "--port", str(Ports.free().http)]
    command += ["--avatars", str(marked_avatars), "--run-dir", str(run_dir), "--tenants", str(run_dir / "own.toml")]
    key, digest = tenants.key()
    (run_dir / "own.toml").write_text(TENANTS.format(digest))
    output = run_dir / "secure.txt"
    with output.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
    secured = Secured(process, output, "", key, Tls(run_dir / "certificate.pem"))
    try:
        secured.wait_until(lambda: "Serving" in output.read_text())
        secured.url = output.read_text().partition("gRPC and HTTP")[2].split()[0]
        yield secured
    finally:
        stop_at_once(process)


def kill_nginx(secured: Secured) -> None:
    (nginx,) = secured.children("nginx")
    nginx.kill()


def kill_a_worker(secured: Secured) -> None:
    (nginx,) = secured.children("nginx")
    nginx.children()[0].kill()


def kill_a_replica(secured: Secured) -> None:
    secured.children("triton")[0].kill()


def stop_a_replica(secured: Secured) -> None:
    secured.children("triton")[0].suspend()


@pytest.mark.parametrize(
    ("what", "fault"),
    [
        ("kill -9 of nginx", kill_nginx),
        pytest.param("kill -9 of nginx's worker", kill_a_worker, marks=thorough),
        ("kill -9 of one of two replicas behind nginx", kill_a_replica),
        pytest.param("SIGSTOP of one of two replicas behind nginx", stop_a_replica, marks=thorough),
    ],
)
def test_a_fault_behind_one_address_costs_no_frame(
    secured: Secured, judge: Callable[[str, Verdict], None], what: str, fault: Callable[[Secured], None]
) -> None:
    with Viewers([secured.url], api_key=secured.api_key, tls=secured.tls) as viewers:
        time.sleep(1)
        viewers.fault()
        fault(secured)
        viewers.wait_until_all_see()
        judge(what, viewers.verdict())
    secured.wait_until(secured.is_whole)
