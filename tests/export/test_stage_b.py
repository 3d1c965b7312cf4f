"""The personal head: what it learns, and that it is fitted as it is served."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from talking_head import make_track

from talksplat.avatar import COEFFICIENTS, FEATURES
from talksplat.framing import windows
from talksplat_export import audio_encoder, stage_b, vad
from talksplat_export.deformation import Deformation
from talksplat_export.stage_b import Heard

Float32 = npt.NDArray[np.float32]


def test_what_is_heard_is_what_serving_hears(speech: Float32) -> None:
    audio = speech[: 5 * 16000]
    frames = 125
    heard = stage_b.hear(audio, frames)
    served = torch.from_numpy(windows(audio))
    with torch.inference_mode():
        features = audio_encoder.load()(served).reshape(-1, FEATURES)[:frames]
        probability = vad.load()(served)[0].reshape(-1)[:frames]
    np.testing.assert_allclose(heard.features, features.numpy(), atol=1e-4)
    np.testing.assert_allclose(heard.speech, probability.numpy(), atol=1e-5)


def test_audio_shorter_than_the_frames_is_followed_by_silence(speech: Float32) -> None:
    heard = stage_b.hear(speech[:8000], 100)
    assert heard.features.shape == (100, FEATURES)
    assert heard.speech[-20:].max() < 0.1


def test_the_adapter_is_the_served_net_times_the_gate() -> None:
    rng = np.random.default_rng(0)
    adapter = stage_b.Adapter(
        rng.normal(size=(FEATURES + 1, 64)).astype(np.float32) / 8,
        rng.normal(size=(65, COEFFICIENTS)).astype(np.float32),
    )
    heard = Heard(rng.normal(size=(8, FEATURES)).astype(np.float32), np.array([0, 0.05, 0.3, 1] * 2, np.float32))
    served = Deformation()(
        *(torch.from_numpy(a)[None] for a in (heard.features, adapter.adapter_in, adapter.adapter_out))
    )
    driven = adapter(heard)
    assert not driven[[0, 1, 4, 5]].any()
    np.testing.assert_allclose(driven[[3, 7]], served[0].numpy()[[3, 7]], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(driven[[2, 6]], 0.5 * served[0].numpy()[[2, 6]], rtol=1e-4, atol=1e-4)


def test_the_adapter_learns_what_the_features_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_b, "STEPS", 400)
    rng = np.random.default_rng(0)
    track, landmarks = make_track(600)
    features = rng.normal(size=(600, FEATURES)).astype(np.float32)
    features[:, 0] = 3 * (track.expression[:, 0] - 0.5)
    speech = (np.arange(600) % 50 < 40).astype(np.float32)
    targets = np.zeros((600, COEFFICIENTS), np.float32)
    targets[:, 0] = track.expression[:, 0] * speech
    displacements = np.zeros((COEFFICIENTS, 68, 3), np.float32)
    displacements[0] = landmarks[1]
    heard = [Heard(features, speech)]
    adapter = stage_b.fit(heard, targets[:], displacements, track, 0, lambda done: None)
    driven = adapter(heard[0])
    assert np.corrcoef(driven[:, 0], targets[:, 0])[0, 1] > 0.95
    assert not driven[speech == 0].any()


def test_the_face_rests_where_noise_took_the_place_of_speech(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_b, "STEPS", 400)
    rng = np.random.default_rng(0)
    track, landmarks = make_track(600)
    features = rng.normal(size=(2, 600, FEATURES)).astype(np.float32)
    features[:, :, 0] = 3 * (track.expression[:, 0] - 0.5)
    resting = np.arange(600) >= 300
    features[1, resting, 1] = 5  # sounds like noise
    targets = np.zeros((600, COEFFICIENTS), np.float32)
    targets[:, 0] = track.expression[:, 0]
    displacements = np.zeros((COEFFICIENTS, 68, 3), np.float32)
    displacements[0] = landmarks[1]
    fooled = np.ones(600, np.float32)  # the voice activity takes everything for speech
    heard = [Heard(features[0], fooled), Heard(features[1], fooled, resting)]
    driven = stage_b.fit(heard, targets, displacements, track, 0, lambda done: None)(heard[1])[:, 0]
    assert np.corrcoef(driven[:300], targets[:300, 0])[0, 1] > 0.9
    assert np.abs(driven[300:]).mean() < 0.5 * np.abs(driven[:300]).mean()


def test_versions_are_the_recording_and_degraded_ones_with_noise_alone_in_places(
    speech: Float32, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_b, "DEGRADED_SECONDS", 1.0)
    monkeypatch.setattr(stage_b, "NOISE_ONLY", 0.5)
    done: list[int] = []
    recorded, *degraded = stage_b.versions(speech[: 6 * 16000], 150, 2, 0, done.append)
    assert done == [1, 2, 3]
    np.testing.assert_array_equal(recorded.features, stage_b.hear(speech[: 6 * 16000], 150).features)
    assert recorded.resting is None
    for version in degraded:
        assert version.resting is not None
        assert 0 < version.resting.sum() < 150
        assert not np.allclose(version.features, recorded.features)
