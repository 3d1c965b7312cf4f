"""The command `talksplat-export`."""

from __future__ import annotations

import argparse
import sys

from . import models


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments and run a subcommand; the exit status."""
    parser = argparse.ArgumentParser(prog="talksplat-export", description=__doc__)
    models.add_parser(parser.add_subparsers(required=True, metavar="COMMAND"))
    args = parser.parse_args(argv)
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
