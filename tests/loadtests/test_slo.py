import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.slo import BUFFER, CHUNK_SECONDS, Playout, Slo, Summary, due
from talksplat import clock

latencies = st.lists(st.one_of(st.none(), st.floats(0, 3)), min_size=1, max_size=30)  # seconds, by chunk
starts = st.floats(0, 1000)


def playout(delays: list[float | None], start: float = 0.0, buffer: float = BUFFER) -> Playout:
    return Playout.of(start, [None if d is None else due(start, k) + d for k, d in enumerate(delays)], buffer)


def test_a_request_is_due_once_its_chunk_and_the_look_ahead_have_sounded() -> None:
    assert due(10.0, 0) == pytest.approx(10.28)
    assert due(10.0, 2) == pytest.approx(10.60)


def test_a_steady_stream_misses_nothing_whatever_its_latency() -> None:
    for latency in (0.0, 0.03, 2.0):
        seen = playout([latency] * 20, start=5.0)
        assert seen.first_frame_ms == pytest.approx(1e3 * latency)
        assert not seen.missed.any()
        assert seen.skew_ms.max() == pytest.approx(0, abs=1e-6)


def test_a_late_chunk_misses_the_frames_whose_time_has_passed() -> None:
    seen = playout([0.02, 0.02 + BUFFER + 0.05, 0.02])
    # 50 ms late: frame 4 by 50 ms, frame 5 by 10 ms, frames 6 and 7 not
    assert seen.missed.tolist() == [False] * 4 + [True, True, False, False] + [False] * 4
    assert seen.skew_ms[4:8] == pytest.approx([50, 10, 0, 0], abs=1e-6)


def test_a_lost_chunk_leaves_the_picture_behind_until_the_next_one() -> None:
    seen = playout([0.02, None, 0.02])
    assert seen.missed.tolist() == [False] * 4 + [True] * 4 + [False] * 4
    assert seen.skew_ms[4:8] == pytest.approx([160, 120, 80, 40])
    assert math.isinf(seen.chunk_ms[1])


def test_without_its_first_chunk_a_stream_starts_with_the_second() -> None:
    seen = playout([None, 0.02, 0.02])
    assert seen.first_frame_ms == pytest.approx(1e3 * (CHUNK_SECONDS + 0.02))
    assert seen.missed.tolist() == [True] * 4 + [False] * 8


def test_a_stream_that_never_came_breaks_every_limit() -> None:
    summary = Summary.of([playout([None, None])])
    assert summary.deadline_miss_pct == 100
    assert len(summary.broken()) == 3
    assert summary.row()["first_frame_p95_ms"] is None


@given(latencies, starts)
def test_only_latencies_count_not_when_a_stream_began(delays: list[float | None], start: float) -> None:
    here, there = playout(delays), playout(delays, start)
    assert here.first_frame_ms == pytest.approx(there.first_frame_ms, abs=1e-6)
    np.testing.assert_allclose(here.skew_ms, there.skew_ms, atol=1e-6)


@given(latencies, st.data())
def test_a_chunk_that_comes_later_never_looks_better(delays: list[float | None], data: st.DataObject) -> None:
    chunk = data.draw(st.integers(0, len(delays) - 1))
    later = delays.copy()
    later[chunk] = data.draw(st.one_of(st.none(), st.floats(delays[chunk] or 0, 4))) if delays[chunk] else None
    if all(delay is None for delay in delays[:chunk]):
        return  # it is the one that starts the playout: later, all others have more time
    before, after = playout(delays), playout(later)
    assert (before.missed <= after.missed).all()
    assert (before.skew_ms <= after.skew_ms + 1e-6).all()


@given(latencies, st.floats(0, 1), st.floats(0, 1))
def test_a_longer_buffer_never_misses_more(delays: list[float | None], buffer: float, more: float) -> None:
    short, long = playout(delays, buffer=buffer), playout(delays, buffer=buffer + more)
    assert (long.missed <= short.missed).all()


@given(latencies)
def test_a_frame_in_time_has_no_skew_and_a_missed_one_has(delays: list[float | None]) -> None:
    seen = playout(delays)
    assert len(seen.missed) == clock.CHUNK_FRAMES * len(delays)
    assert ((seen.skew_ms > 0) == seen.missed).all()


@given(st.lists(latencies, min_size=1, max_size=8))
def test_a_summary_lies_within_what_its_streams_saw(streams: list[list[float | None]]) -> None:
    seen = [playout(delays) for delays in streams]
    summary = Summary.of(seen)
    assert summary.frames == sum(len(each.missed) for each in seen)
    assert summary.first_frame_p50_ms <= summary.first_frame_p95_ms <= summary.first_frame_p99_ms
    assert summary.first_frame_p99_ms in [each.first_frame_ms for each in seen]
    worst = max(each.second_skew_ms.max() for each in seen)
    assert summary.skew_p95_ms <= worst
    assert summary.deadline_miss_pct == pytest.approx(100 * np.mean(np.concatenate([each.missed for each in seen])))


def test_limits_hold_at_equality_and_break_above() -> None:
    summary = Summary.of([playout([0.5] * 25)])
    first = summary.first_frame_p95_ms
    assert summary.ok(Slo(first_frame_p95_ms=first))
    [sentence] = summary.broken(Slo(first_frame_p95_ms=first - 1))
    assert "first_frame_p95_ms is 500" in sentence


def test_skew_counts_the_worst_frame_of_each_second() -> None:
    steady: list[float | None] = [0.0] * 25  # 4 s
    jolt = steady.copy()
    jolt[7] = BUFFER + 0.1  # in the second second
    assert playout(jolt).second_skew_ms == pytest.approx([0, 100, 0, 0], abs=1e-6)


def test_what_is_no_playout_is_refused() -> None:
    with pytest.raises(ValueError, match="one chunk or more"):
        Playout.of(0.0, [])
    with pytest.raises(ValueError, match="before its request was due"):
        Playout.of(0.0, [0.1])
    with pytest.raises(ValueError, match="before its request was due"):
        Playout.of(0.0, [math.nan])
    with pytest.raises(ValueError, match="buffer"):
        Playout.of(0.0, [1.0], buffer=-0.1)
    with pytest.raises(ValueError, match="no stream"):
        Summary.of([])
