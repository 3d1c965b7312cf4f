"""One stream's audio: packets of any size and sample rate in, the server's samples by position out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ._exceptions import InvalidAudioError, InvalidRequestError
from ._extras import import_package

Samples: TypeAlias = npt.NDArray[np.float32]
Pcm: TypeAlias = npt.NDArray[Any] | bytes | bytearray | memoryview

MIN_RATE, MAX_RATE = 8_000, 192_000  # Hz
MAX_CHANNELS = 8
MAX_OVERSHOOT = 8.0  # full scale is 1; beyond this it is no clipping but another scale
RUN_IN = 0.015  # seconds on either side of a block, after which soxr's result differs by < 3e-7


def packets(audio: Pcm | Iterable[Pcm]) -> Iterable[Pcm]:
    """A stream's packets: a single one may stand for itself."""
    return [audio] if isinstance(audio, (np.ndarray, bytes, bytearray, memoryview)) else audio


def to_mono(packet: Pcm) -> Samples:  # [T] in [-1, 1]
    """One packet as mono float32.

    Takes float or int16 arrays, [T] or [T, channels], and bytes of little-endian int16 mono. Channels are averaged.
    Samples beyond full scale are clipped, as a sound card would.

    Raises:
        InvalidAudioError: anything else; NaN or infinity; floats on another scale than [-1, 1].
    """
    if isinstance(packet, np.ndarray):
        audio = packet
    elif isinstance(packet, (bytes, bytearray, memoryview)):
        data = bytes(packet)
        if len(data) % 2:
            raise InvalidAudioError(f"a packet of {len(data)} bytes cuts an int16 sample in half")
        audio = np.frombuffer(data, "<i2")
    else:
        raise InvalidAudioError(f"a packet is a {type(packet).__name__}, expected a NumPy array or bytes of int16")
    if audio.ndim not in (1, 2) or (audio.ndim == 2 and not 1 <= audio.shape[1] <= MAX_CHANNELS):
        raise InvalidAudioError(f"a packet has shape {list(audio.shape)}, expected [samples] or [samples, channels]")
    if audio.dtype.kind == "f":
        mono = np.array(audio, np.float32) if audio.ndim == 1 else audio.mean(axis=1, dtype=np.float32)
    elif audio.dtype == np.int16:
        mono = np.multiply(audio if audio.ndim == 1 else audio.mean(axis=1), 1 / 32768, dtype=np.float32)
    else:
        raise InvalidAudioError(f"a packet has dtype {audio.dtype}, expected float32, float64 or int16")
    if mono.size:
        peak = float(np.abs(mono).max())
        if not math.isfinite(peak):
            raise InvalidAudioError("the audio holds NaN or infinity")
        if peak > MAX_OVERSHOOT:
            raise InvalidAudioError(f"float samples reach {peak:.0f}, expected [-1, 1]: divide them by full scale")
    return np.clip(mono, -1.0, 1.0)


class Tape:
    """Samples by absolute position; silence where nothing was recorded."""

    def __init__(self, start: int = 0) -> None:
        self.start = start  # of what is kept
        self.end = start
        self._parts: list[Samples] = []  # joined only when read: packets may be single samples

    def append(self, samples: Samples) -> None:
        """Record samples at the end."""
        if samples.size:
            self._parts.append(samples)
            self.end += samples.size

    def read(self, begin: int, end: int) -> Samples:
        """A copy of [begin, end); forgotten samples can't be had again."""
        out = np.zeros(end - begin, np.float32)
        first, last = max(begin, self.start), min(end, self.end)
        if first < last:
            out[first - begin : last - begin] = self._joined()[first - self.start : last - self.start]
        return out

    def forget(self, before: int) -> None:
        """Keep only what comes from ``before`` on."""
        before = min(before, self.end)
        if before > self.start:
            kept = self._joined()[before - self.start :]
            if kept.base is not None and kept.base.size > 2 * kept.size:
                kept = kept.copy()  # lets go of the rest; done each time, it would copy a long packet over and over
            self._parts = [kept]
            self.start = before

    def _joined(self) -> Samples:
        if len(self._parts) != 1:
            self._parts = [np.concatenate(self._parts)] if self._parts else [np.zeros(0, np.float32)]
        return self._parts[0]


class Track:
    """A stream's audio at the server's sample rate.

    Other rates are converted block by block, each block with its own run-in from the samples around it. So the
    result depends neither on packet sizes nor on where a stream was cut: a block is the same whenever it is computed.

    Args:
        sample_rate: of the packets, Hz.
        target_rate: of the server, Hz.
        block: wanted granularity of the conversion, in samples at ``target_rate``.
        start: position of the first sample that will be pushed, from an earlier track's `tail`.

    Raises:
        InvalidRequestError: no usable sample rate.
        MissingExtraError: the rates differ and soxr is not installed.
    """

    def __init__(self, sample_rate: int, target_rate: int, block: int, start: int = 0) -> None:
        if not MIN_RATE <= sample_rate <= MAX_RATE:
            raise InvalidRequestError(f"the sample rate is {sample_rate!r} Hz, expected {MIN_RATE} to {MAX_RATE}")
        self._resample = _resampler(sample_rate, target_rate) if sample_rate != target_rate else None
        divisor = math.gcd(sample_rate, target_rate)
        self._rate, self._target = sample_rate // divisor, target_rate // divisor  # so many samples become so many
        self._block = math.ceil(block / self._target) * self._target
        self._run_in = math.ceil(RUN_IN * sample_rate / self._rate) * self._rate
        self._source = Tape(start)
        # the run-in of the first kept block was converted before; at the true start there is none
        first = start + self._run_in if start else 0
        self._converted = Tape(first // self._rate * self._target) if self._resample else self._source
        self._finished = False

    @property
    def end(self) -> int:
        """The position at which the audio taken so far ends; the last sample may reach beyond it in part."""
        return -(-self._source.end * self._target // self._rate)

    @property
    def ready(self) -> float:
        """The position up to which `read` is final; infinite after `finish`."""
        return math.inf if self._finished else self._converted.end

    def push(self, samples: Samples) -> None:
        """Take the next samples, at the source's rate."""
        self._source.append(samples)
        self._convert()

    def finish(self) -> None:
        """No more samples will come: what follows is silence."""
        self._finished = True
        self._convert()

    def read(self, begin: int, end: int) -> Samples:
        """Samples [begin, end) at the target rate; silence before the start and after the end."""
        return self._converted.read(begin, end)

    def tail(self, position: int) -> tuple[int, Samples]:
        """Start and samples, at the source's rate, of all that a fresh track needs to read from ``position`` on."""
        start = self._tail_start(position)
        return start, self._source.read(start, self._source.end)

    def forget(self, position: int) -> None:
        """Promise never to read or ask a `tail` before ``position``."""
        self._converted.forget(position)
        self._source.forget(self._tail_start(position))

    def _tail_start(self, position: int) -> int:
        position = min(position, self.end)
        if self._resample is None:
            return max(position, 0)
        return max(position // self._block * self._block // self._target * self._rate - self._run_in, 0)

    def _convert(self) -> None:
        if self._resample is None:
            return
        while True:
            begin = self._converted.end // self._target * self._rate
            end = begin + self._block // self._target * self._rate
            if begin >= self._source.end if self._finished else end + self._run_in > self._source.end:
                return
            around = self._resample(self._source.read(begin - self._run_in, end + self._run_in))
            skip = self._run_in // self._rate * self._target
            self._converted.append(around[skip : skip + self._block])


def _resampler(sample_rate: int, target_rate: int) -> Callable[[Samples], Samples]:
    soxr = import_package("soxr", f"audio at {sample_rate} Hz instead of the server's {target_rate} Hz")
    return lambda samples: np.asarray(soxr.resample(samples, sample_rate, target_rate), np.float32)
