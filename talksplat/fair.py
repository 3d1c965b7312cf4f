"""Work of several tenants for one thread: done in turn, so that nobody waits for all that another one has sent."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Generic, TypeVar

_log = logging.getLogger(__name__)

T = TypeVar("T")


class FairQueue(Generic[T]):
    """A thread, and what waits for it: of each tenant as it came, of the tenants one after the other.

    What has been given up can't always be told from what somebody waits for. So of one tenant no more than so much
    waits; beyond that its oldest is dropped, since who sends again and again has given up what came first.

    Args:
        work: is done with one at a time, in the thread. What it raises is logged and ends nothing.
        drop: is told of one that won't be worked on, in the thread that adds another one.
        most: that may wait of one tenant, by what each costs. One by itself may cost more.
        name: of the thread.
    """

    def __init__(self, work: Callable[[T], None], drop: Callable[[T], None], most: float, name: str) -> None:
        self._work = work
        self._drop = drop
        self._most = most
        self._waiting: OrderedDict[str, deque[tuple[T, float]]] = OrderedDict()  # by tenant, whose turn is next first
        self._costs: dict[str, float] = {}  # of all that waits of a tenant
        self._served = ""  # whose turn it was last
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, tenant: str, item: T, cost: float) -> None:
        """Have an item worked on; from any thread."""
        dropped = []
        with self._changed:
            own = self._waiting.setdefault(tenant, deque())
            own.append((item, cost))
            total = self._costs.get(tenant, 0.0) + cost
            while total > self._most and len(own) > 1:
                oldest, its_cost = own.popleft()
                dropped.append(oldest)
                total -= its_cost
            self._costs[tenant] = total
            self._changed.notify()
        for each in dropped:
            self._drop(each)

    def close(self) -> None:
        """Do what waits, and end the thread. Nothing may be added any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while (found := self._next()) is not None:
            try:
                self._work(found[0])
            except BaseException:  # without the thread nobody would be served any more
                _log.exception("an item failed")
            del found  # and with it what it holds, which may be large

    def _next(self) -> tuple[T, float] | None:
        with self._changed:
            if self._served in self._waiting:  # whoever came meanwhile comes first
                self._waiting.move_to_end(self._served)
            while not self._waiting:
                if self._closed:
                    return None
                self._changed.wait()
            self._served, own = next(iter(self._waiting.items()))
            item = own.popleft()
            self._costs[self._served] -= item[1]
            if not own:
                del self._waiting[self._served], self._costs[self._served]
            return item
