"""Packets in, the server's samples out."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from talksplat_client import InvalidAudioError, InvalidRequestError, MissingExtraError
from talksplat_client._audio import Pcm, Samples, Tape, Track, to_mono

TARGET = 16_000
BLOCK = 640
RATES = [8_000, 11_025, 16_000, 22_050, 24_000, 44_100, 48_000, 12_345]


def noise(samples: int, seed: int = 0) -> Samples:
    return np.random.default_rng(seed).uniform(-0.9, 0.9, samples).astype(np.float32)


def cut(samples: Samples, sizes: list[int]) -> Iterator[Samples]:
    position = 0
    for size in itertools.cycle(sizes):
        if position >= samples.size:
            return
        yield samples[position : position + size]
        position += size


def everything(track: Track) -> Samples:
    track.finish()
    return track.read(0, track.end)


SPEECH = noise(100)


@pytest.mark.parametrize(
    ("packet", "tolerance"),
    [
        (SPEECH, 0),
        (SPEECH.astype(np.float64), 0),
        (np.round(SPEECH * 32768).astype(np.int16), 2e-5),
        (np.round(SPEECH * 32768).astype("<i2").tobytes(), 2e-5),
        (bytearray(np.round(SPEECH * 32768).astype("<i2").tobytes()), 2e-5),
        (SPEECH[:, None], 0),
        (np.stack([SPEECH * 0.5, SPEECH * 1.5], axis=1), 1e-6),
        (np.stack([np.round(SPEECH * 32768).astype(np.int16)] * 2, axis=1), 2e-5),
    ],
    ids=["float32", "float64", "int16", "bytes", "bytearray", "one channel", "stereo", "int16 stereo"],
)
def test_every_kind_of_packet_becomes_mono_float(packet: Pcm, tolerance: float) -> None:
    mono = to_mono(packet)
    assert mono.dtype == np.float32
    np.testing.assert_allclose(mono, SPEECH, atol=tolerance, rtol=0)


def test_a_packet_is_copied_because_sound_cards_reuse_their_buffers() -> None:
    packet = SPEECH.copy()
    mono = to_mono(packet)
    packet[:] = 0
    np.testing.assert_array_equal(mono, SPEECH)


def test_overshoot_is_clipped() -> None:
    np.testing.assert_array_equal(to_mono(np.array([-1.7, -1.0, 0.5, 1.2], np.float32)), [-1, -1, 0.5, 1])


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (np.array([0.0, np.nan], np.float32), "NaN"),
        (np.array([0.0, -np.inf]), "infinity"),
        (np.array([[0.0, np.nan]], np.float32), "NaN"),
        (np.array([0.0, 12_000.0], np.float32), "full scale"),
        (np.array([1, 2], np.int32), "int32"),
        (np.array(["a"]), "dtype"),
        (np.zeros((2, 3, 4), np.float32), "shape"),
        (np.zeros((2, 480), np.float32), r"\[samples, channels\]"),
        (np.float32(0), "float32"),
        (b"\0\0\0", "in half"),
        ("RIFF", "str"),
        (None, "NoneType"),
    ],
)
def test_anything_else_is_refused_with_the_reason(packet: Any, reason: str) -> None:
    with pytest.raises(InvalidAudioError, match=reason):
        to_mono(packet)


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 30), st.integers(-20, 200), st.integers(0, 50), st.integers(-20, 200)), max_size=20
    ),
)
def test_a_tape_is_a_long_array_with_silence_around_it(steps: list[tuple[int, int, int, int]]) -> None:
    tape, whole = Tape(), np.zeros(0, np.float32)
    for number, (size, begin, length, forget) in enumerate(steps):
        tape.append(noise(size, number))
        whole = np.concatenate([whole, noise(size, number)])
        padded = np.pad(whole, (20, 300))
        begin = max(begin, tape.start) if tape.start else begin
        np.testing.assert_array_equal(tape.read(begin, begin + length), padded[20 + begin :][:length])
        tape.forget(forget)
        assert tape.end == whole.size


@pytest.mark.parametrize("rate", RATES)
def test_every_rate_is_converted_as_if_at_once(rate: int) -> None:
    source = noise(rate)
    track = Track(rate, TARGET, BLOCK)
    for packet in cut(source, [441, 1, 3000]):
        track.push(packet)
    converted = everything(track)
    with_silence = soxr.resample(np.pad(source, rate), rate, TARGET)  # a second before and after
    np.testing.assert_allclose(converted, with_silence[TARGET : 2 * TARGET], atol=1e-6)


@settings(max_examples=40)
@given(
    rate=st.sampled_from(RATES),
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=6),
    samples=st.integers(0, 9000),
)
def test_packet_sizes_do_not_change_a_single_bit(rate: int, sizes: list[int], samples: int) -> None:
    source = noise(samples)
    at_once, in_packets = Track(rate, TARGET, BLOCK), Track(rate, TARGET, BLOCK)
    at_once.push(source)
    for packet in cut(source, sizes):
        in_packets.push(packet)
    np.testing.assert_array_equal(everything(in_packets), everything(at_once))


@pytest.mark.parametrize("rate", RATES)
def test_single_samples_are_as_good_as_one_packet(rate: int) -> None:
    source = noise(rate // 8)
    at_once, in_packets = Track(rate, TARGET, BLOCK), Track(rate, TARGET, BLOCK)
    at_once.push(source)
    for packet in cut(source, [1]):
        in_packets.push(packet)
    np.testing.assert_array_equal(everything(in_packets), everything(at_once))


@settings(max_examples=60)
@given(rate=st.sampled_from(RATES), taken=st.integers(0, 30_000), position=st.integers(-10_240, 20_000))
def test_a_track_goes_on_from_its_tail_bit_for_bit(rate: int, taken: int, position: int) -> None:
    source = noise(40_000)
    whole = Track(rate, TARGET, BLOCK)
    whole.push(source)
    first = Track(rate, TARGET, BLOCK)
    first.push(source[:taken])
    first.forget(position - 3)
    start, tail = first.tail(position)
    second = Track(rate, TARGET, BLOCK, start)
    second.push(tail)
    second.push(source[taken:])
    whole.finish()
    second.finish()
    assert second.end == whole.end
    np.testing.assert_array_equal(second.read(position, 80_000), whole.read(position, 80_000))


@pytest.mark.parametrize("rate", [0, -1, 7_999, 192_001])
def test_a_senseless_sample_rate_is_refused(rate: int) -> None:
    with pytest.raises(InvalidRequestError, match="8000 to 192000"):
        Track(rate, TARGET, BLOCK)


def test_without_soxr_the_server_s_own_rate_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soxr", None)
    track = Track(TARGET, TARGET, BLOCK)
    track.push(SPEECH)
    np.testing.assert_array_equal(everything(track), SPEECH)
    with pytest.raises(MissingExtraError, match=r"44100 Hz.*pip install 'talksplat-client\[media\]'"):
        Track(44_100, TARGET, BLOCK)
