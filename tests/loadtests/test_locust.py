"""Real locust processes against the real server: what a load tester starts, and what the exit code says."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from loadtests.gate import BROKEN, PASSED
from talksplat import clock, edge
from talksplat.edge import MODULES, Address, Edge
from talksplat.server import HOST, ROOT, Ports, Server

LOCUST = [sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", "--headless", "--only-summary"]
AVATARS = ["--avatars", "red,green,blue"]
PATIENT = [  # limits that hold on any machine
    *("--slo-first-frame-p95-ms", "30000", "--slo-interrupt-p95-ms", "30000"),
    *("--slo-skew-p95-ms", "30000", "--slo-deadline-miss-pct", "100"),
]
PATIENCE = 60  # seconds; a locust that hangs at its end fails the test
needs_nginx = pytest.mark.skipif(
    not (shutil.which("nginx", path="/usr/sbin:/usr/bin:/sbin:/bin") and (MODULES / "ngx_http_lua_module.so").exists()),
    reason="nginx and its Lua module are not installed",
)


@dataclass
class Run:
    code: int
    output: str


def locust(*arguments: str, host: str, key: str | None = None) -> Run:
    environment = os.environ | ({"TALKSPLAT_API_KEY": key} if key else {})
    command = [*LOCUST, "--host", host, *AVATARS, *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    return Run(run.returncode, run.stdout + run.stderr)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def host(server: Server) -> str:
    return f"grpc://{server.grpc_url}"


def test_a_conversation_within_its_limits_passes_and_leaves_its_reports(host: str, tmp_path: Path) -> None:
    files = ["--csv", f"{tmp_path}/run", "--html", f"{tmp_path}/run.html", "--curve", f"{tmp_path}/curve.png"]
    run = locust("-u", "3", "-r", "10", "-t", "5s", *PATIENT, *files, host=host)
    assert run.code == PASSED, run.output
    assert "SLO held." in run.output
    requests = {row["Name"]: int(row["Request Count"]) for row in rows(tmp_path / "run_stats.csv")}
    assert requests["preload"] == 3
    assert requests["first frame"] >= 3
    assert requests["chunk"] > requests["first frame"]
    assert {row["Failure Count"] for row in rows(tmp_path / "run_stats.csv")} == {"0"}
    assert "idle chunk" in (tmp_path / "run.html").read_text()
    [row] = rows(tmp_path / "curve.csv")
    assert row["users"] == "3"
    assert float(row["frames_per_s"]) > 0
    assert float(row["generator_pct"]) > 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_limit_that_cannot_hold_fails_it_also_when_it_is_interrupted(host: str, tmp_path: Path) -> None:
    # what a shell starts in the background ignores Ctrl-C, and so would the tests' own child
    command = ["env", "--default-signal=INT", *LOCUST]
    command += ["--host", host, *AVATARS, "SpeakerUser", *PATIENT, "--slo-first-frame-p95-ms", "0"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + PATIENCE
        while "All users spawned" not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(3)  # somebody speaks, and has not finished yet
        process.send_signal(signal.SIGINT)
        code = process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait()
    output = (tmp_path / "log").read_text()
    assert code == BROKEN, output
    assert "SLO broken: first_frame_p95_ms" in output


def test_the_gate_sees_all_that_the_workers_measured_step_by_step(host: str, tmp_path: Path) -> None:
    shape = ["--shape", "step", "-u", "4", "--step-users", "2", "--step-time", "3", "-r", "10"]
    files = ["--csv", f"{tmp_path}/run", "--curve", f"{tmp_path}/curve.png"]
    run = locust("FlatOutUser", "--processes", "2", *shape, *files, host=host)
    assert run.code == PASSED, run.output
    requests = {row["Name"]: int(row["Request Count"]) for row in rows(tmp_path / "run_stats.csv")}  # as locust heard
    judged = re.search(r"flat out │\s*(\d+)", run.output)
    assert judged is not None
    assert int(judged[1]) >= clock.CHUNK_FRAMES * requests["chunk, flat out"]
    table = rows(tmp_path / "curve.csv")
    assert [row["users"] for row in table] == ["2", "4"]
    for row in table:
        assert float(row["frames_per_s"]) > 0
        assert float(row["chunk_p99_ms"]) >= float(row["chunk_p50_ms"]) > 0


def test_a_server_that_is_not_there_or_has_no_such_address_fails_it() -> None:
    with ThreadPoolExecutor() as pool:
        load = ["-u", "1", "-t", "2s"]
        absent = pool.submit(locust, *load, host=f"grpc://{HOST}:{Ports.free().grpc}")
        strange = pool.submit(locust, *load, host="http://127.0.0.1:1")
    assert absent.result().code == strange.result().code == BROKEN
    assert "no frame came" in absent.result().output
    assert "expected grpc://host:port, or grpcs://host:port for TLS" in strange.result().output


@needs_nginx
def test_through_the_edge_with_a_key_and_its_refusals_are_counted(server: Server, tmp_path: Path) -> None:
    address = Address(tmp_path / "certificate.pem", tmp_path / "key.pem", port=Ports.free().http)
    edge.make_certificate(address.certificate, address.certificate_key, HOST)
    file = tmp_path / "tenants.toml"
    key = edge.make_tenants(file)
    file.write_text(file.read_text().replace("streams = 8", "streams = 2"))
    before = Edge(file, [server.ports], address, tmp_path / "nginx")
    before.start()
    try:
        host, ca = f"grpcs://{address.url}", ["--ca", str(address.certificate)]
        load = ["SpeakerUser", "-u", "4", "-r", "10", "-t", "6s", *ca, *PATIENT]
        with ThreadPoolExecutor() as pool:
            known = pool.submit(locust, *load, "--allow-refused", host=host, key=key)
            unknown = pool.submit(locust, *load, host=host, key="nobody")
    finally:
        before.stop()
    assert known.result().code == PASSED, known.result().output
    assert "refused: OverloadedError" in known.result().output
    assert unknown.result().code == BROKEN
    assert "error: UnauthenticatedError" in unknown.result().output
