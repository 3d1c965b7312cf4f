from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile
import soxr
import torch
from safetensors import safe_open
from torch import Tensor

from talksplat.clock import (
    CHUNK_FRAMES,
    CHUNK_SAMPLES,
    FPS,
    LEFT_CONTEXT,
    LOOK_AHEAD,
    SAMPLE_RATE,
    SAMPLES_PER_FRAME,
    WINDOW,
)
from talksplat_export import audio_encoder, feeds
from talksplat_export.audio_encoder import AudioEncoder, MelPower


@pytest.fixture(scope="module")
def encoder() -> AudioEncoder:
    return audio_encoder.load()


def speech_like(samples: int, seed: int = 0) -> Tensor:
    """Noise with syllables: loud and quiet parts, so that levels matter."""
    generator = torch.Generator().manual_seed(seed)
    envelope = 0.05 + torch.sin(torch.arange(samples) / SAMPLE_RATE * 2 * torch.pi * 4) ** 2
    return 0.1 * envelope * torch.randn(samples, generator=generator)


def test_log_mel_is_that_of_torch_stft() -> None:
    audio = speech_like(SAMPLE_RATE)
    spectrum = torch.stft(
        audio, 400, 160, window=torch.hann_window(400), center=False, return_complex=True, normalized=False
    )
    power = spectrum.abs() ** 2 / torch.hann_window(400).square().sum()
    expected = torch.tensor(audio_encoder.mel_filters(), dtype=torch.float32) @ power
    actual = MelPower()(audio[None])[0]
    torch.testing.assert_close(actual.log10(), expected.log10(), atol=5e-5, rtol=0)


def test_every_mel_filter_hears_something() -> None:
    assert (audio_encoder.mel_filters() > 0).any(axis=1).all()


def test_a_window_gives_the_frames_of_one_chunk(encoder: AudioEncoder) -> None:
    assert encoder(torch.zeros(3, WINDOW)).shape == (3, CHUNK_FRAMES, 128)


def test_shifting_the_window_shifts_the_features(encoder: AudioEncoder) -> None:
    audio = speech_like(WINDOW + 3 * SAMPLES_PER_FRAME)
    with torch.inference_mode():
        base = encoder(audio[None, :WINDOW])[0]
        for frames in (1, 2, 3):
            shifted = encoder(audio[None, frames * SAMPLES_PER_FRAME :][:, :WINDOW])[0]
            torch.testing.assert_close(shifted[:-frames], base[frames:], atol=1e-4, rtol=0)


def test_a_long_recording_gives_what_its_windows_give(encoder: AudioEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio_encoder, "_BLOCK_FRAMES", 7)  # several blocks, and a last one that is shorter
    chunks = 5
    audio = speech_like(chunks * CHUNK_SAMPLES)
    padded = torch.cat([torch.zeros(LEFT_CONTEXT), audio, torch.zeros(LOOK_AHEAD)])
    windows = padded.unfold(0, WINDOW, CHUNK_SAMPLES)
    with torch.inference_mode():
        expected = encoder(windows).reshape(chunks * CHUNK_FRAMES, -1)
    torch.testing.assert_close(encoder.encode(audio), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("samples", [1, SAMPLES_PER_FRAME, SAMPLES_PER_FRAME + 1, 10 * SAMPLES_PER_FRAME - 1])
def test_a_recording_has_a_frame_for_every_begun_40_ms(encoder: AudioEncoder, samples: int) -> None:
    assert len(encoder.encode(torch.zeros(samples))) == -(-samples // SAMPLES_PER_FRAME)


@pytest.mark.parametrize("audio", [torch.zeros(0), torch.zeros(2, 640), torch.tensor([0.0, float("nan")])])
def test_a_recording_that_is_none_is_refused(encoder: AudioEncoder, audio: Tensor) -> None:
    with pytest.raises(ValueError, match="recording"):
        encoder.encode(audio)


def test_a_frame_hears_nothing_after_its_look_ahead_or_before_the_left_context(encoder: AudioEncoder) -> None:
    frame = 20
    own = slice(frame * SAMPLES_PER_FRAME, (frame + 1) * SAMPLES_PER_FRAME)
    audio = speech_like(40 * SAMPLES_PER_FRAME)
    before, after, inside = audio.clone(), audio.clone(), audio.clone()
    before[: own.start - LEFT_CONTEXT] = 0.5
    after[own.stop + LOOK_AHEAD :] = 0.5
    inside[own.stop + 1000] += 0.5
    base = encoder.encode(audio)[frame]
    torch.testing.assert_close(encoder.encode(before)[frame], base, atol=1e-4, rtol=0)
    torch.testing.assert_close(encoder.encode(after)[frame], base, atol=1e-4, rtol=0)
    assert (encoder.encode(inside)[frame] - base).abs().max() > 1e-2


def test_a_receptive_field_is_the_smallest_input_with_an_output(encoder: AudioEncoder) -> None:
    field = audio_encoder.RECEPTIVE_FIELD
    assert LEFT_CONTEXT < field <= LEFT_CONTEXT + SAMPLES_PER_FRAME + LOOK_AHEAD
    assert encoder(torch.zeros(1, field)).shape[1] == 1
    assert encoder(torch.zeros(1, field + SAMPLES_PER_FRAME - 1)).shape[1] == 1
    assert encoder(torch.zeros(1, field + SAMPLES_PER_FRAME)).shape[1] == 2


def test_gain_hardly_changes_the_features(encoder: AudioEncoder) -> None:
    audio = speech_like(2 * SAMPLE_RATE)
    loud, quiet = encoder.encode(audio), encoder.encode(audio * 0.1)
    difference = (loud - quiet)[25:].square().mean().sqrt()
    assert difference < 0.05 * loud[25:].std()


def test_digital_silence_gives_one_finite_feature_vector(encoder: AudioEncoder) -> None:
    features = encoder.encode(torch.zeros(SAMPLE_RATE))
    assert torch.isfinite(features).all()
    torch.testing.assert_close(features, features[:1].expand_as(features), atol=1e-5, rtol=0)


def test_weights_are_small_and_say_where_they_come_from(encoder: AudioEncoder) -> None:
    assert audio_encoder.WEIGHTS.stat().st_size <= 3_000_000
    assert sum(parameter.numel() for parameter in encoder.parameters()) <= 750_000
    with safe_open(audio_encoder.WEIGHTS, "pt") as file:
        assert {"version", "config", "config_digest", "commit", "synthetic_accuracy_clean"} <= file.metadata().keys()


def test_export_has_the_promised_tensors_and_computes_the_same(encoder: AudioEncoder, repository: Path) -> None:
    path = repository / "audio_encoder" / "1" / "model.onnx"
    model = onnx.load(path)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [18]
    session = feeds.session(path)
    assert [(x.name, x.type, x.shape[1:]) for x in session.get_inputs()] == [("AUDIO", "tensor(float)", [WINDOW])]
    outputs = [("FEATURES", [CHUNK_FRAMES, 128]), ("WINDOW", [WINDOW])]
    assert [(x.name, x.shape[1:]) for x in session.get_outputs()] == outputs
    for batch in (1, 3, 16):
        audio = torch.stack([speech_like(WINDOW, seed) for seed in range(batch)])
        with torch.inference_mode():
            expected = encoder(audio).numpy()
        actual, window = session.run(None, {"AUDIO": audio.numpy()})
        np.testing.assert_array_equal(window, audio)
        np.testing.assert_allclose(actual, expected, atol=5e-5 * max(1, np.abs(expected).max()), rtol=0)


def test_exported_silence_is_finite_and_a_window_gives_the_same_bits_in_any_batch(repository: Path) -> None:
    session = feeds.session(repository / "audio_encoder" / "1" / "model.onnx")
    audio = np.stack([np.zeros(WINDOW, np.float32), *(speech_like(WINDOW, seed).numpy() for seed in range(4))])
    together, _ = session.run(None, {"AUDIO": audio})
    assert np.isfinite(together).all()
    for batch in (1, 2, 3):
        first, _ = session.run(None, {"AUDIO": audio[-batch:]})
        np.testing.assert_array_equal(first, together[-batch:])


@pytest.mark.shared
def test_features_tell_how_far_the_jaw_opens_and_hold_still_in_silence(
    encoder: AudioEncoder, shared_data: Path
) -> None:
    """A linear probe: what a personal head with the best weights could not do worse than."""
    faces = shared_data / "faces"
    audio, sample_rate = soundfile.read(faces / "subject_a.flac", dtype="float32")
    truth = np.load(faces / "subject_a_ground_truth.npz")
    jaw = truth["blendshapes"][:, truth["blendshape_names"].tolist().index("jawOpen")]
    features = encoder.encode(torch.from_numpy(soxr.resample(audio, sample_rate, SAMPLE_RATE))).numpy()[: len(jaw)]
    inputs = np.concatenate([features, np.ones((len(features), 1), np.float32)], axis=1)
    train, test = slice(0, 150 * FPS), slice(150 * FPS, len(features))
    weights = np.linalg.solve(inputs[train].T @ inputs[train] + np.eye(129), inputs[train].T @ jaw[train])
    predicted = inputs @ weights
    by_lag = [np.corrcoef(np.roll(predicted, lag)[test], jaw[: len(features)][test])[0, 1] for lag in (-1, 0, 1)]
    assert by_lag[1] >= 0.75
    assert by_lag[1] == max(by_lag)
    silence = encoder.encode(torch.zeros(SAMPLE_RATE)).numpy() @ weights[:-1] + weights[-1]
    assert abs(silence.mean()) < 0.1 * np.quantile(jaw, 0.98)


def test_the_products_that_are_served_compute_what_the_convolutions_that_are_trained_do(encoder: AudioEncoder) -> None:
    audio = torch.stack([torch.zeros(WINDOW), *(speech_like(WINDOW, seed) for seed in range(3))])
    with torch.inference_mode():
        torch.testing.assert_close(audio_encoder.MatrixEncoder(encoder)(audio), encoder(audio), atol=1e-5, rtol=0)
