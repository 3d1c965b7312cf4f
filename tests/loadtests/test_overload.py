"""What an overload run says of those that were let in and of the others."""

import numpy as np
import pytest

from loadtests.overload import REFUSED, row
from loadtests.slo import CHUNK_SECONDS, Playout, due
from loadtests.streams import Load, Paced


def playout(delay: float) -> Playout:
    return Playout.of(0.0, [due(0.0, number) + delay for number in range(25)])


def paced(playouts: list[Playout], refused: int, failed_ms: dict[str, list[float]]) -> Paced:
    return Paced(playouts, failed_ms, refused, 100.0, 10.0, 2.0, 1.0)


@pytest.mark.parametrize(("delay", "ok"), [(0.05, "yes"), (0.6, "no")])
def test_the_admitted_are_held_to_the_slo(delay: float, ok: str) -> None:
    found = row(2, Load(6, ("ava",)), paced([playout(delay)] * 2, 4, {REFUSED: [5.0] * 100}), 0.5)
    assert found["slo_ok"] == ok
    assert found["admitted_pct"] == pytest.approx(100 / 3)
    assert (found["capacity"], found["offered"]) == (2, 6)


@pytest.mark.parametrize(("slow", "ok"), [(4, "yes"), (5, "no")])
def test_of_a_hundred_refusals_more_than_ninety_five_come_in_a_tenth_of_a_second(slow: int, ok: str) -> None:
    refusals = [100.0] * (100 - slow) + [101.0] * slow
    found = row(1, Load(3, ("ava",)), paced([playout(0.05)], 2, {REFUSED: refusals}), 0.5)
    assert found["refusals_ok"] == ok
    assert found["refused_requests"] == 100
    assert found["other_failures"] == 0


def test_other_failures_are_no_refusals() -> None:
    found = row(1, Load(1, ("ava",)), paced([playout(CHUNK_SECONDS)], 0, {"UNAVAILABLE": [1.0, 2.0]}), 0.5)
    assert (found["refused_requests"], found["other_failures"]) == (0, 2)
    assert found["refusal_p95_ms"] is None
    assert np.isclose(float(found["first_frame_p95_ms"] or 0), 160)
