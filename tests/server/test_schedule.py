import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from talksplat.schedule import BusyError, Schedule

SECONDS = 10  # that nothing here takes


class Held:
    """A schedule of one thread that does nothing before it is let go, and what it did then, in order."""

    def __init__(self) -> None:
        self.schedule = Schedule(1, "held")
        self.done: list[object] = []
        self._gate, begun = threading.Event(), threading.Event()

        def hold() -> None:
            begun.set()
            self._gate.wait(SECONDS)

        self.schedule.add((float("-inf"), 0), [hold])
        assert begun.wait(SECONDS)

    def note(self, what: object) -> Callable[[], None]:
        return lambda: self.done.append(what)

    def finish(self) -> list[object]:
        self._gate.set()
        self.schedule.close()
        return self.done


@pytest.fixture
def held() -> Iterator[Held]:
    held = Held()
    yield held
    held.finish()


def test_what_is_due_first_is_done_first_and_equal_ones_as_they_came(held: Held) -> None:
    for due, what in ((2.0, "c"), (1.0, "a"), (3.0, "d"), (1.0, "b")):
        held.schedule.add((due, 0), [held.note(what), held.note(what * 2)])
    assert held.finish() == ["a", "aa", "b", "bb", "c", "cc", "d", "dd"]


@given(st.lists(st.tuples(st.integers(0, 5).map(float), st.integers(0, 3))))
def test_every_task_is_done_once_in_order(dues: list[tuple[float, int]]) -> None:
    held = Held()
    for number, due in enumerate(dues):
        held.schedule.add(due, [held.note((due, number))])
    assert held.finish() == sorted((due, number) for number, due in enumerate(dues))


def test_a_task_that_fails_ends_no_thread(held: Held) -> None:
    def fail(error: BaseException) -> None:
        raise error

    for error in (ValueError("so"), SystemExit(1), KeyboardInterrupt()):
        held.schedule.add((0, 0), [lambda error=error: fail(error)])  # type: ignore[misc]
    held.schedule.add((1, 0), [held.note("after")])
    assert held.finish() == ["after"]


def test_a_closed_schedule_has_done_what_waited_and_takes_no_more(held: Held) -> None:
    held.schedule.add((0, 0), [held.note("waited")])
    held.finish()
    with pytest.raises(BusyError, match="stopped"):
        held.schedule.add((0, 0), [held.note("late")])
    assert held.done == ["waited"]
    held.schedule.close()


def test_all_threads_work_at_once() -> None:
    schedule, together = Schedule(3, "three"), threading.Barrier(3)
    met: list[int] = []
    schedule.add((0, 0), [lambda: met.append(together.wait(SECONDS))] * 3)
    schedule.close()
    assert sorted(met) == [0, 1, 2]
