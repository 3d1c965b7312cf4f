import threading
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from talksplat.fair import FairQueue

SECONDS = 10  # that nothing here takes
MOST = 5.0


class Held:
    """A queue that does nothing before it is let go; what it did then, and what it dropped."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.dropped: list[str] = []
        self._gate, self._begun = threading.Event(), threading.Event()
        self.queue: FairQueue[str] = FairQueue(self._work, self.dropped.append, MOST, "fair")
        self.queue.add("", "gate", 0)
        assert self._begun.wait(SECONDS)

    def _work(self, item: str) -> None:
        if item == "gate":
            self._begun.set()
            self._gate.wait(SECONDS)
        elif item == "broken":
            raise SystemExit
        else:
            self.done.append(item)

    def finish(self) -> list[str]:
        self._gate.set()
        self.queue.close()
        return self.done


@pytest.fixture
def held() -> Iterator[Held]:
    held = Held()
    yield held
    held.finish()


def test_tenants_come_in_turn_and_each_ones_own_in_order(held: Held) -> None:
    for item in ("a1", "a2", "a3", "b1", "b2", "c1"):
        held.queue.add(item[0], item, 1)
    assert held.finish() == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert held.dropped == []


def test_who_comes_while_another_tenants_is_done_comes_next(held: Held) -> None:
    held.queue.add("", "the same one's", 1)  # as "gate", which is being worked on
    held.queue.add("a", "another one's", 1)
    assert held.finish() == ["another one's", "the same one's"]


def test_who_sends_too_much_loses_its_oldest_and_nobody_elses(held: Held) -> None:
    for number in range(8):
        held.queue.add("a", f"a{number}", 1)
        held.queue.add("b", f"b{number}", 0.5)
    assert held.dropped == ["a0", "a1", "a2"]
    assert set(held.finish()) == {*(f"a{number}" for number in range(3, 8)), *(f"b{number}" for number in range(8))}


def test_what_costs_more_than_may_wait_is_done_if_it_waits_alone(held: Held) -> None:
    held.queue.add("a", "small", 1)
    held.queue.add("a", "large", 2 * MOST)
    assert held.dropped == ["small"]
    assert held.finish() == ["large"]


def test_an_item_that_fails_ends_nothing(held: Held) -> None:
    for item in ("broken", "next"):
        held.queue.add("a", item, 1)
    assert held.finish() == ["next"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([1.0, 2.0, 6.0])), max_size=40))
def test_everything_is_done_or_dropped_once_and_never_too_much_waits(sent: list[tuple[str, float]]) -> None:
    held = Held()
    costs = {f"{tenant}{number}": cost for number, (tenant, cost) in enumerate(sent)}
    for item, cost in costs.items():
        held.queue.add(item[0], item, cost)
    done = held.finish()
    assert Counter(done + held.dropped) == Counter(costs.keys())
    for tenant in "abc":
        kept = [item for item in done if item[0] == tenant]
        assert kept == sorted(kept, key=lambda item: int(item[1:]))
        assert sum(costs[item] for item in kept) <= MOST or len(kept) == 1
