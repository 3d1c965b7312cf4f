"""``python -m export.experiments.model_analyzer``: Triton's Model Analyzer on single nets of this repository.

It wants a tritonserver that it can start by itself and a perf_analyzer that runs on this machine. Both are given as
scripts that set what the wheels' binaries need. Its sweep is instances and clients, the report is its own, in HTML.
Run it from the checkout; `model-analyzer.md` beside this file says what it is good for.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtests import perf_analyzer
from talksplat.bench._report import Row, report
from talksplat.server import HOST, ROOT, Ports, _environment, _Installation
from talksplat_export import registry

_SET = ("PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_MEASURED = {  # of each point: the mean of a few windows of so many milliseconds, however they differ
    "measurement-mode": "time_windows",
    "measurement-interval": 1000,
    "stability-percentage": 999,
}
_FIXED = [
    graph.name for graph in registry.GRAPHS if set(graph.ranges) == {registry.BATCH}
]  # it can make up their inputs


def main(argv: Sequence[str] | None = None) -> int:
    """Write its configuration, run it, print its table; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("nets", nargs="+", choices=_FIXED, metavar="NET", help=f"of {', '.join(_FIXED)}")
    parser.add_argument("--analyzer", type=Path, required=True, metavar="FILE", help="model-analyzer, of its own venv")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "model-analyzer", help="default: %(default)s")
    parser.add_argument("--instances", type=int, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4], metavar="N", help="default: 1 4")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    options = parser.parse_args(argv)
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "profile.yaml"
    file.write_text(json.dumps(configuration(folder, options.nets, options.instances, options.concurrency), indent=1))
    status = subprocess.run([str(options.analyzer), "profile", "--config-file", str(file)], cwd=folder).returncode
    table = folder / "report" / "results" / "metrics-model-inference.csv"
    if status or not table.is_file():
        print(f"error: {options.analyzer} ended with {status}; see {folder / 'triton.log'}.", file=sys.stderr)
        return status or 1
    report("model_analyzer", rows(table), options.json)
    return 0


def configuration(
    folder: Path, nets: Sequence[str], instances: Sequence[int], concurrency: Sequence[int]
) -> dict[str, Any]:
    """Of one run, as its YAML has it; writes the two scripts into ``folder``.

    Raises:
        ServerError: there is no tritonserver.
    """
    installation = _Installation.find()
    backends = folder / "backends"
    if not backends.exists():
        installation.assemble(backends)
    environment = _environment(installation)
    server = _script(folder / "tritonserver", installation.server, {name: environment[name] for name in _SET})
    libraries = {"LD_LIBRARY_PATH": str(perf_analyzer.FOLDER / "lib")}
    ports = Ports.free()
    return {
        "model_repository": str(ROOT / "model_repository"),
        "output_model_repository_path": str(folder / "repository"),
        "override_output_model_repository": True,
        "checkpoint_directory": str(folder / "checkpoints"),
        "export_path": str(folder / "report"),
        "triton_launch_mode": "local",
        "triton_server_path": server,
        "triton_output_path": str(folder / "triton.log"),
        "triton_server_flags": {"backend_directory": str(backends)},
        "triton_http_endpoint": f"{HOST}:{ports.http}",
        "triton_grpc_endpoint": f"{HOST}:{ports.grpc}",
        "triton_metrics_url": f"http://{HOST}:{ports.metrics}/metrics",
        "perf_analyzer_path": _script(folder / "perf_analyzer", perf_analyzer.install(), libraries),
        "client_protocol": "grpc",
        "profile_models": {
            name: {
                "cpu_only": True,
                "perf_analyzer_flags": dict(_MEASURED),
                "parameters": {"batch_sizes": [1], "concurrency": list(concurrency)},
                "model_config_parameters": {"instance_group": [{"kind": "KIND_CPU", "count": list(instances)}]},
            }
            for name in nets
        },
    }


def _script(path: Path, binary: Path, variables: Mapping[str, str]) -> str:
    lines = ["#!/bin/sh", *(f"export {name}={shlex.quote(value)}" for name, value in variables.items())]
    path.write_text("\n".join([*lines, f'exec {shlex.quote(str(binary))} "$@"']) + "\n")
    path.chmod(0o755)
    return str(path)


def rows(table: Path) -> list[Row]:
    """Its CSV, in this project's words."""
    with table.open() as file:
        return [
            {
                "net": row["Model"],
                "config": row["Model Config Path"],
                "instances": row["Instance Group"],
                "clients": int(row["Concurrency"]),
                "windows_per_s": float(row["Throughput (infer/sec)"]),
                "p99_ms": float(row["p99 Latency (ms)"]),
            }
            for row in csv.DictReader(file)
        ]


if __name__ == "__main__":
    sys.exit(main())
