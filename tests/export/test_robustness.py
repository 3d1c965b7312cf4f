"""What is measured about bad sound, silence and strangers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
from make_avatar import make_avatar

from talksplat import avatar as bundle
from talksplat_export import cli, robustness, stage_b
from talksplat_export.robustness import DEGRADATIONS, REST_LEVELS, Driven, Opening, SpeechError

Float32 = npt.NDArray[np.float32]


def test_every_degradation_keeps_the_length_and_spoils_the_speech(speech: Float32) -> None:
    audio = speech[: 3 * 16000]
    babble = np.roll(speech[: 4 * 16000], 7000)[: len(audio)]
    for degradation in DEGRADATIONS:
        spoilt = degradation.apply(audio, babble, np.random.default_rng(0))
        assert spoilt.shape == audio.shape, degradation
        assert np.isfinite(spoilt).all(), degradation
        assert np.abs(spoilt - audio).max() > 1e-3, degradation


@pytest.mark.parametrize("name", ["white_noise", "pink_noise", "babble"])
def test_noise_has_the_level_that_the_row_says(speech: Float32, name: str) -> None:
    audio = speech[: 4 * 16000]
    babble = np.roll(speech, 16000)[: len(audio)]
    at = {
        one.level: one.apply(audio, babble, np.random.default_rng(0)) - audio
        for one in DEGRADATIONS
        if one.name == name
    }
    power = {level: float(np.mean(noise**2)) for level, noise in at.items()}
    assert 10 * np.log10(power[0] / power[20]) == pytest.approx(20, abs=0.01)
    loud = float(np.mean(np.sort(audio**2)[-len(audio) // 2 :]))
    assert -3 < 10 * np.log10(loud / power[0]) < 6  # of the speech, not of its pauses


def test_sounds_without_speech_have_their_levels() -> None:
    sounds = robustness.rests(16000 * 5, np.random.default_rng(0))
    assert list(sounds) == list(REST_LEVELS)
    for name, db in REST_LEVELS.items():
        rms = float(np.sqrt(np.mean(sounds[name] ** 2)))
        assert (rms == 0) if db is None else (20 * np.log10(rms) == pytest.approx(db, abs=0.01))


def test_a_correlation_sees_the_same_movement_and_no_other() -> None:
    rng = np.random.default_rng(0)
    one, other = (rng.normal(size=(500, 20)).astype(np.float32) for _ in range(2))
    assert robustness.pooled_r(one, 3 * one + 2) == pytest.approx(1, abs=1e-5)
    assert abs(robustness.pooled_r(one, other)) < 0.1
    assert robustness.pooled_r(one, -one) == pytest.approx(-1, abs=1e-5)
    assert robustness.pooled_r(one, np.zeros_like(one)) == 0


def test_the_opening_points_away_from_rest() -> None:
    rng = np.random.default_rng(0)
    movement = 0.1 * rng.normal(size=(500, 20)).astype(np.float32)
    movement[:, 4] -= 2 * rng.random(500).astype(np.float32)
    opening = Opening.of(movement)
    assert opening.direction[4] < -0.99
    assert opening.span == pytest.approx(2, abs=0.2)
    assert opening(movement).mean() > 0.8


@pytest.mark.parametrize("late", [-3, 0, 2])
def test_lag_is_counted_in_frames_that_the_lips_are_late(late: int) -> None:
    rng = np.random.default_rng(0)
    loudness = np.repeat(np.convolve(rng.random(202), np.ones(3) / 3, "valid"), 640)
    audio = (10 ** (3 * np.roll(loudness, -320) - 3) * rng.choice([-1, 1], len(loudness))).astype(np.float32)
    opening = np.roll(loudness[::640], late).astype(np.float32)
    r, lag = robustness.lagged_r(opening, audio)
    assert lag == late
    assert r > 0.8


def test_movement_is_that_of_the_gaussians(speech: Float32) -> None:
    avatar = make_avatar("blue")
    audio = speech[: 2 * 16000]
    movement = Driven(avatar)(audio)
    heard = stage_b.hear(audio, 50)
    coefficients = stage_b.Adapter(avatar.adapter_in, avatar.adapter_out)(heard)
    moved = (avatar.bases[:3].astype(np.float32) * avatar.basis_scales[:3, :, None])[:, :20]
    displaced = np.einsum("tc,kcn->tkn", coefficients, moved)
    expected = np.sum(displaced**2, axis=(1, 2)) / avatar.gaussians
    np.testing.assert_allclose(np.sum(movement**2, axis=1), expected, rtol=1e-2, atol=1e-4 * expected.max())


def test_speech_is_read_by_speaker(tmp_path: Path, speech: Float32) -> None:
    (tmp_path / "set" / "anna").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for name in ("set/anna/1.wav", "set/anna/2.wav", "set/bob.flac", "carl.wav"):
        soundfile.write(tmp_path / name, speech[:8000], 16000)
    found = robustness.read_speech([tmp_path / "set", tmp_path / "carl.wav"])
    assert set(found) == {"anna", "bob", "carl"}
    assert len(found["anna"]) == 2 * len(found["bob"])
    with pytest.raises(SpeechError, match="No speech in"):
        robustness.read_speech([tmp_path / "empty"])
    with pytest.raises(SpeechError, match="can't be read"):
        robustness.read_speech([tmp_path / "missing.wav"])
    (tmp_path / "bad.wav").write_text("no sound")
    with pytest.raises(SpeechError, match=r"bad\.wav can't be read"):
        robustness.read_speech([tmp_path / "bad.wav"])


@pytest.mark.skipif(importlib.util.find_spec("espeakng_loader") is None, reason="needs the wheel espeakng-loader")
def test_other_voices_are_synthesised() -> None:
    said = robustness.synthesised({"de": robustness.LANGUAGES["de"], "en-us+f2": ""}, seconds=2)
    for audio in said.values():
        assert len(audio) == 2 * 16000
        assert audio.std() > 0.01


def test_the_command_writes_all_rows(
    tmp_path: Path, speech: Float32, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle.write(make_avatar("blue"), tmp_path)
    for number in range(2):
        soundfile.write(tmp_path / f"{number}.wav", speech[number * 64000 : number * 64000 + 48000], 16000)
    monkeypatch.setattr(robustness, "DEGRADATIONS", [DEGRADATIONS[0], DEGRADATIONS[-1]])
    monkeypatch.setattr(robustness, "LANGUAGES", {})
    monkeypatch.setattr(robustness, "REST_SECONDS", 3.0)
    wavs = [str(tmp_path / f"{number}.wav") for number in range(2)]
    command = ["robustness", str(tmp_path / "blue"), "--json", str(tmp_path / "r.json"), "--speech", *wavs]
    assert cli.main(command) == 0
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    checks = [row["check"] for row in rows]
    assert checks == ["degradation"] * 2 + ["rest"] * len(REST_LEVELS) + ["sync"] * 2
    assert all(-1 <= row["movement_r_worst"] <= row["movement_r"] <= 1 for row in rows[:2])
    silence = next(row for row in rows if row["name"] == "silence")
    assert silence["opening_std_pct"] == 0
    assert cli.main(["robustness", str(tmp_path / "nobody")]) == 1
    assert "nobody" in capsys.readouterr().err
