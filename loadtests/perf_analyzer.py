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
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loadtests.__main__ import locust
from loadtests.users import speech
from talksplat import clock
from talksplat.bench._report import Row, report
from talksplat.bench._server import serving
from talksplat.server import ROOT

WHEEL = "tritonclient==2.51.0"  # the last whose perf_analyzer runs on glibc 2.36
FOLDER = ROOT / "build" / "perf_analyzer"
LIBRARIES = {
    "libb64.so.0d": "libb64-*.so.0d",
    "libcudart.so.12": "libcudart-*.so.12*",
}  # name wanted: name in the wheel
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
            picture = Path(folder, "curve.png")
            arguments = ["FlatOutUser", "--avatars", options.avatar, "--only-summary", "--curve", str(picture)]
            load = ["--users", str(concurrency), "--spawn-rate", "100", "--run-time", f"{options.seconds + 2}s"]
            if code := locust(server, [*arguments, *load]):
                sys.exit(f"locust ended with {code}.")
            rows.append(compared(concurrency, theirs, curve_row(picture.with_suffix(".csv"))))
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
        link.symlink_to(next(bundled.glob(pattern)))
    return binary


def windows(avatar: str) -> list[dict[str, object]]:
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


def analyze(binary: Path, url: str, data: Path, concurrency: int, seconds: int) -> Row:
    """Its figures at one concurrency: chunks a second, and latencies in microseconds."""
    table = data.with_suffix(".csv")
    load = ["--concurrency-range", str(concurrency), "--measurement-interval", str(1000 * seconds)]
    once = ["--max-trials", "1", "--stability-percentage", "999"]  # locust measures once, too
    command = [str(binary), "-m", "animate", "-i", "grpc", "-u", url, "--input-data", str(data), *load, *once]
    libraries = os.pathsep.join(filter(None, [str(FOLDER / "lib"), os.environ.get("LD_LIBRARY_PATH")]))
    run = subprocess.run(
        [*command, "-f", str(table)],
        env=os.environ | {"LD_LIBRARY_PATH": libraries},
        capture_output=True,
        text=True,
        timeout=10 * seconds + 60,
    )
    if run.returncode or not table.is_file():
        sys.exit(f"perf_analyzer ended with {run.returncode}:\n{run.stdout}{run.stderr}")
    return curve_row(table)


def curve_row(table: Path) -> Row:
    """The only row of a CSV file; its numbers as such."""
    with table.open() as file:
        [row] = csv.DictReader(file)
    return {key: _number(value) for key, value in row.items()}


def compared(concurrency: int, theirs: Row, ours: Row) -> Row:
    """One row of the table."""

    def of(row: Row, column: str, scale: float = 1.0) -> float:
        value = row[column]
        assert isinstance(value, float), f"{column} is {value!r}"
        return value * scale

    their_rate, our_rate = of(theirs, "Inferences/Second", clock.CHUNK_FRAMES), of(ours, "frames_per_s")
    row: Row = {"concurrency": concurrency, "perf_analyzer_frames_per_s": their_rate, "locust_frames_per_s": our_rate}
    row["locust_to_perf_analyzer"] = our_rate / their_rate
    for percentile in ("p50", "p95", "p99"):
        row[f"perf_analyzer_{percentile}_ms"] = of(theirs, f"{percentile} latency", 1e-3)
        row[f"locust_{percentile}_ms"] = of(ours, f"chunk_{percentile}_ms")
    row["locust_generator_pct"] = of(ours, "generator_pct")
    return row


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()
