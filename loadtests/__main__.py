"""``python -m loadtests [OPTION ...]``: locust, headless, against a server of its own on free ports."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from talksplat.bench._server import serving
from talksplat.server import Server, ServerError

LOCUSTFILE = Path(__file__).with_name("locustfile.py")


def locust(server: Server, arguments: Sequence[str]) -> int:
    """Run it headless against a server; its exit code."""
    command = [
        sys.executable,
        "-m",
        "locust",
        "-f",
        str(LOCUSTFILE),
        "--headless",
        "--host",
        f"grpc://{server.grpc_url}",
    ]
    return subprocess.run([*command, *arguments], cwd=LOCUSTFILE.parent.parent).returncode


def main() -> int:
    """Start a server, load it, stop it."""
    try:
        with serving() as server:
            return locust(server, sys.argv[1:])
    except ServerError as error:
        print(f"loadtests: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
