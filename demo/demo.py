"""The main job, end to end: start Triton, animate a recording with an avatar, write the video and a report.

    python demo/demo.py [AUDIO] [--avatar ava] [--out demo/out]

Writes ``<out>/<avatar>.mp4`` and ``<out>/report.json`` and stops what it started.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path

from talksplat.server import Ports, Server, ServerError
from talksplat_client.cli import main as talksplat

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Run the demo; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("audio", nargs="?", type=Path, default=HERE / "speech.wav", help="any file that FFmpeg reads")
    parser.add_argument("--avatar", default="ava", metavar="ID")
    parser.add_argument("--out", type=Path, default=HERE / "out", metavar="FOLDER")
    args = parser.parse_args()
    video, report_file = args.out / f"{args.avatar}.mp4", args.out / "report.json"

    answer = io.StringIO()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        print("Starting Triton ...", flush=True)
        began = time.monotonic()
        with Server(ports=Ports.free()) as server:
            print(f"Serving after {time.monotonic() - began:.1f} s. Animating {args.audio.name} ...", flush=True)
            command = ["animate", str(args.audio), "--url", server.grpc_url, "--avatar", args.avatar]
            with contextlib.redirect_stdout(answer):
                status = talksplat([*command, "--out", str(video), "--transcript", "--json"])
        if status:
            return status
        report = json.loads(answer.getvalue())
        part = report_file.with_suffix(".part")
        part.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        os.replace(part, report_file)
    except (ServerError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130

    print(f"Transcript:  {report['transcript']}")
    print(f"First frame: {report['ttff_ms']:.0f} ms after the audio was there (preload {report['preload_ms']:.0f} ms)")
    print(
        f"Speed:       {report['fps']:.0f} frames/s with H.264 encoding, {report['frames']} frames for "
        f"{report['seconds_of_audio']:.1f} s of audio"
    )
    print(f"Video:       {video}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
