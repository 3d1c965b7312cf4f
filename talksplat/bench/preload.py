"""Preloading each avatar through gRPC: not in memory (cold: the median and the longest) and in memory (warm)."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton

from talksplat import avatar as bundle
from talksplat.bench._ask import operate
from talksplat.bench._report import Row, report
from talksplat.bench._server import serving
from talksplat.server import ROOT

COLD, WARM = 15, 20  # times each


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument(
        "--avatars", type=Path, default=ROOT / "avatars", help="folder of bundles; default: %(default)s"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure and report; returns the exit status."""
    rows: list[Row] = []
    with serving(avatars=arguments.avatars) as server, triton.InferenceServerClient(server.grpc_url) as client:
        for avatar in bundle.available(server.avatars):
            cold, warm = [], []
            for _ in range(COLD):
                operate(client, "unload", avatar)
                cold.append(operate(client, "preload", avatar))
            for _ in range(WARM):
                warm.append(operate(client, "preload", avatar))
            medians = {"cold_ms": float(np.median(cold)), "warm_ms": float(np.median(warm))}
            rows.append({"avatar": avatar, **medians, "cold_longest_ms": max(cold)})
    report("preload", rows, arguments.json)
    return 0
