"""How long work shows its progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LOG_SECONDS = 20.0  # between lines where there is no terminal to draw on

Left = Callable[[float, float], float]  # share done of this work and seconds spent on it -> seconds left of all work


@contextmanager
def shown(console: Console, name: str, total: int, left: Left | None = None) -> Iterator[Callable[[int], None]]:
    """Show a bar with the time left, or lines in a log; yields a function of how much of ``total`` is done.

    Args:
        left: tells how long the whole takes that this is a part of.
    """
    began = time.monotonic()
    first: int | None = None  # what was done when this began: work may go on from an interrupt

    def times(done: int) -> str:
        nonlocal first
        first = done - 1 if first is None else first
        spent = time.monotonic() - began
        words = f"left: {duration(spent / max(done - first, 1) * (total - done))}"
        if left is not None:
            words += f", {duration(left((done - first) / max(total - first, 1), spent))} of the whole"
        return words

    if not console.is_terminal:
        logged = began

        def log(done: int) -> None:
            nonlocal logged
            now, text = time.monotonic(), times(done)
            if now - logged >= LOG_SECONDS or done == total:
                logged = now
                console.print(f"{name}: {done} of {total} in {now - began:.0f} s, {text}")

        yield log
        return
    columns = TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TextColumn("{task.fields[left]}"), console=console) as progress:
        task = progress.add_task(name, total=total, left="")
        yield lambda done: progress.update(task, completed=done, left=times(done))


def duration(seconds: float) -> str:
    """In words: ``8 s``, ``12 min``."""
    return f"{seconds:.0f} s" if seconds < 99.5 else f"{seconds / 60:.0f} min"
