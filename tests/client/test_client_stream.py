"""The pure core of a stream: windows, frames, state, and the cuts of long utterances. Nothing here does I/O."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import struct
import tracemalloc
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_server import CLOCK, answer, inputs

from talksplat import clock as server_clock
from talksplat_client import (
    Clock,
    Frame,
    InvalidAudioError,
    InvalidRequestError,
    InvalidStateError,
    ServerError,
    StreamState,
)
from talksplat_client._audio import Samples
from talksplat_client._stream import StreamCore, UtteranceCutter

THE_CLOCK = Clock(**CLOCK)
CHUNK, WINDOW = THE_CLOCK.chunk, 14_720
NEW = StreamState("ava", THE_CLOCK, THE_CLOCK.sample_rate)


def noise(samples: int, seed: int = 0) -> Samples:
    return np.random.default_rng(seed).uniform(-0.9, 0.9, samples).astype(np.float32)


def packets(samples: Samples, sizes: Iterable[int]) -> Iterable[Samples]:
    position = 0
    for size in itertools.cycle(sizes):
        if position >= samples.size:
            return
        yield samples[position : position + size]
        position += size


def rendered(request: Any) -> Any:
    """An answer in which each frame is the window's digest and the frame's number."""
    digest = hashlib.sha256(inputs(request)["AUDIO"].tobytes()).digest()
    data = [digest + bytes([number]) for number in range(THE_CLOCK.chunk_frames)]
    return answer(FRAMES=np.array([data], object), SPEECH=np.full((1, THE_CLOCK.chunk_frames), 0.25))


def windows(core: StreamCore) -> list[tuple[int, Samples]]:
    return [(first, inputs(request)["AUDIO"][0]) for first, request in iter(core.next_request, None)]


def play(core: StreamCore, given: Iterable[Samples], until: float = math.inf) -> list[Frame]:
    """Drive a core as the clients do, at most `until` frames; the rest of `given` stays where it is."""
    shown: list[Frame] = []
    given = iter(given)
    ended = False
    while len(shown) < until:
        if (request := core.next_request()) is not None:
            for frame in core.frames(request[0], rendered(request[1])):
                if len(shown) < until:
                    core.shown(frame)
                    shown.append(frame)
        elif ended:
            break
        elif (packet := next(given, None)) is not None:
            core.push(packet)
        else:
            core.finish()
            ended = True
    return shown


def test_the_clock_that_tests_are_scripted_with_is_the_server_s() -> None:
    assert (THE_CLOCK.sample_rate, THE_CLOCK.fps) == (server_clock.SAMPLE_RATE, server_clock.FPS)
    assert (CHUNK, WINDOW) == (server_clock.CHUNK_SAMPLES, server_clock.WINDOW)
    assert THE_CLOCK.samples_per_frame == server_clock.SAMPLES_PER_FRAME


@pytest.mark.parametrize("missing", CLOCK)
def test_a_server_that_tells_no_clock_is_no_talksplat_server(missing: str) -> None:
    told = {name: str(value) for name, value in CLOCK.items()}
    assert Clock.from_parameters(told) == THE_CLOCK
    for wrong in ({**told, missing: "soon"}, {**told, missing: "-1"}, {k: v for k, v in told.items() if k != missing}):
        with pytest.raises(ServerError):
            Clock.from_parameters(wrong)


@pytest.mark.parametrize("name", ["sample_rate", "fps", "chunk_frames", "max_utterance_seconds"])
def test_a_clock_that_stands_still_is_refused(name: str) -> None:
    with pytest.raises(ServerError, match="makes no sense"):
        Clock.from_parameters({each: "0" if each == name else str(value) for each, value in CLOCK.items()})


@settings(max_examples=50)
@given(samples=st.integers(0, 30_000), sizes=st.lists(st.integers(1, 20_000), min_size=1, max_size=6))
def test_windows_hold_the_audio_once_and_packet_sizes_do_not_matter(samples: int, sizes: list[int]) -> None:
    audio = noise(samples)
    core = StreamCore(NEW, THE_CLOCK)
    found: list[tuple[int, Samples]] = []
    for packet in packets(audio, sizes):
        core.push(packet)
        found += windows(core)
        assert all(first * 640 + CHUNK + 1_920 <= samples for first, _ in found)  # none before its look-ahead is there
    core.finish()
    found += windows(core)
    padded = np.pad(audio, (10_240, WINDOW))
    assert [first for first, _ in found] == list(range(0, math.ceil(samples / 640), 4))
    for first, window in found:
        np.testing.assert_array_equal(window, padded[first * 640 :][:WINDOW])
    chunks = [window[10_240 : 10_240 + CHUNK] for _, window in found]
    np.testing.assert_array_equal(np.concatenate([*chunks, np.zeros(0, np.float32)])[:samples], audio)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("seconds", [0, 0.01, 0.04, 0.041, 0.16, 1.0, 1.001])
def test_there_is_a_frame_for_every_begun_40_ms(rate: int, seconds: float) -> None:
    samples = round(rate * seconds)
    frames = play(StreamCore(replace(NEW, sample_rate=rate), THE_CLOCK), [noise(samples)])
    assert len(frames) == math.ceil(samples * 25 / rate)
    assert [frame.index for frame in frames] == list(range(len(frames)))
    assert [frame.pts for frame in frames] == [frame.index / 25 for frame in frames]
    assert {frame.speech for frame in frames} <= {0.25}


@settings(max_examples=30)
@given(
    rate=st.sampled_from([16_000, 44_100, 8_000]),
    sizes=st.lists(st.integers(1, 9_000), min_size=1, max_size=5),
    cut=st.integers(0, 40),
)
def test_a_stream_cut_anywhere_goes_on_with_the_same_frames(rate: int, sizes: list[int], cut: int) -> None:
    audio = noise(rate * 3 // 2)
    new = replace(NEW, sample_rate=rate, seed=7)
    whole = play(StreamCore(new, THE_CLOCK), [audio])
    source = iter(packets(audio, sizes))
    first = StreamCore(new, THE_CLOCK)
    before = play(first, source, until=cut)
    state = StreamState.from_bytes(first.state().to_bytes())
    rest = list(source)
    assert state.position * rate == pytest.approx(audio.size - sum(map(len, rest)))
    after = play(StreamCore(state, THE_CLOCK), rest)
    assert before + after == whole


def test_ten_minutes_take_the_memory_of_a_second() -> None:
    second = noise(16_000)
    core = StreamCore(NEW, THE_CLOCK)
    tracemalloc.start()
    try:
        play(core, [second] * 10)
        tracemalloc.reset_peak()
        core = StreamCore(NEW, THE_CLOCK)
        shown = 0
        for _ in range(600):
            core.push(second)
            for first, request in iter(core.next_request, None):
                [*_, last] = core.frames(first, rendered(request))
                core.shown(last)
                shown += 4
        assert shown == 600 * 25 - 4  # the last chunk waits for its look-ahead
        assert tracemalloc.get_traced_memory()[1] < 3e6
        assert len(core.state().to_bytes()) < 150_000
    finally:
        tracemalloc.stop()


def test_a_refused_packet_leaves_the_stream_as_it_was() -> None:
    core = StreamCore(NEW, THE_CLOCK)
    core.push(noise(5_000))
    before = core.state().to_bytes()
    with pytest.raises(InvalidAudioError, match="NaN"):
        core.push(np.array([0.1, np.nan], np.float32))
    assert core.state().to_bytes() == before


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (answer(SPEECH=np.zeros((1, 4))), "lacks FRAMES"),
        (answer(FRAMES=np.array([[b"1", b"2"]], object), SPEECH=np.zeros((1, 2))), "2 frames, expected 4"),
        (answer(FRAMES=np.array([[b"1", b"2"]], object), SPEECH=np.zeros((1, 4))), "2 frames and 4 speech"),
    ],
)
def test_a_malformed_answer_is_a_server_error(wrong: Any, reason: str) -> None:
    core = StreamCore(NEW, THE_CLOCK)
    with pytest.raises(ServerError, match=reason):
        core.frames(0, wrong)


def test_a_truncated_answer_is_a_server_error() -> None:
    wrong = answer(FRAMES=np.array([[b"1", b"2", b"3", b"4"]], object), SPEECH=np.zeros((1, 4)))
    wrong.raw_output_contents[0] = wrong.raw_output_contents[0][:-1]
    with pytest.raises(ServerError, match="FRAMES is malformed"):
        StreamCore(NEW, THE_CLOCK).frames(0, wrong)


SOME_STATE = replace(
    NEW,
    seed=-3,
    size=256,
    format="raw",
    quality=70,
    deadline=0.5,
    listening=0.7,
    listening_before=10,
    listening_after=60,
    frame=9,
    start=123,
    samples=noise(20_000),
)


def test_a_state_survives_the_way_through_bytes() -> None:
    copy = StreamState.from_bytes(SOME_STATE.to_bytes())
    np.testing.assert_array_equal(copy.samples, SOME_STATE.samples)
    assert replace(copy, samples=NEW.samples).__dict__ == replace(SOME_STATE, samples=NEW.samples).__dict__


def as_written_by(version: int, *lacking: str) -> StreamState:
    """SOME_STATE after the way through the bytes of an earlier version."""
    body = SOME_STATE.to_bytes()[:-32]
    length = int.from_bytes(body[18:22], "little")
    values = json.loads(body[22 : 22 + length])
    for name in lacking:
        del values[name]
    header = json.dumps(values).encode()
    body = body[:16] + struct.pack("<HI", version, len(header)) + header + body[22 + length :]
    return StreamState.from_bytes(body + hashlib.sha256(body).digest())


LISTENING = ("listening", "listening_before", "listening_after")


def test_a_state_of_the_first_version_has_no_deadline_and_takes_a_new_place() -> None:
    old = as_written_by(1, "deadline", "id", *LISTENING)
    assert (old.frame, old.seed, old.deadline) == (SOME_STATE.frame, SOME_STATE.seed, None)
    assert old.id != SOME_STATE.id


def test_a_state_of_the_second_version_does_not_listen() -> None:
    old = as_written_by(2, *LISTENING)
    assert (old.frame, old.id, old.deadline) == (SOME_STATE.frame, SOME_STATE.id, SOME_STATE.deadline)
    assert (old.listening, old.listening_before, old.listening_after) == (0, 0, 0)


@settings(max_examples=50)
@given(st.data())
def test_damaged_state_is_refused(data: st.DataObject) -> None:
    state = replace(SOME_STATE, samples=noise(50)).to_bytes()
    if data.draw(st.booleans()):
        damaged = bytearray(state)
        damaged[data.draw(st.integers(0, len(state) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        damaged = bytearray(state[: data.draw(st.integers(0, len(state) - 1))])
    with pytest.raises(InvalidStateError):
        StreamState.from_bytes(bytes(damaged))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no stream state"),
        (b"\x89PNG\r\n" * 30, "no stream state"),
        (NEW.to_bytes()[:16] + b"\4" + NEW.to_bytes()[17:], "version 4.*update"),
        (NEW.to_bytes() + b"\0", "damaged"),
    ],
    ids=["nothing", "another kind of file", "of a newer client", "one byte too many"],
)
def test_foreign_and_newer_states_are_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidStateError, match=reason):
        StreamState.from_bytes(data)


def test_a_state_of_another_clock_is_refused() -> None:
    with pytest.raises(InvalidStateError, match="this one has"):
        StreamCore(NEW, replace(THE_CLOCK, look_ahead=640))


@pytest.mark.parametrize(
    "wrong",
    [
        {"avatar": ""},
        {"format": "png"},
        {"quality": 0},
        {"quality": 101},
        {"size": 0},
        {"size": 100_000},
        {"seed": 2**63},
        {"sample_rate": 100},
        {"listening": 1.5},
        {"listening_before": -1},
        {"deadline": 0},
        {"deadline": float("nan")},
        {"deadline": 1e9},
        {"id": ""},
        {"id": "a b"},
        {"id": "x" * 65},
    ],
)
def test_senseless_arguments_are_refused_before_anything_is_sent(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=r"expected|empty"):
        StreamCore(replace(NEW, **wrong), THE_CLOCK)


def pieces(audio: Samples, sizes: Iterable[int]) -> list[tuple[int, Samples]]:
    cutter = UtteranceCutter(16_000, THE_CLOCK)
    found = []
    for packet in packets(audio, sizes):
        cutter.push(packet)
        found += list(iter(cutter.next_piece, None))
    cutter.finish()
    return found + list(iter(cutter.next_piece, None))


@settings(max_examples=10)
@given(seconds=st.integers(0, 100), sizes=st.lists(st.integers(500, 90_000), min_size=1, max_size=4))
def test_long_utterances_are_cut_without_losing_a_sample(seconds: int, sizes: list[int]) -> None:
    audio = noise(seconds * 16_000 + 7)
    found = pieces(audio, sizes)
    np.testing.assert_array_equal(np.concatenate([piece for _, piece in found]), audio)
    assert max(piece.size for _, piece in found) <= 30 * 16_000
    assert [first * 640 for first, _ in found] == [0, *np.cumsum([piece.size for _, piece in found])[:-1]]


def test_up_to_half_a_minute_is_one_utterance() -> None:
    assert [piece.size for _, piece in pieces(noise(30 * 16_000), [16_000])] == [30 * 16_000]
    assert pieces(noise(0), [1]) == []


def test_the_cut_goes_through_the_pause() -> None:
    audio = noise(45 * 16_000)
    pause = slice(round(24.2 * 16_000), round(24.8 * 16_000))
    audio[pause] = 0
    [(_, first), _] = pieces(audio, [4_800])
    assert pause.start + 1_600 < first.size < pause.stop - 1_600
