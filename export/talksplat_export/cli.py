"""The command `talksplat-export`."""

from __future__ import annotations

import argparse
import importlib
import sys

# modules of this package
COMMANDS = (
    *("models", "fit", "quality", "compare", "robustness", "pretrain"),
    *("aot", "tensorrt", "derive", "experiment", "replies"),
)


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments and run a subcommand; the exit status."""
    parser = argparse.ArgumentParser(prog="talksplat-export", description=__doc__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    argv = sys.argv[1:] if argv is None else argv
    for name in COMMANDS:
        if argv[:1] == [name] or argv[:1] not in [[command] for command in COMMANDS]:  # importing all of them is slow
            importlib.import_module(f".{name}", __package__).add_parser(subparsers)
    args = parser.parse_args(argv)
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
