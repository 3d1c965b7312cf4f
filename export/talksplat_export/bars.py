"""How long work shows its progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_SECONDS = 20.0  # between lines where there is no terminal to draw on


@contextmanager
def shown(console: Console, name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar with the time left, or lines in a log; yields a function of how much of ``total`` is done."""
    if not console.is_terminal:
        began = logged = time.monotonic()

        def log(done: int) -> None:
            nonlocal logged
            now = time.monotonic()
            if now - logged >= LOG_SECONDS or done == total:
                logged, spent = now, now - began
                console.print(f"{name}: {done} of {total} in {spent:.0f} s, {spent / done * (total - done):.0f} s left")

        yield log
        return
    columns = TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(name, total=total)
        yield lambda done: progress.update(task, completed=done)
