"""Three times as many streams as the machine carries, through the edge: who is let in, and what the others are told.

``talksplat-server secure`` is started with a tenants file that gives the machine ``--capacity`` streams. The paced
generator of `loadtests.streams` then offers as many streams as there is room for, and three times as many. Each row
says how those that were let in fared against the SLO of `loadtests.slo`, and how soon the others were refused with
RESOURCE_EXHAUSTED: from when a request was due, so with the generator's own delay. ``edge_ms`` is nginx's time of a
processor for one request, TLS and refusals included.

    python -m loadtests.overload --capacity 12 --json bench/overload.json
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console

from loadtests.cast import cast
from loadtests.slo import Slo, Summary
from loadtests.streams import Generator, Load, Paced, Triton
from talksplat import edge, tenants
from talksplat.bench._report import Row, report
from talksplat.server import HOST, ROOT, Ports, ServerError

REFUSED = "RESOURCE_EXHAUSTED"
REFUSAL_P95_MS = 100.0  # limit of the time in which a refusal is to be there
AVATARS = 4
START_SECONDS = 60.0
RATE = 1000.0  # requests a second of a tenant: what is limited here is streams


@dataclass(frozen=True)
class Secured:
    """A running edge, with its servers."""

    url: str
    certificate: Path
    access_log: Path
    process: psutil.Process

    def edge_seconds(self) -> float:
        """Processor time that nginx's processes have used so far."""
        seconds = 0.0
        for process in self.process.children(recursive=True):
            if process.name() == "nginx":
                times = process.cpu_times()
                seconds += times.user + times.system
        return seconds

    def requests(self) -> int:
        """That nginx has answered so far."""
        return self.access_log.read_bytes().count(b"\n")


@contextlib.contextmanager
def secured(avatars: Path, capacity: int, digest: str, run_dir: Path) -> Iterator[Secured]:
    """`talksplat-server secure` with so many streams, for one tenant by the hash of its key."""
    file, output, port = run_dir / "tenants.toml", run_dir / "output.txt", Ports.free().http
    file.write_text(
        f'streams = {capacity}\n[tenants.crowd]\nkeys = ["{digest}"]\navatars = ["*"]\n'
        f"streams = {capacity + 1}\nrequests_per_second = {RATE}\n"
    )
    command = [sys.executable, "-m", "talksplat.cli", "secure", "--free-ports", "--port", str(port)]
    command += ["--avatars", str(avatars), "--tenants", str(file), "--run-dir", str(run_dir)]
    with output.open("w") as written:
        process = subprocess.Popen(command, cwd=ROOT, stdout=written, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_SECONDS
        while "Serving" not in output.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServerError(f"The edge does not serve: {output.read_text()}")
            time.sleep(0.1)
        log = run_dir / "edge" / "access.log"
        yield Secured(f"{HOST}:{port}", run_dir / "certificate.pem", log, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(30)


def row(capacity: int, load: Load, paced: Paced, edge_ms: float) -> Row:
    """What came of one run."""
    refusals = np.array(paced.failed_ms.get(REFUSED, []))
    found: Row = {"size": load.size, "capacity": capacity, "offered": load.streams}
    found |= {"admitted_pct": 100 * len(paced.playouts) / (len(paced.playouts) + paced.refused)}
    if paced.playouts:
        summary = Summary.of(paced.playouts)
        for name in ("first_frame_p95_ms", "chunk_p95_ms", "deadline_miss_pct", "skew_p95_ms"):
            found[name] = summary.row()[name]
        found["slo_ok"] = "yes" if summary.ok(Slo()) else "no"
    p95 = float(np.percentile(refusals, 95, method="higher")) if len(refusals) else None
    found |= {"refused_requests": len(refusals), "refusal_p95_ms": p95}
    found["refusals_ok"] = None if p95 is None else "yes" if p95 <= REFUSAL_P95_MS else "no"
    found["other_failures"] = sum(len(ms) for status, ms in paced.failed_ms.items() if status != REFUSED)
    found |= {"frames_per_s": paced.frames_per_s, "edge_ms": edge_ms}
    found["generator_cores"] = paced.cpu_seconds / paced.seconds
    found["generator_lag_p99_ms"] = paced.lag_p99_ms
    return found


def measure(avatar: Path, capacity: int, size: int, seconds: float, times: tuple[int, ...] = (1, 3)) -> list[Row]:
    """One row for each multiple of the capacity that is offered."""
    key, digest = tenants.key()
    rows = []
    with tempfile.TemporaryDirectory(prefix="talksplat-overload-") as folder, Generator() as generator:
        avatars = cast(avatar, Path(folder) / "avatars", AVATARS)
        with secured(Path(folder) / "avatars", capacity, digest, Path(folder)) as before:
            target = Triton(before.url, key=key, ca=before.certificate)
            for factor in times:
                load = Load(factor * capacity, avatars, size, seconds)
                watch = Watch(before)
                paced = generator.paced(target, load, watch)
                rows.append(row(capacity, load, paced, watch.edge_ms()))
                time.sleep(3)  # all leases end
    return rows


class Watch:
    """Looks at nginx as the measured time begins and as it ends."""

    def __init__(self, before: Secured) -> None:
        self._before = before
        self._seen: list[tuple[float, int]] = []

    def __call__(self) -> None:
        """Look."""
        self._seen.append((self._before.edge_seconds(), self._before.requests()))

    def edge_ms(self) -> float:
        """Processor time of a request."""
        (began, first), (ended, last) = self._seen
        return 1e3 * (ended - began) / max(1, last - first)


def main(argv: list[str] | None = None) -> int:
    """Measure and report; the exit status says whether the admitted and the refused got what they were to get."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.overload", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--avatar", type=Path, default=ROOT / "avatars" / "ava", help="bundle; default: %(default)s")
    parser.add_argument("--capacity", type=int, default=edge.STREAMS, help="streams let in; default: %(default)s")
    parser.add_argument("--size", type=int, default=512, help="pixels a side; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=20.0, help="measured; default: %(default)s")
    arguments = parser.parse_args(argv)
    try:
        edge.find_nginx()
    except edge.MissingNginxError as error:
        Console(stderr=True).print(f"overload: left out. {error}", highlight=False)
        return 0
    rows = measure(arguments.avatar, arguments.capacity, arguments.size, arguments.seconds)
    report("overload", rows, arguments.json)
    return int(any(found.get(name) == "no" for found in rows for name in ("slo_ok", "refusals_ok")))


if __name__ == "__main__":
    sys.exit(main())
