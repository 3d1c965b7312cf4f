"""The main job, end to end: start Triton, animate a recording with an avatar, write the video and a report.

    python demo/demo.py [AUDIO] [--avatar ava] [--out demo/out]

Writes ``<out>/<avatar>.mp4`` and ``<out>/report.json`` and stops what it started.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from talksplat.server import Ports, Server, ServerError

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Run the demo; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("audio", nargs="?", type=Path, default=HERE / "speech.wav", help="any file that FFmpeg reads")
    parser.add_argument("--avatar", default="ava", metavar="ID")
    parser.add_argument("--out", type=Path, default=HERE / "out", metavar="FOLDER")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    video, report_file = args.out / f"{args.avatar}.mp4", args.out / "report.json"

    print("Starting Triton ...", flush=True)
    began = time.monotonic()
    try:
        with Server(ports=Ports.free()) as server:
            print(f"Serving after {time.monotonic() - began:.1f} s. Animating {args.audio.name} ...", flush=True)
            command = [sys.executable, "-m", "talksplat_client.cli", "animate", str(args.audio)]
            command += ["--url", server.grpc_url, "--avatar", args.avatar, "--out", str(video)]
            command += ["--transcript", "--json"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    except ServerError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if done.returncode:
        return done.returncode

    report = json.loads(done.stdout)
    report_file.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
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
