"""Load over time: ``--shape step`` finds where it breaks, ``--shape spike`` whether it recovers."""

from __future__ import annotations

import math
from typing import Any

from locust import LoadTestShape

SPIKE_FACTOR = 3


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


class Step(LoadTestShape):
    """``--users`` is the last step; ``--step-users`` and ``--step-time`` say how it is reached."""

    abstract = True  # chosen by --shape, see locustfile.py

    def __init__(self, options: Any) -> None:
        super().__init__()
        self._options = options

    def tick(self) -> tuple[int, float] | None:
        """Users, and how many of them start a second."""
        options = self._options
        users = step(self.get_run_time(), options.num_users or 1, options.step_users, options.step_time)
        return None if users is None else (users, options.spawn_rate or options.step_users)


class Spike(LoadTestShape):
    """``--users`` before and after the spike, all of it in ``--run-time``."""

    abstract = True

    def __init__(self, options: Any) -> None:
        super().__init__()
        self._options = options

    def tick(self) -> tuple[int, float] | None:
        """Users, and how many of them start a second."""
        options = self._options
        users = spike(self.get_run_time(), options.num_users or 1, options.run_time or 60)
        return None if users is None else (users, options.spawn_rate or SPIKE_FACTOR * (options.num_users or 1))


SHAPES: dict[str, type[Step] | type[Spike]] = {"step": Step, "spike": Spike}
