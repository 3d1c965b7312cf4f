"""Word error rate and speed of `transcribe` through gRPC, on recordings with transcripts."""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton

from talksplat.bench._report import Row, report
from talksplat.clock import SAMPLE_RATE
from talksplat.server import Ports, Server

_MODELS = {416: "moonshine-base", 288: "moonshine-tiny"}  # by width


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument(
        "--set",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="recordings (16 kHz mono) and manifest.csv with the columns file and transcript",
    )


def run(arguments: argparse.Namespace) -> int:
    """Transcribe, compare, report; returns the exit status."""
    try:
        import jiwer
        import soundfile
        from whisper_normalizer.english import EnglishTextNormalizer
    except ModuleNotFoundError as error:
        print(f"{error.name} is missing: pip install -c constraints.txt '.[bench]'", file=sys.stderr)
        return 1
    manifest = arguments.set / "manifest.csv"
    if not manifest.is_file():
        print(f"There is no {manifest}.", file=sys.stderr)
        return 1
    with manifest.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))

    normalise = EnglishTextNormalizer()  # Whisper's, https://arxiv.org/abs/2212.04356, appendix C
    references, hypotheses = [], []
    heard = busy = 0.0
    with Server(ports=Ports.free()) as server, triton.InferenceServerClient(server.grpc_url) as client:
        for row in rows:
            audio, rate = soundfile.read(arguments.set / row["file"], dtype="float32")
            if audio.ndim != 1 or rate != SAMPLE_RATE:
                print(f"{row['file']} is not mono at {SAMPLE_RATE} Hz.", file=sys.stderr)
                return 1
            began = time.perf_counter()
            text = transcribe(client, audio)
            busy += time.perf_counter() - began
            heard += len(audio) / SAMPLE_RATE
            references.append(normalise(row["transcript"]))
            hypotheses.append(normalise(text))
        model = _model(client)
    result: Row = {
        "set": arguments.set.name,
        "model": model,
        "clips": len(rows),
        "seconds_of_audio": heard,
        "wer_pct": 100 * jiwer.wer(references, hypotheses),
        "ms_per_s_of_audio": 1e3 * busy / heard,
    }
    report("asr", [result], arguments.json)
    return 0


def transcribe(
    client: triton.InferenceServerClient,
    audio: np.ndarray[tuple[int], np.dtype[np.float32]],  # [T] 16 kHz mono
) -> str:
    """The text of one utterance."""
    tensor = triton.InferInput("AUDIO", [len(audio)], "FP32")
    tensor.set_data_from_numpy(audio)
    return str(client.infer("transcribe", [tensor]).as_numpy("TEXT")[0].decode())


def _model(client: triton.InferenceServerClient) -> str:
    config = client.get_model_config("asr_encoder", as_json=True)["config"]
    _, _, heads, _, size = map(int, config["output"][0]["dims"])
    return _MODELS.get(heads * size, "unknown")
