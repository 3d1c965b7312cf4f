"""The voice through gRPC: how soon a sentence's first piece comes, and how long the whole sentence takes."""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tritonclient.grpc as triton

from talksplat.bench._report import Row, report
from talksplat.clock import SAMPLE_RATE
from talksplat.server import ROOT, Ports, Server

_TOGETHER = (1, 2, 4)  # sentences
_LONGEST_SECONDS = 60.0  # for one of them
_REPLIES = ROOT / "model_repository" / "tts" / "1" / "replies.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="of each sentence; default: %(default)s")


def run(arguments: argparse.Namespace) -> int:
    """Speak every prepared reply, report; returns the exit status."""
    replies = json.loads(_REPLIES.read_text(encoding="utf-8"))
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
            rows.append(
                {
                    "text": text,
                    "seconds": seconds,
                    "first_piece_seconds": pieces[0][1] / SAMPLE_RATE,
                    "first_piece_ms_p50": statistics.median(firsts[1:]),
                    "first_piece_ms_p95": float(np.quantile(firsts[1:], 0.95)),
                    "pieces": len(pieces),
                    "whole_ms": whole,
                    "real_time_factor": whole / 1e3 / seconds,
                }
            )
        longest = sorted(replies, key=len)[-max(_TOGETHER) :]
        crowds = [_together(server.grpc_url, longest[-count:], arguments.repeats) for count in _TOGETHER]
    report("tts, one sentence at a time", rows, arguments.json, {"sentences that begin together": crowds})
    return 0


def _together(url: str, texts: Sequence[str], repeats: int) -> Row:
    """Each text is asked for by a client of its own, all at once, and again when all have it whole."""
    begin = threading.Barrier(len(texts), timeout=_LONGEST_SECONDS)  # else who fails leaves the others waiting

    def speak(text: str) -> tuple[list[float], list[float]]:
        firsts, wholes = [], []
        with triton.InferenceServerClient(url) as client:
            for repeat in range(repeats):
                begin.wait()
                pieces = [milliseconds for milliseconds, _ in _pieces(client, text + "\t" * (repeat + 1))]
                firsts.append(pieces[0])
                wholes.append(sum(pieces))
        return firsts, wholes

    with ThreadPoolExecutor(len(texts)) as pool:
        every = list(pool.map(speak, texts))
    firsts, wholes = (np.concatenate(each) for each in zip(*every, strict=True))
    return {
        "sentences": len(texts),
        "first_piece_ms_p50": float(np.median(firsts)),
        "first_piece_ms_p95": float(np.quantile(firsts, 0.95)),
        "whole_ms_p50": float(np.median(wholes)),
    }


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
