"""What a run looked like: tables, and the curve of latency, misses and frames against the number of users."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.gate import PACED, Figures, p95
from loadtests.slo import Slo, percentiles
from talksplat import clock
from talksplat.bench._report import Row, machine, report
from talksplat.files import replacing

NOT_PRINTED = {
    "streams",
    "frames",
    "first_frame_p50_ms",
    "first_frame_p99_ms",
}  # of the curve: its table is wide enough


def print_tables(figures: Figures, limits: Slo) -> None:
    """One row a kind of traffic, then one a number of users."""
    by_users: list[Row] = [
        {key: value for key, value in row.items() if key not in NOT_PRINTED} for row in curve(figures, limits)
    ]
    for name, rows in (("by traffic", traffic(figures)), ("by users", by_users)):
        if rows:
            report(name, rows, None)


def traffic(figures: Figures) -> list[Row]:
    """One row a kind of traffic, over the whole run."""
    rows: list[Row] = []
    for kind in PACED:
        if (summary := figures.summary(kind)) is not None:
            rows.append({"traffic": kind, **summary.row()})
    if flat_out := figures.flat_out_ms():
        rows.append({"traffic": "flat out", "frames": clock.CHUNK_FRAMES * len(flat_out), **_percentiles(flat_out)})
    if interrupts := figures.interrupts_ms():
        rows.append({"traffic": "barge-in", "streams": len(interrupts), "interrupt_p95_ms": p95(interrupts)})
    return rows


def curve(figures: Figures, limits: Slo) -> list[Row]:
    """One row a number of users, of what lay wholly inside the times at which there were so many."""
    rows: list[Row] = []
    for users, levels in figures.levels().items():
        row: Row = {"users": users, "frames_per_s": clock.CHUNK_FRAMES * figures.chunks_per_s(levels)}
        flat_out = figures.flat_out_ms(levels)
        if (summary := figures.summary("speech", levels)) is not None:
            row |= summary.row() | {"slo_ok": summary.ok(limits)}
        elif flat_out:
            row |= _percentiles(flat_out)
        if interrupts := figures.interrupts_ms(levels):
            row["interrupt_p95_ms"] = p95(interrupts)
        row["generator_pct"] = figures.generator_pct(levels)
        row["generator_late_p95_ms"] = figures.generator_late_ms(levels)
        rows.append(row)
    return rows


def write_curve(figures: Figures, limits: Slo, path: str) -> None:
    """Draw the curve at ``path`` and write its rows beside it, as CSV."""
    rows = curve(figures, limits)
    if not rows:
        return
    picture = Path(path)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with replacing(picture.with_suffix(".csv")) as table, table.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    with replacing(picture) as png:
        _draw(rows, limits, png)


def _percentiles(chunk_ms: Sequence[float]) -> Row:
    p50, p95, p99 = percentiles(chunk_ms)
    return {"chunk_p50_ms": p50, "chunk_p95_ms": p95, "chunk_p99_ms": p99}


def _draw(rows: Sequence[Row], limits: Slo, path: Path) -> None:
    from matplotlib.figure import Figure  # takes half a second, which no other run should wait for

    figure = Figure(figsize=(7, 9), layout="constrained")
    latency, misses, frames = figure.subplots(3, sharex=True)
    users = [row["users"] for row in rows]

    def line(axes: Any, column: str, label: str, style: str) -> None:
        values = [np.nan if row.get(column) is None else row[column] for row in rows]
        if not np.isnan(np.array(values, float)).all():
            axes.plot(users, values, style, label=label)

    line(latency, "chunk_p50_ms", "chunk p50", "C0.:")
    line(latency, "chunk_p95_ms", "chunk p95", "C0.--")
    line(latency, "chunk_p99_ms", "chunk p99", "C0.-")
    line(latency, "first_frame_p95_ms", "first frame p95", "C1o-")
    line(latency, "interrupt_p95_ms", "barge-in to silence p95", "C2.-")
    latency.axhline(
        limits.first_frame_p95_ms, color="C1", linewidth=0.8, linestyle="--", label="limit of the first frame"
    )
    latency.set(ylabel="ms", ylim=(0, None))
    line(misses, "deadline_miss_pct", "frames that came too late", "C3o-")
    misses.axhline(limits.deadline_miss_pct, color="C3", linewidth=0.8, linestyle="--", label="limit")
    misses.set(ylabel="%", ylim=(0, None))
    line(frames, "frames_per_s", "frames a second, all users", "C4o-")
    line(frames, "generator_pct", "busiest load generator, % of a core", "C7.:")
    frames.set(xlabel="users", xticks=users, ylim=(0, None))
    for axes in (latency, misses, frames):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    latency.set_title(machine(), fontsize="small")
    figure.savefig(path, dpi=120)
