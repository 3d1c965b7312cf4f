"""Load over time: ``--shape step`` finds where it breaks, ``--shape spike`` whether it recovers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

SPIKE_FACTOR = 3
DEFAULT_SECONDS = 60  # without --run-time


def step(seconds: float, users: int, step_users: int, step_seconds: float) -> int | None:
    """``step_users`` more every ``step_seconds``, up to ``users``; None when the last step is over."""
    steps = math.ceil(users / step_users)
    number = int(seconds // step_seconds)
    return min((number + 1) * step_users, users) if number < steps else None


def spike(seconds: float, users: int, run_seconds: float) -> int | None:
    """``users`` for a third of the time, three times as many for the second, ``users`` again; None when it is over."""
    if seconds >= run_seconds:
        return None
    return SPIKE_FACTOR * users if run_seconds <= 3 * seconds < 2 * run_seconds else users


class Options(Protocol):
    """Of locust's command line: its own and those of `loadtests.locustfile`."""

    num_users: int | None
    run_time: int | None  # s
    step_users: int
    step_time: float  # s


# Users at a time since the start; None when it is over.
SHAPES: dict[str, Callable[[float, Options], int | None]] = {
    "step": lambda seconds, given: step(seconds, given.num_users or 1, given.step_users, given.step_time),
    "spike": lambda seconds, given: spike(seconds, given.num_users or 1, given.run_time or DEFAULT_SECONDS),
}
