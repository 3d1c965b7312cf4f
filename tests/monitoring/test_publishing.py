"""What the thread of metrics does to Triton's page; the page itself is played by a list."""

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from waiting import wait_for

from talksplat import metrics
from talksplat.animator import Counts, Times
from talksplat.avatar import BundleError, ProfileError, SpeechEncoderError, UnknownAvatarError
from talksplat.cache import CacheCounts
from talksplat.framing import RequestError
from talksplat.metrics import Page, Publisher, reason
from talksplat.schedule import BusyError, DeadlineError


class Family:
    """Triton's, which two threads may not touch at the same time."""

    COUNTER, GAUGE, HISTOGRAM = "COUNTER", "GAUGE", "HISTOGRAM"
    values: dict[tuple[str, str], float]
    touches: list[str]
    inside: threading.Lock
    broken = False

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.name, self.kind = name, kind

    def Metric(self, labels: dict[str, str], buckets: list[float] | None = None) -> Any:  # noqa: N802
        key = self.name, ",".join(labels.values())
        assert (buckets is not None) == (self.kind == "HISTOGRAM")
        Family.values.setdefault(key, 0)

        def put(value: float) -> None:
            assert Family.inside.acquire(blocking=False), "two threads at a time"
            time.sleep(1e-4)
            Family.touches.append(self.name)
            Family.inside.release()
            if Family.broken:
                raise RuntimeError("the server does not answer")
            Family.values[key] = value if self.kind == "GAUGE" else Family.values[key] + value

        return SimpleNamespace(increment=put, set=put, observe=put)


class Animator:
    """Counts what it is told."""

    def __init__(self) -> None:
        self.frames: dict[str, int] = {}
        self.dropped: dict[str, int] = {}
        self.plates = CacheCounts(0, 0, 0)
        self.times = Times()

    def counts(self) -> Counts:
        return Counts(dict(self.frames), {}, dict(self.dropped), {"plates": self.plates})

    def take_times(self) -> Times:
        times, self.times = self.times, Times()
        return times


@pytest.fixture
def animator() -> Animator:
    return Animator()


@pytest.fixture
def publisher(animator: Animator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Publisher]:
    monkeypatch.setattr(metrics, "PUBLISH_SECONDS", 0.02)
    Family.values, Family.touches, Family.inside, Family.broken = {}, [], threading.Lock(), False
    publisher = Publisher(Page(Family), animator, restarts=3)  # type: ignore[arg-type]
    yield publisher
    publisher.close()


def value(name: str, label: str = "") -> float:
    return Family.values.get((f"talksplat_{name}", label), -1)


def test_the_first_round_makes_every_series(publisher: Publisher) -> None:
    assert {name for name, _ in Family.values} == set(metrics.FAMILIES)
    assert {label for name, label in Family.values if name == "talksplat_refused_total"} == set(metrics.REFUSALS)
    assert value("restarts_total") == 3


def test_counters_follow_the_totals(publisher: Publisher, animator: Animator) -> None:
    for total in (4, 12, 12, 40):
        animator.frames = {"acme": total, "": 1}
        wait_for(lambda total=total: value("frames_total", "acme") == total)  # type: ignore[misc]
    assert value("frames_total", "") == 1
    assert value("dropped_chunks_total", "acme") == 0  # there before the first one is dropped


def test_gauges_follow_up_and_down(publisher: Publisher, animator: Animator) -> None:
    for held in (100, 20):
        animator.plates = CacheCounts(1, 1, held)
        wait_for(lambda held=held: value("cache_bytes", "plates") == held)  # type: ignore[misc]


def test_times_are_observed_once(publisher: Publisher, animator: Animator) -> None:
    animator.times.render.extend([2.0, 3.0])
    animator.times.chunk.append(11.0)
    wait_for(lambda: value("render_ms") == 5)
    time.sleep(0.1)
    assert (value("render_ms"), value("chunk_ms"), value("wait_ms")) == (5, 11, 0)


def test_what_does_not_change_is_not_touched_again(publisher: Publisher, animator: Animator) -> None:
    animator.frames = {"acme": 4}
    wait_for(lambda: value("frames_total", "acme") == 4)
    before = len(Family.touches)
    time.sleep(0.2)
    assert Family.touches[before:] == []


def test_only_one_thread_touches_triton_however_many_refuse(publisher: Publisher) -> None:
    def refuse() -> None:
        for _ in range(200):
            publisher.refused(RequestError("no"))

    threads = [threading.Thread(target=refuse) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_for(lambda: value("refused_total", "request") == 1600)


def test_a_server_that_does_not_answer_is_told_later(publisher: Publisher, animator: Animator) -> None:
    Family.broken = True
    animator.frames = {"acme": 4}
    publisher.refused(BusyError("full"))
    time.sleep(0.1)
    Family.broken = False
    wait_for(lambda: value("frames_total", "acme") == 4 and value("refused_total", "busy") == 1)


def test_the_last_numbers_are_published_at_the_end(publisher: Publisher, animator: Animator) -> None:
    animator.frames = {"acme": 8}
    publisher.close()
    assert value("frames_total", "acme") == 8


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (RequestError("x"), "request"),
        (ProfileError("x"), "request"),
        (SpeechEncoderError("x"), "request"),
        (UnknownAvatarError("x"), "avatar"),
        (BundleError("x"), "bundle"),
        (BusyError("x"), "busy"),
        (DeadlineError("x"), "deadline"),
        (KeyError("x"), "internal"),
    ],
)
def test_each_error_has_its_reason(error: Exception, why: str, publisher: Publisher) -> None:
    assert reason(error) == why
    publisher.refused(error)
    publisher.close()
    assert sum(value("refused_total", each) for each in metrics.REFUSALS) == (why != "deadline")
