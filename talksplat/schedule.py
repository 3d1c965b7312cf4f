"""Threads that do first what is due first, and the reasons why a chunk is not rendered at all."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from collections.abc import Callable, Iterable

_log = logging.getLogger(__name__)

Task = Callable[[], None]
Due = tuple[float, int]  # monotonic seconds, and what decides between equal ones


class NotRenderedError(RuntimeError):
    """A chunk was not begun; the message is a sentence for its sender."""


class DeadlineError(NotRenderedError):
    """Its deadline has passed: whoever wanted it has no use for it any more."""


class BusyError(NotRenderedError):
    """Too much waits already, or the threads are being stopped: another server, or this one later, can do it."""


class Schedule:
    """Threads that take up tasks, the one that is due first before the others; equal ones as they came.

    Nothing is ever interrupted, and nothing waits while a thread is free: what is due later is done earlier when
    nothing else is to do. Any thread may call anything.

    Args:
        threads: how many.
        name: what their names begin with.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._waiting: list[tuple[Due, int, Task]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, due: Due, tasks: Iterable[Task]) -> None:
        """Have tasks done, each by one thread.

        What a task raises is logged and ends nothing: who waits for it must be told by the task itself.

        Raises:
            BusyError: the schedule is closed.
        """
        with self._changed:
            if self._closed:
                raise BusyError("the server is being stopped")
            for task in tasks:
                heapq.heappush(self._waiting, (due, next(self._numbers), task))
                self._changed.notify()

    def close(self) -> None:
        """Do what waits, take no more, and end the threads. Harmless when it is closed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (task := self._next()) is not None:
            try:
                task()
            except BaseException:  # SystemExit too: a thread less would slow down everybody from now on
                _log.exception("a task failed")
            del task  # and with it what it holds, which may be large

    def _next(self) -> Task | None:
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return None
                self._changed.wait()
            return heapq.heappop(self._waiting)[2]
