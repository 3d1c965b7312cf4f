"""What happens to speech on its way to a microphone and through a network, as functions of samples and a random
generator.

Every function takes and returns 16 kHz mono float32 [T], keeps the length and does not shift speech in time (a label
stays true).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import av
import numpy as np
import numpy.typing as npt
import soxr
from scipy import fft

from talksplat.clock import SAMPLE_RATE

Audio: TypeAlias = npt.NDArray[np.float32]
Generator: TypeAlias = np.random.Generator

OPUS_RATES = (8000, 12000, 16000, 24000, 32000)  # bits per second


def gain(audio: Audio, db: float) -> Audio:
    """Louder or quieter by ``db``."""
    return audio * np.float32(10 ** (db / 20))


def clip(audio: Audio, db: float) -> Audio:
    """Hard clipping ``db`` below the peak."""
    limit = float(np.abs(audio).max(initial=0.0)) * 10 ** (-db / 20)
    return np.clip(audio, -limit, limit)


def _speech_power(audio: Audio) -> float:
    """Mean power of the 20 ms frames within 30 dB of the loudest: pauses do not count."""
    frames = audio[: len(audio) // 320 * 320].reshape(-1, 320)
    power = np.mean(frames**2, axis=1) if len(frames) else np.zeros(1)
    return float(power[power >= 1e-3 * power.max()].mean())


def mix(audio: Audio, noise: Audio, snr_db: float) -> Audio:
    """Add ``noise`` ``snr_db`` below the speech."""
    noise_power = float(np.mean(noise**2))
    if noise_power == 0.0:
        return audio
    return audio + noise * np.float32(np.sqrt(_speech_power(audio) / noise_power * 10 ** (-snr_db / 10)))


def coloured_noise(samples: int, exponent: float, rng: Generator) -> Audio:
    """Noise with a power spectrum of 1 / f^exponent: 0 is white, 1 pink, 2 brown."""
    spectrum = fft.rfft(rng.standard_normal(samples, dtype=np.float32))
    spectrum *= np.maximum(np.arange(len(spectrum)), 20.0 * samples / SAMPLE_RATE).astype(np.float32) ** (-exponent / 2)
    noise: Audio = fft.irfft(spectrum, samples)
    return noise / np.float32(max(float(np.sqrt(np.mean(noise**2))), 1e-12))


def music(samples: int, rng: Generator) -> Audio:
    """Chords of decaying harmonics, a new one every 0.2 to 0.8 s."""
    out = np.zeros(samples, np.float32)
    start = 0
    while start < samples:
        length = min(int(rng.uniform(0.2, 0.8) * SAMPLE_RATE), samples - start)
        time = np.arange(length, dtype=np.float32) / SAMPLE_RATE
        root = 110 * 2 ** (rng.integers(0, 25) / 12)
        for interval in rng.choice([0, 3, 4, 7, 9, 12, 16], size=int(rng.integers(1, 4)), replace=False):
            for harmonic in range(1, 6):
                hz = root * 2 ** (interval / 12) * harmonic
                if hz < SAMPLE_RATE / 2:
                    tone = np.sin(np.float32(2 * np.pi * hz) * time + np.float32(rng.uniform(0, 6.28)))
                    out[start : start + length] += tone * np.exp(-time * np.float32(rng.uniform(1, 6))) / harmonic
        start += length
    return out


def clicks(samples: int, rng: Generator) -> Audio:
    """Key strokes: short bursts of noise, several a second."""
    out = np.zeros(samples, np.float32)
    for _ in range(int(rng.uniform(2, 9) * samples / SAMPLE_RATE)):
        length = int(rng.integers(80, 600))
        start = int(rng.integers(0, max(samples - length, 1)))
        burst = rng.standard_normal(min(length, samples - start), dtype=np.float32)
        out[start : start + length] += burst * np.exp(-np.arange(len(burst), dtype=np.float32) / (length / 4))
    return out


def breath(samples: int, rng: Generator) -> Audio:
    """One breath: noise that swells and fades, RMS about 0.6."""
    noise = coloured_noise(samples, rng.uniform(-0.5, 1.5), rng)
    return noise * np.hanning(samples).astype(np.float32)


def breaths(audio: Audio, quiet: npt.NDArray[np.bool_], rng: Generator) -> Audio:
    """A breath in about half of the pauses; ``quiet`` [T] is true where nobody speaks."""
    out = audio.copy()
    edges = np.flatnonzero(np.diff(quiet.astype(np.int8), prepend=0, append=0))
    level = np.sqrt(_speech_power(audio))
    for start, end in edges.reshape(-1, 2):
        if end - start < SAMPLE_RATE // 5 or rng.random() < 0.5:
            continue
        length = int(min(end - start, rng.uniform(0.2, 0.6) * SAMPLE_RATE))
        first = int(rng.integers(start, end - length + 1))
        out[first : first + length] += breath(length, rng) * np.float32(level * 10 ** (rng.uniform(-35, -12) / 20))
    return out


def _filter(audio: Audio, response: npt.NDArray[np.float32]) -> Audio:
    """Multiply the spectrum by ``response`` [rfft bins]: no phase, so no shift in time."""
    out: Audio = fft.irfft(fft.rfft(audio) * response, len(audio))
    return out


def _frequencies(samples: int) -> npt.NDArray[np.float32]:
    hz: npt.NDArray[np.float32] = fft.rfftfreq(samples, 1 / SAMPLE_RATE).astype(np.float32)
    return hz


def equalise(audio: Audio, rng: Generator, db: float = 10.0) -> Audio:
    """A random smooth frequency response within +-``db``: microphones and rooms."""
    knots = np.array([0, 150, 400, 1000, 2500, 5000, 8000], np.float32)
    response = np.interp(_frequencies(len(audio)), knots, rng.uniform(-db, db, len(knots)))
    return _filter(audio, (10 ** (response / 20)).astype(np.float32))


def band_limit(audio: Audio, low_hz: float, high_hz: float) -> Audio:
    """Keep the band between two frequencies, with edges of 100 Hz."""
    hz = _frequencies(len(audio))
    response = np.clip((hz - low_hz) / 100 + 1, 0, 1) * np.clip((high_hz - hz) / 100 + 1, 0, 1)
    return _filter(audio, response.astype(np.float32))


def reverb(audio: Audio, rt60: float, rng: Generator, direct_to_reverberant_db: float = 3.0) -> Audio:
    """A synthetic room: the direct sound, then noise that decays by 60 dB in ``rt60`` seconds."""
    length = int(rt60 * SAMPLE_RATE)
    decay = np.exp(np.arange(length, dtype=np.float32) * np.float32(-3 * np.log(10) / max(length, 1)))
    tail = rng.standard_normal(length, dtype=np.float32) * decay
    tail[: int(0.002 * SAMPLE_RATE)] = 0.0
    tail *= np.float32(10 ** (-direct_to_reverberant_db / 20) / max(float(np.sqrt(np.sum(tail**2))), 1e-9))
    size = fft.next_fast_len(len(audio) + length, real=True)
    wet: Audio = fft.irfft(fft.rfft(audio, size) * fft.rfft(tail, size), size)[: len(audio)]
    return audio + wet


def mu_law(audio: Audio) -> Audio:
    """ITU-T G.711 companding to 8 bits and back; full scale is the peak."""
    peak = np.float32(max(float(np.abs(audio).max(initial=0.0)), 1e-6))
    companded = np.log1p(255 * np.abs(audio) / peak) / np.float32(np.log(256))
    codes = np.round(companded * 127) / 127
    out: Audio = np.copysign(np.expm1(codes * np.float32(np.log(256))) / 255 * peak, audio)
    return out


def telephone(audio: Audio) -> Audio:
    """300 to 3400 Hz through G.711."""
    return mu_law(band_limit(audio, 300, 3400))


def opus(audio: Audio, bits_per_second: int) -> Audio:
    """RFC 6716's codec in its mode for speech and back, 20 ms a packet; from about 6000 bits per second."""
    encoder = av.CodecContext.create("libopus", "w")
    assert isinstance(encoder, av.AudioCodecContext)
    encoder.sample_rate, encoder.layout, encoder.format = SAMPLE_RATE, "mono", "flt"
    encoder.bit_rate, encoder.options = bits_per_second, {"application": "voip"}
    encoder.open()
    packet = SAMPLE_RATE // 50
    padded = np.pad(audio, (0, -len(audio) % packet + 2 * packet)).astype(np.float32)  # what the codec delays comes out
    packets = []
    for start in range(0, len(padded), packet):
        frame = av.AudioFrame.from_ndarray(padded[None, start : start + packet], format="flt", layout="mono")
        frame.sample_rate, frame.pts = SAMPLE_RATE, start
        packets += encoder.encode(frame)
    packets += encoder.encode(None)
    decoder = av.CodecContext.create("libopus", "r")
    assert isinstance(decoder, av.AudioCodecContext)
    decoder.extradata = encoder.extradata  # tells how many samples to skip
    decoder.layout, decoder.sample_rate = "mono", 48000
    frames = [frame for one in packets for frame in decoder.decode(one)]
    decoded = np.concatenate([frame.to_ndarray().reshape(-1) for frame in frames]).astype(np.float32) / 32768
    out: Audio = soxr.resample(decoded, frames[0].sample_rate, SAMPLE_RATE)
    return out[: len(audio)]


def packet_loss(audio: Audio, rate: float, rng: Generator) -> Audio:
    """Silence in place of a share ``rate`` of the 20 ms packets, in bursts of one to three."""
    out = audio.copy()
    packet = SAMPLE_RATE // 50
    for start in range(0, len(out), packet):
        if rng.random() < rate / 2:
            out[start : start + packet * int(rng.integers(1, 4))] = 0.0
    return out


def noise(samples: int, babble: Sequence[Audio], rng: Generator) -> Audio:
    """Some kind of noise; ``babble`` are [T >= samples] clips of other people, three or more of them."""
    kind = rng.random()
    if kind < 0.4 and len(babble) >= 3:
        crowd: Audio = np.sum([other[:samples] for other in babble], axis=0)
        return crowd
    if kind < 0.5:
        return music(samples, rng)
    if kind < 0.6:
        return clicks(samples, rng)
    return coloured_noise(samples, rng.uniform(-0.3, 2.0), rng)


def degrade(audio: Audio, quiet: npt.NDArray[np.bool_], babble: Sequence[Audio], rng: Generator) -> Audio:
    """A random chain of the effects above, in the order in which they happen; the result lies in [-1, 1].

    Args:
        audio: [T] clean speech.
        quiet: [T] where nobody speaks.
        babble: [T] clips of other people.
        rng: makes every choice, so the same state gives the same result.
    """
    out = breaths(audio, quiet, rng) if rng.random() < 0.3 else audio
    if rng.random() < 0.4:
        out = reverb(out, rng.uniform(0.15, 0.8), rng, rng.uniform(-2, 10))
    if rng.random() < 0.75:
        out = mix(out, noise(len(out), babble, rng), rng.uniform(3, 30))
    if rng.random() < 0.6:
        out = equalise(out, rng)
    if rng.random() < 0.15:
        out = clip(out, rng.uniform(2, 15))
    channel = rng.random()
    if channel < 0.12:
        out = telephone(out)
    elif channel < 0.24:
        out = band_limit(out, 0, rng.uniform(3400, 7500))
    elif channel < 0.32:
        out = opus(np.clip(out, -1, 1), int(rng.choice(OPUS_RATES)))
    if rng.random() < 0.12:
        out = packet_loss(out, rng.uniform(0.01, 0.08), rng)
    return np.clip(gain(out, rng.uniform(-30, 6)), -1, 1).astype(np.float32)
