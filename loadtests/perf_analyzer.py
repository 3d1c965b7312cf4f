"""``python -m loadtests.perf_analyzer``: the same load from NVIDIA's perf_analyzer and from locust, side by side.

Both keep so many requests to ``animate`` under way, each the next as soon as one is answered. perf_analyzer comes out
of the wheel of tritonclient 2.51.0, in a folder of its own beside this environment's newer client, and is run with the
libraries that nvidia-pytriton bundles.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.__main__ import locust
from loadtests.conversation import speech
from talksplat import clock
from talksplat.bench._report import Row, report
from talksplat.bench._server import serving
from talksplat.server import ROOT, Server

WHEEL = "tritonclient==2.51.0"  # the last whose perf_analyzer runs on glibc 2.36
FOLDER = ROOT / "build" / "perf_analyzer"
LIBRARIES = {
    "libb64.so.0d": "libb64-*.so.0d",
    "libcudart.so.12": "libcudart-*.so.12*",
}  # name wanted: name in the wheel
PERCENTILES = ("p50", "p95", "p99")
TRIALS = 3  # the fewest that perf_analyzer takes
WINDOWS = 25  # of speech, one after the other, that its requests repeat


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--avatar", default="ava", help="default: %(default)s")
    parser.add_argument(
        "--concurrency", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N", help="default: 1 2 4 8"
    )
    parser.add_argument("--seconds", type=int, default=10, help="of each measurement; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    options = parser.parse_args(argv)
    binary = install()
    rows: list[Row] = []
    with serving(options.avatar) as server, tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "windows.json")
        data.write_text(json.dumps({"data": windows(options.avatar)}))
        for concurrency in options.concurrency:
            theirs = analyze(binary, server.grpc_url, data, concurrency, options.seconds)
            ours = run_locust(server, options.avatar, Path(folder, "curve.png"), concurrency, options.seconds)
            rows += compared(concurrency, theirs, ours)
    report("perf_analyzer", rows, options.json)


def install() -> Path:
    """Get the binary and its libraries, if they are not here yet; its path."""
    binary = FOLDER / "bin" / "perf_analyzer"
    if not binary.is_file():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", str(FOLDER), WHEEL], check=True)
    bundled = Path(sysconfig.get_path("platlib"), "nvidia_pytriton.libs")
    (FOLDER / "lib").mkdir(exist_ok=True)
    for wanted, pattern in LIBRARIES.items():
        link = FOLDER / "lib" / wanted
        link.unlink(missing_ok=True)
        library = next(bundled.glob(pattern), None)
        if library is None:
            sys.exit(f"perf_analyzer needs {wanted} of a wheel: pip install --no-deps nvidia-pytriton")
        link.symlink_to(library)
    return binary


def windows(avatar: str) -> list[dict[str, dict[str, Any]]]:
    """Requests of a stream, as perf_analyzer reads them."""
    samples = speech()
    return [
        {
            "AUDIO": {"content": np.round(samples[begin:][: clock.WINDOW], 6).tolist(), "shape": [clock.WINDOW]},
            "AVATAR": {"content": [avatar], "shape": [1]},
            "FRAME_INDEX": {"content": [chunk * clock.CHUNK_FRAMES], "shape": [1]},
        }
        for chunk, begin in enumerate(range(0, WINDOWS * clock.CHUNK_SAMPLES, clock.CHUNK_SAMPLES))
    ]


def analyze(binary: Path, url: str, data: Path, concurrency: int, seconds: int, *options: str) -> dict[str, float]:
    """The columns of perf_analyzer's report: chunks a second, and latencies in microseconds.

    Args:
        binary: see `install`.
        url: of the server's gRPC.
        data: a file of `windows`.
        concurrency: requests at a time.
        seconds: about so long.
        options: further ones of perf_analyzer.
    """
    table = data.with_suffix(".csv")
    load = ["--concurrency-range", str(concurrency), "--measurement-interval", str(1000 * seconds // TRIALS)]
    trials = [
        "--max-trials",
        str(TRIALS),
        "--stability-percentage",
        "999",
    ]  # it reports their mean, however they differ
    command = [str(binary), "-m", "animate", "-i", "grpc", "-u", url, "--input-data", str(data), *load, *trials]
    libraries = os.pathsep.join(filter(None, [str(FOLDER / "lib"), os.environ.get("LD_LIBRARY_PATH")]))
    _run([*command, *options, "-f", str(table)], seconds, os.environ | {"LD_LIBRARY_PATH": libraries})
    return only_row(table)


def run_locust(server: Server, avatar: str, curve: Path, concurrency: int, seconds: int) -> dict[str, float]:
    """The columns of the curve that locust writes, with its one number of users."""
    load = ["--users", str(concurrency), "--spawn-rate", "100", "--run-time", f"{seconds}s", "--curve", str(curve)]
    _run(locust(server, "FlatOutUser", "--avatars", avatar, *load), seconds, os.environ)
    return only_row(curve.with_suffix(".csv"))


def only_row(table: Path) -> dict[str, float]:
    """Of a CSV file; its numbers."""
    with table.open() as file:
        [row] = csv.DictReader(file)
    return {key: float(value) for key, value in row.items() if re.fullmatch(r"[\d.]+(e[-+]?\d+)?", value)}


def compared(concurrency: int, theirs: dict[str, float], ours: dict[str, float]) -> list[Row]:
    """One row of each."""
    their_rate = clock.CHUNK_FRAMES * theirs["Inferences/Second"]
    rows: list[Row] = []
    for tool, rate, columns in (
        ("perf_analyzer", their_rate, {f"chunk_{each}_ms": theirs[f"{each} latency"] / 1e3 for each in PERCENTILES}),
        ("locust", ours["frames_per_s"], {f"chunk_{each}_ms": ours[f"chunk_{each}_ms"] for each in PERCENTILES}),
    ):
        row: Row = {"concurrency": concurrency, "tool": tool, "frames_per_s": rate, "rate_ratio": rate / their_rate}
        row.update(columns)
        rows.append(row)
    rows[-1]["generator_pct"] = ours["generator_pct"]
    return rows


def _run(command: Sequence[str], seconds: int, environment: Mapping[str, str]) -> None:
    limit = 10 * seconds + 60  # perf_analyzer can wait for a measurement without end
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
    if run.returncode:
        sys.exit(f"{Path(command[0]).name} ended with {run.returncode}:\n{run.stdout}{run.stderr}")


if __name__ == "__main__":
    main()
