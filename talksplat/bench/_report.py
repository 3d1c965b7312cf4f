"""What every benchmark shares: the machine's name, the commit, the JSON file and the table."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from rich.console import Console
from rich.table import Column, Table

from talksplat.files import replacing

Row: TypeAlias = dict[str, str | int | float | None]

WIDEST = 20  # columns that fit beside each other; more of them go down, and rows across,
ACROSS = 12  # so many in a table


def machine() -> str:
    """One line that says where the figures come from: processor, cores, widest vectors, system."""
    model, flags = platform.processor() or platform.machine(), ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = value
    vectors = next((name for name in ("avx512f", "avx2") if name in flags.split()), "no AVX2")
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, {vectors}, Linux {platform.release()}, Python {platform.python_version()}"


def commit() -> str:
    """The checked-out commit, with ``-dirty`` where files differ; ``unknown`` outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def report(
    name: str, rows: Sequence[Row], json_path: Path | None, further: Mapping[str, Sequence[Row]] | None = None
) -> None:
    """Print ``rows`` as a table, and ``further`` ones by title; where a path is given, write all as JSON."""
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a log is not cut to 80 columns
    console.print(f"{name}: {machine()}", *_tables(rows), highlight=False, sep="\n")
    for title, others in (further or {}).items():
        console.print(title, *_tables(others), highlight=False, sep="\n")
    if json_path is not None:
        document = {"machine": machine(), "commit": commit(), "rows": list(rows), **(further or {})}
        with replacing(json_path) as unfinished:
            unfinished.write_text(json.dumps(document, indent=1) + "\n")


def _tables(rows: Sequence[Row]) -> list[Table]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if len(columns) <= WIDEST:
        return [_table([columns, *(_cells(row, columns) for row in rows)])]
    blocks = [rows[begin : begin + ACROSS] for begin in range(0, len(rows), ACROSS)]
    return [_table(list(zip(columns, *(_cells(row, columns) for row in block), strict=True))) for block in blocks]


def _table(lines: Sequence[Sequence[str]]) -> Table:
    head, *body = lines
    table = Table(*(Column(cell, justify="right") for cell in head))
    for line in body:
        table.add_row(*line)
    return table


def _cells(row: Row, columns: Sequence[str]) -> list[str]:
    return [_cell(row.get(column)) for column in columns]


def _cell(value: str | int | float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
