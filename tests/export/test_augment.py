import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from talksplat.clock import SAMPLE_RATE
from talksplat_export import augment
from talksplat_export.augment import Audio

SAMPLES = SAMPLE_RATE


def tone(hz: float, samples: int = SAMPLES) -> Audio:
    wave: Audio = 0.2 * np.sin(2 * np.pi * hz * np.arange(samples) / SAMPLE_RATE)
    return wave.astype(np.float32)


def rms(audio: Audio) -> float:
    return float(np.sqrt(np.mean(audio**2)))


def degraded(seed: int, audio: Audio) -> Audio:
    quiet = np.zeros(len(audio), bool)
    quiet[: len(audio) // 2] = True
    babble = [tone(200 + 50 * n, len(audio)) for n in range(4)]
    return augment.degrade(audio, quiet, babble, np.random.default_rng(seed))


@given(seed=st.integers(0, 2**32), samples=st.integers(1, 5000))
def test_degraded_speech_keeps_length_dtype_and_range(seed: int, samples: int) -> None:
    out = degraded(seed, tone(300, samples))
    assert out.shape == (samples,)
    assert out.dtype == np.float32
    assert np.isfinite(out).all()
    assert np.abs(out).max() <= 1


@given(seed=st.integers(0, 2**32))
def test_digital_silence_survives_every_chain(seed: int) -> None:
    assert np.isfinite(degraded(seed, np.zeros(2000, np.float32))).all()


def test_the_same_generator_gives_the_same_result() -> None:
    audio = tone(300)
    np.testing.assert_array_equal(degraded(7, audio), degraded(7, audio))
    assert not np.array_equal(degraded(7, audio), degraded(8, audio))


def test_gain_is_in_decibels() -> None:
    assert rms(augment.gain(tone(300), -20)) == pytest.approx(0.1 * rms(tone(300)), rel=1e-5)


def test_noise_is_mixed_at_the_asked_ratio() -> None:
    audio = np.concatenate([tone(300), np.zeros(SAMPLES, np.float32)])  # the pause must not count as speech
    noise = augment.coloured_noise(len(audio), 0, np.random.default_rng(0))
    added = augment.mix(audio, noise, 10) - audio
    assert 20 * np.log10(rms(tone(300)) / rms(added)) == pytest.approx(10, abs=0.2)


@pytest.mark.parametrize(("exponent", "db_per_octave"), [(0, 0), (1, -3), (2, -6)])
def test_coloured_noise_falls_by_its_exponent(exponent: float, db_per_octave: float) -> None:
    power = np.abs(np.fft.rfft(augment.coloured_noise(20 * SAMPLES, exponent, np.random.default_rng(0)))) ** 2
    bands = [power[20 * hz : 40 * hz].mean() for hz in (250, 2000)]  # three octaves apart
    assert 10 * np.log10(bands[1] / bands[0]) / 3 == pytest.approx(db_per_octave, abs=0.3)


def test_band_limit_removes_what_lies_outside() -> None:
    assert rms(augment.band_limit(tone(1000), 300, 3400)) == pytest.approx(rms(tone(1000)), rel=0.01)
    assert rms(augment.band_limit(tone(5000), 300, 3400)) < 1e-3
    assert rms(augment.band_limit(tone(100), 300, 3400)) < 1e-3


def test_reverb_starts_with_the_direct_sound_and_decays() -> None:
    impulse = np.zeros(SAMPLES, np.float32)
    impulse[100] = 1
    out = augment.reverb(impulse, 0.4, np.random.default_rng(0), direct_to_reverberant_db=0)
    assert np.abs(out[:100]).max() < 1e-6
    assert out[100] == pytest.approx(1, abs=1e-5)
    assert rms(out[200:1000]) > 10 * rms(out[5000:5800])


def test_mu_law_has_256_levels_and_a_relative_error() -> None:
    audio = np.linspace(-1, 1, 10001, dtype=np.float32)
    out = augment.mu_law(audio)
    assert len(np.unique(out)) <= 256
    loud = np.abs(audio) > 0.05
    assert np.abs((out[loud] - audio[loud]) / audio[loud]).max() < 0.05


def test_clipping_limits_the_peak() -> None:
    assert np.abs(augment.clip(tone(300), 6)).max() == pytest.approx(0.2 * 10 ** (-6 / 20), rel=1e-4)


def test_packet_loss_silences_about_the_asked_share() -> None:
    out = augment.packet_loss(np.ones(60 * SAMPLES, np.float32), 0.1, np.random.default_rng(0))
    assert np.mean(out == 0) == pytest.approx(0.1, abs=0.02)


def test_breaths_stay_in_the_pauses() -> None:
    audio = tone(300)
    quiet = np.zeros(SAMPLES, bool)
    quiet[2000:12000] = True
    changed = np.zeros(SAMPLES, bool)
    for seed in range(8):
        changed |= augment.breaths(audio, quiet, np.random.default_rng(seed)) != audio
    assert changed[quiet].any()
    assert not changed[~quiet].any()


@pytest.mark.parametrize("bits", augment.OPUS_RATES)
def test_opus_neither_shifts_nor_shortens_speech(bits: int) -> None:
    rng = np.random.default_rng(0)
    bursts = np.repeat(rng.uniform(0, 1, 20) > 0.5, SAMPLES // 20)  # 50 ms each
    audio = (augment.band_limit(augment.coloured_noise(SAMPLES, 1, rng), 200, 3000) * bursts * 0.1).astype(np.float32)
    out = augment.opus(audio, bits)
    assert out.shape == audio.shape
    assert out.dtype == np.float32
    envelopes = [np.convolve(wave**2, np.ones(80) / 80, "same") for wave in (audio, out)]
    lags = range(-80, 81)
    best = lags[int(np.argmax([np.dot(envelopes[0][80:-80], np.roll(envelopes[1], -lag)[80:-80]) for lag in lags]))]
    assert abs(best) <= 32  # 2 ms
    assert np.corrcoef(envelopes[0], envelopes[1])[0, 1] > 0.8
