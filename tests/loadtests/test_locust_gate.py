"""The gate, the curve, the shapes and the conversations, without a process of locust."""

import csv
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st

from loadtests import perf_analyzer, report
from loadtests.conversation import Voice, chunks, endless, pause_seconds, samples, speech, turn_seconds
from loadtests.faces import Faces
from loadtests.gate import BROKEN, PASSED, WORTHLESS, Figures, Kind, Stretch, Tally, judge, p95
from loadtests.shapes import SPIKE_FACTOR, spike, step
from loadtests.slo import BUFFER, CHUNK_SECONDS, FIRST_DUE_SECONDS, INTERRUPT_P95_MS, Slo, due
from talksplat import clock

QUICK = 0.02  # seconds that a chunk takes
LIMITS = Slo()
AT_EASE = {"seconds": 3.0, "processor_seconds": 0.1}  # a generator; the tests' own process hardly lasts


def stretch(kind: Kind = "speech", start: float = 0.0, count: int = 10, latency: float = QUICK) -> Stretch:
    arrivals: list[float | None] = [due(start, chunk) + latency for chunk in range(count)]
    return Stretch(kind, start, arrivals, due(start, count - 1) + latency)


def tally(*stretches: Stretch, **values: Any) -> Tally:
    made = Tally()
    made.stretches += stretches
    for name, value in values.items():
        setattr(made, name, value)
    return made


def figures(*tallies: Tally) -> Figures:
    gathered = Figures()
    for number, each in enumerate(tallies):
        gathered.add(f"worker {number}", each.drain() | AT_EASE, time.perf_counter())
    return gathered


def verdict(gathered: Figures, **values: bool) -> tuple[int, str]:
    made = judge(gathered, LIMITS, INTERRUPT_P95_MS, **values)
    return made.exit_code, str(made)


# The gate


def test_good_streams_pass() -> None:
    assert verdict(figures(tally(stretch(), stretch("idle"), stretch("flat out")))) == (PASSED, "SLO held.")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (tally(stretch(latency=0.6)), "first_frame_p95_ms is 600, beyond 500 (speech)"),
        (tally(stretch(), interrupts=[(0.0, 400.0)]), "interrupt_p95_ms is 400, beyond 300"),
        (tally(stretch(), checked=9, foreign=1), "1 of 9 frames looked at show another avatar"),
        (tally(stretch(), failures={"error": 2}), "2 requests failed: error"),
        (tally(stretch(), failures={"refused": 3}), "3 requests failed: refused"),
        (tally(), "no frame came"),
    ],
)
def test_each_limit_is_named_when_it_is_broken(broken: Tally, reason: str) -> None:
    code, sentence = verdict(figures(broken))
    assert code == BROKEN
    assert reason in sentence


def test_late_frames_break_it_on_whichever_worker_they_were_measured() -> None:
    late = stretch()
    late.arrivals[5] = late.arrivals[4] = due(0.0, 5) + BUFFER + 1.0
    assert verdict(figures(tally(stretch()), tally(stretch())))[0] == PASSED
    code, sentence = verdict(figures(tally(stretch()), tally(late)))
    assert code == BROKEN
    assert "deadline_miss_pct" in sentence


def test_refusals_can_be_allowed_but_other_failures_cannot() -> None:
    assert verdict(figures(tally(stretch(), failures={"refused": 3})), refusals_allowed=True)[0] == PASSED
    assert verdict(figures(tally(stretch(), failures={"expired": 3})), refusals_allowed=True)[0] == BROKEN


def test_a_saturated_generator_makes_the_figures_worthless_whatever_they_are() -> None:
    saturated = Figures()
    saturated.add("idle one", tally().drain() | AT_EASE, 10.0)
    saturated.add("busy one", tally(stretch()).drain() | AT_EASE | {"processor_seconds": 2.7}, 10.0)
    code, sentence = verdict(saturated)
    assert code == WORTHLESS
    assert "a load generator took 90 % of a core" in sentence


def test_times_survive_the_way_to_another_clock() -> None:
    here = stretch(start=time.perf_counter() - 5)
    message = json.loads(json.dumps(tally(here).drain()))
    there = Figures()
    there.add("worker", message, 1000.0)
    [moved] = there.stretches
    assert moved.start == pytest.approx(995, abs=0.5)
    lasted = [at - moved.start for at in moved.arrivals if at is not None]
    assert lasted == pytest.approx([at - here.start for at in here.arrivals if at is not None])


# A stretch that ends before its time


def test_after_a_failure_what_was_due_never_comes() -> None:
    cut = Stretch("speech", 0.0, [due(0.0, 0)])
    cut.close(10, due(0.0, 3), failed=True)
    assert cut.arrivals == [due(0.0, 0), None, None, None]


def test_a_chunk_under_way_at_a_barge_in_counts_only_if_it_was_missed_already() -> None:
    soon = Stretch("speech", 0.0, [due(0.0, 0)])
    soon.close(10, due(0.0, 1) + 0.01)
    assert len(soon.arrivals) == 1
    overdue = Stretch("speech", 0.0, [due(0.0, 0)])
    now = due(0.0, 1) + BUFFER + 0.01
    overdue.close(10, now)
    assert overdue.arrivals == [due(0.0, 0), now]


def test_a_first_chunk_that_never_comes_is_no_excuse() -> None:
    silent = Stretch("speech", 0.0)
    silent.close(10, due(0.0, 0) + 3.0)
    assert silent.arrivals
    assert verdict(figures(tally(silent)))[0] == BROKEN


# The curve


def test_the_curve_has_a_row_for_each_number_of_users() -> None:
    gathered = Figures()
    gathered.watch(2, 0.0)
    gathered.watch(None, 9.9)
    gathered.watch(4, 10.0)
    gathered.stretches = [stretch(start=1.0, count=40), stretch(start=11.0, count=40, latency=0.05)]
    gathered.stretches.append(stretch(start=8.0, count=20))  # begun before, ended after the change: in no row
    low, high = report.curve(gathered, LIMITS)
    assert (low["users"], high["users"]) == (2, 4)
    assert (low["streams"], high["streams"]) == (1, 1)
    assert float(low["chunk_p50_ms"] or 0) == pytest.approx(20)
    assert float(high["chunk_p50_ms"] or 0) == pytest.approx(50)
    assert low["slo_ok"]
    assert float(high["frames_per_s"] or 0) > 0


def test_the_curve_is_drawn_and_written_or_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "curve.png"
    report.write_curve(Figures(), LIMITS, str(path))
    assert not path.exists()
    gathered = Figures()
    gathered.watch(3, 0.0)
    gathered.stretches = [stretch(start=1.0), Stretch("speech", 2.0, [None], 4.0)]
    report.write_curve(gathered, LIMITS, str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    with path.with_suffix(".csv").open() as file:
        [row] = csv.DictReader(file)
    assert row["users"] == "3"
    assert row["first_frame_p95_ms"] == ""  # never
    assert sorted(each.name for each in path.parent.iterdir()) == ["curve.csv", "curve.png"]


def test_flat_out_latency_counts_from_the_answer_before() -> None:
    gathered = Figures()
    gathered.stretches = [Stretch("flat out", 1.0, [1.1, 1.3, 1.35], 1.35)]
    assert gathered.flat_out_ms() == pytest.approx([100, 200, 50])


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_p95_was_measured_and_lies_above_most(values: list[float]) -> None:
    found = p95(values)
    assert found in values
    assert sum(value <= found for value in values) >= 0.95 * len(values)


# Shapes


@given(st.integers(1, 50), st.integers(1, 10), st.floats(1, 60), st.floats(0, 4000))
def test_steps_rise_to_the_users_and_end(users: int, step_users: int, step_seconds: float, seconds: float) -> None:
    wanted = step(seconds, users, step_users, step_seconds)
    steps = math.ceil(users / step_users)
    assert (wanted is None) == (seconds // step_seconds >= steps)
    if wanted is not None:
        assert 1 <= wanted <= users
        later = step(seconds + step_seconds, users, step_users, step_seconds)
        assert later is None or later >= wanted
    assert step(0, users, step_users, step_seconds) == min(step_users, users)


def test_a_spike_is_the_second_third() -> None:
    assert [spike(t, 4, 30) for t in (0, 9.9, 10, 19.9, 20, 29.9, 30)] == [4, 4, 12, 12, 4, 4, None]
    assert SPIKE_FACTOR == 3


# Conversations


def test_people_take_turns_of_natural_lengths() -> None:
    rng = random.Random(1)
    turns = [turn_seconds(rng) for _ in range(2000)]
    pauses = [pause_seconds(rng) for _ in range(2000)]
    assert np.median(turns) == pytest.approx(3.5, rel=0.1)
    assert np.median(pauses) == pytest.approx(2.0, rel=0.1)
    assert 0.8 <= min(turns) <= max(turns) <= 11
    assert 0.3 <= min(pauses) <= max(pauses) <= 10
    assert samples(chunks(max(turns))) < len(speech())


def test_a_voice_gives_no_sample_before_its_time_and_can_be_hushed() -> None:
    said = speech()[: samples(1)]
    start = time.perf_counter()
    voice = Voice(said, start, patience=0.05)
    heard = 0
    for packet in voice:
        heard += len(packet)
        assert time.perf_counter() - start >= heard / clock.SAMPLE_RATE
    assert heard == len(said)
    assert time.perf_counter() - start >= FIRST_DUE_SECONDS + 0.05
    hushed = Voice(speech(), time.perf_counter(), patience=60)
    for _ in hushed:
        hushed.hush()
    assert hushed.late >= 0


def test_endless_speech_goes_round() -> None:
    stream = endless(random.Random(0))
    heard = np.concatenate([next(stream) for _ in range(len(speech()) // clock.CHUNK_SAMPLES + 5)])
    assert len(heard) > len(speech())
    assert np.abs(heard).max() > 0.1


# Faces


def picture(color: tuple[int, int, int], shift: int = 0, side: int = 64) -> bytes:
    pixels = np.full((side, side, 3), 120, np.uint8)
    pixels[side // 4 :, side // 4 + shift : -side // 4 + shift] = color
    return bytes(simplejpeg.encode_jpeg(pixels))


@pytest.mark.parametrize("side", [64, 256, 512])
def test_another_avatars_face_is_noticed_and_a_moved_one_is_not(side: int) -> None:
    faces = Faces()
    red, blue = (200, 30, 30), (30, 30, 200)
    assert not faces.is_foreign("red", picture(red, side=side))
    assert not faces.is_foreign("blue", picture(blue, side=side))
    assert not faces.is_foreign("red", picture(red, shift=side // 16, side=side))
    assert faces.is_foreign("red", picture(blue, shift=side // 16, side=side))


def test_faces_that_look_alike_raise_no_alarm() -> None:
    faces = Faces()
    for avatar in ("one", "twin"):
        assert not faces.is_foreign(avatar, picture((200, 30, 30)))
    assert not faces.is_foreign("one", picture((190, 40, 30), shift=3))


# perf_analyzer


def test_both_tools_get_a_row_with_the_same_units(tmp_path: Path) -> None:
    table = tmp_path / "theirs.csv"
    table.write_text(
        "Concurrency,Inferences/Second,p50 latency,p90 latency,p95 latency,p99 latency,\n"
        "2,50.5,20000,21000,30000,40000,\n"
    )
    ours = {"users": 2.0, "frames_per_s": 101.0, "generator_pct": 9.0}
    ours |= {f"chunk_{each}_ms": 19.0 for each in ("p50", "p95", "p99")}
    theirs_row, ours_row = perf_analyzer.compared(2, perf_analyzer.only_row(table), ours)
    assert theirs_row["frames_per_s"] == 4 * 50.5
    assert theirs_row["chunk_p95_ms"] == 30.0
    assert ours_row["rate_ratio"] == 0.5
    assert ours_row["generator_pct"] == 9.0


def test_its_requests_are_windows_of_speech_in_order() -> None:
    made = perf_analyzer.windows("ava")
    assert len(made) == perf_analyzer.WINDOWS
    first, second = (np.array(each["AUDIO"]["content"]) for each in made[:2])
    assert len(first) == clock.WINDOW
    assert (first[clock.CHUNK_SAMPLES :] == second[: -clock.CHUNK_SAMPLES]).all()
    assert made[1]["FRAME_INDEX"]["content"] == [clock.CHUNK_FRAMES]
    assert len(speech()) > CHUNK_SECONDS * perf_analyzer.WINDOWS * clock.SAMPLE_RATE
