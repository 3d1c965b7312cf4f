from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from talksplat.clock import LEFT_CONTEXT, SAMPLES_PER_FRAME
from talksplat_export import audio_encoder, augment, phonemes, pretrain
from talksplat_export.audio_encoder import AudioEncoder
from talksplat_export.pretrain import Config, Corpus
from talksplat_export.synthesis import Recording

CONFIG = Config(steps=4, batch=2, frames=5)


def recording(seed: int, seconds: int = 3) -> Recording:
    rng = np.random.default_rng(seed)
    labels = np.repeat(rng.integers(0, 40, 10 * seconds), 10).astype(np.uint8)
    return Recording(f"v{seed}", rng.normal(0, 2000, 16000 * seconds).astype(np.int16), labels)


@pytest.fixture
def train() -> Corpus:
    return Corpus([recording(1), recording(2)], CONFIG)


@pytest.fixture
def held_out() -> Mapping[str, Corpus]:
    return {"synthetic": Corpus([recording(3)], CONFIG)}


def test_a_batch_is_decided_by_its_generator(train: Corpus) -> None:
    one, same, other = (train.batch(2, np.random.default_rng(seed)) for seed in (5, 5, 6))
    torch.testing.assert_close(one.audio, same.audio, atol=0, rtol=0)
    assert not torch.equal(one.audio, other.audio)


def test_targets_are_shares_of_what_is_said_around_the_instant(train: Corpus) -> None:
    batch = train.batch(2, np.random.default_rng(0))
    total = batch.posteriors.sum(dim=-1)
    assert batch.posteriors.shape == (4, CONFIG.frames, len(pretrain.OFFSETS), len(phonemes.PHONEMES))
    torch.testing.assert_close(total, torch.ones_like(total))
    middle = pretrain.OFFSETS.index(0)
    at_instant = batch.posteriors[:, :, middle].gather(2, batch.labels[..., None])[..., 0]
    assert (at_instant >= 0.5).all()  # ten labels long: the instant's own phoneme has the largest share
    table = torch.tensor(phonemes.articulation())
    torch.testing.assert_close(batch.articulation, batch.posteriors @ table)


def test_the_encoder_gives_a_feature_for_every_target(train: Corpus) -> None:
    batch = train.batch(2, np.random.default_rng(0))
    with torch.inference_mode():
        assert AudioEncoder().eval()(batch.audio).shape[:2] == batch.labels.shape


def test_labels_and_features_share_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame's instant lies LEFT_CONTEXT after the first sample that it hears."""
    labels = (np.arange(200) % 40).astype(np.uint8)
    only = Corpus([Recording("v", np.arange(32000).astype(np.int16), labels)], CONFIG)
    monkeypatch.setattr(augment, "gain", lambda audio, db: audio)
    batch = only.batch(1, np.random.default_rng(3))
    first_sample = round(float(batch.audio[0, 0]) * 32768)
    instants = first_sample + LEFT_CONTEXT + SAMPLES_PER_FRAME * np.arange(CONFIG.frames)
    np.testing.assert_array_equal(batch.labels[0].numpy(), labels[instants // 160])


def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    train: Corpus, held_out: Mapping[str, Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain.pretrain(CONFIG, train, held_out, tmp_path / "whole", tmp_path / "whole.safetensors", every=2)

    validate, calls = pretrain.validate, []

    def interrupted(*args: object) -> dict[str, float]:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return validate(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(pretrain, "validate", interrupted)
    weights = tmp_path / "parts.safetensors"
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(CONFIG, train, held_out, tmp_path / "parts", weights, every=2)
    assert not weights.exists()
    pretrain.pretrain(CONFIG, train, held_out, tmp_path / "parts", weights, every=2)

    whole = load_file(tmp_path / "whole.safetensors")
    for name, tensor in load_file(weights).items():
        torch.testing.assert_close(tensor, whole[name], atol=1e-6, rtol=0)


def test_weights_carry_their_figures_and_fit_the_encoder(
    train: Corpus, held_out: Mapping[str, Corpus], tmp_path: Path
) -> None:
    path = tmp_path / "weights" / "encoder.safetensors"
    figures = pretrain.pretrain(CONFIG, train, held_out, tmp_path, path)
    assert set(figures) >= {"synthetic_accuracy_clean", "synthetic_accuracy_degraded_speech"}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    audio_encoder.load(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["config_digest"] == CONFIG.digest
    assert float(metadata["synthetic_accuracy_clean"]) == pytest.approx(figures["synthetic_accuracy_clean"], abs=1e-4)


def test_posteriors_come_every_10_ms() -> None:
    compute = pretrain.posteriors(AudioEncoder().eval(), pretrain.Targets())
    for samples in (160, 639 * 16, 16000):
        found = compute(np.zeros(samples, np.float32))
        assert found.shape == (samples // 160, len(phonemes.PHONEMES))
        np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, atol=1e-4)


def test_recordings_that_are_too_short_are_refused() -> None:
    with pytest.raises(ValueError, match="no recording is longer"):
        Corpus([recording(1, seconds=1)], CONFIG)


def test_resampled_segments_keep_their_length_and_their_clock() -> None:
    seconds = 20
    labels = np.repeat(np.arange(seconds * 5) % 40, 20).astype(np.uint8)
    audio = np.repeat(100 * (np.arange(seconds * 5) % 40), 3200).astype(np.int16)  # the level tells the label
    corpus = Corpus([Recording("v", audio, labels)], CONFIG, resampled=1.0)
    for seed in range(5):
        segment, said = corpus._segment(np.random.default_rng(seed))
        assert segment.shape == (len(said) * 160,)
        heard = np.round(segment[80::160] * 32768 / 100).astype(int)
        assert np.mean(heard == said) > 0.9
        runs = np.diff(np.flatnonzero(np.diff(said)))
        assert not np.all(runs == 20)  # faster or slower than it was said


def test_a_run_can_begin_with_an_earlier_result(train: Corpus, held_out: Mapping[str, Corpus], tmp_path: Path) -> None:
    pretrain.pretrain(CONFIG, train, held_out, tmp_path, tmp_path / "first.safetensors")
    start = pretrain._from_checkpoint(tmp_path / f"checkpoint-{CONFIG.digest}.pt")
    still = replace(CONFIG, steps=2, learning_rate=1e-9, start="first")
    pretrain.pretrain(still, train, held_out, tmp_path, tmp_path / "second.safetensors", start)
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("first", "second"))
    torch.testing.assert_close(second["project.weight"], first["project.weight"], atol=1e-6, rtol=0)


def test_a_run_can_begin_with_an_encoder_of_fewer_layers(tmp_path: Path) -> None:
    encoder, targets = AudioEncoder(), pretrain.Targets()
    fewer = {name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith("deepen")}
    path = tmp_path / "checkpoint.pt"
    torch.save({"encoder": fewer, "targets": targets.state_dict()}, path)
    started, _ = pretrain._from_checkpoint(path)
    for name, tensor in fewer.items():
        torch.testing.assert_close(started.state_dict()[name], tensor, atol=0, rtol=0)
    del fewer["project.weight"]
    torch.save({"encoder": fewer, "targets": targets.state_dict()}, path)
    with pytest.raises(ValueError, match="another encoder"):
        pretrain._from_checkpoint(path)
