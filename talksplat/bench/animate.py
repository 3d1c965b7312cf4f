"""Streams flat out through gRPC, by `animate` or its like of the profile: frames per second, latency, batch sizes."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton

from talksplat import avatar as bundle
from talksplat.bench._load import drive
from talksplat.bench._report import Row, report
from talksplat.bench._server import serving
from talksplat.server import ROOT

MODELS = {"animate": ("audio_encoder", "rasterizer"), "animate_huma1": ("asr_encoder", "rasterizer")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--avatar", default="ava", help="default: %(default)s")
    parser.add_argument(
        "--avatars", type=Path, default=ROOT / "avatars", help="folder of bundles; default: %(default)s"
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="N")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 256], metavar="PIXELS")
    parser.add_argument("--seconds", type=float, default=8.0, help="a row; default: %(default)s")


def run(arguments: argparse.Namespace) -> int:
    """Measure and report; returns the exit status."""
    rows: list[Row] = []
    serves = serving(arguments.avatar, arguments.avatars)
    with serves as server, triton.InferenceServerClient(server.grpc_url) as client:
        animate = bundle.read(server.avatars, arguments.avatar, bundle.AnyAvatar).model
        for size in arguments.sizes:
            for streams in arguments.streams:
                before = {model: _counts(client, model) for model in MODELS[animate]}
                timings = drive(
                    server.grpc_url, animate, arguments.avatar, streams=streams, size=size, seconds=arguments.seconds
                )
                p50, p95 = np.percentile(timings.chunk_ms, (50, 95))
                row: Row = {
                    "streams": streams,
                    "size": size,
                    "frames_per_s": timings.frames_per_s,
                    "chunk_p50_ms": float(p50),
                    "chunk_p95_ms": float(p95),
                    "first_frame_p95_ms": float(np.percentile(timings.first_frame_ms, 95)),
                }
                for model in MODELS[animate]:
                    inferences, executions = np.subtract(_counts(client, model), before[model])
                    row[f"batch_{model}"] = float(inferences / executions)
                rows.append(row)
    report("animate", rows, arguments.json)
    return 0


def _counts(client: triton.InferenceServerClient, model: str) -> tuple[int, int]:
    """Inferences and executions so far."""
    (statistics,) = client.get_inference_statistics(model).model_stats
    return statistics.inference_count, statistics.execution_count
