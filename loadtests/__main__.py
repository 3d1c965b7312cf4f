"""``python -m loadtests [OPTION ...]``: locust, headless, against a server of its own on free ports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from talksplat.bench._server import serving
from talksplat.server import ROOT, Server, ServerError

LOCUSTFILE = Path(__file__).with_name("locustfile.py")


def locust(server: Server, *arguments: str) -> list[str]:
    """The command that loads a server, without the web interface."""
    host = f"grpc://{server.grpc_url}"
    return [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--host", host, *arguments]


def main() -> int:
    """Start a server, load it, stop it."""
    try:
        with serving() as server:
            return subprocess.run(locust(server, *sys.argv[1:]), cwd=ROOT).returncode
    except ServerError as error:
        print(f"loadtests: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
