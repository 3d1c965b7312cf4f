"""Huma 1's deformation net, its fit, and what linear bases keep of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import talking_head
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_avatar import make_huma1_avatar

from talksplat import avatar as bundle
from talksplat import clock, splat, triplanes
from talksplat.avatar import HEADS, HUMA1_WEIGHTS, KEY, SPEECH_TOKENS, SPEECH_WIDTH, VALUE, WINDOW_TOKENS
from talksplat_export import _onnx, feeds, huma1, huma1_drive, huma1_fit, moonshine, quality, stage_a, stage_b
from talksplat_export.huma1_drive import Huma1Subject
from talksplat_export.huma1_fit import Heard
from talksplat_export.recording import Recording
from talksplat_export.track import Track

Float32 = npt.NDArray[np.float32]


def test_an_avatar_of_another_speech_encoder_is_not_compared() -> None:
    """It would be measured as a bad one; the check comes before anything is read or heard."""
    aged = replace(make_huma1_avatar("aged"), audio_encoder=moonshine.WHEELS["base"].encoder)  # of the last layer
    with pytest.raises(bundle.SpeechEncoderError, match="'aged' was fitted to another speech encoder"):
        huma1_drive.subject(aged, Recording.__new__(Recording), Track.__new__(Track))


# --- the net -----------------------------------------------------------------------------------------------------


def oracle(speech: Float32, features: Float32, net: dict[str, Float32]) -> Float32:
    """One Gaussian's offsets in one frame: speech [T, 416], features [32] -> [14]; written as in a paper."""

    def affine(matrix: Float32, x: Float32) -> Float32:
        return np.asarray(x @ matrix[:-1] + matrix[-1])

    tokens = np.maximum(affine(net["speech_in"], speech) + net["positions"][:-1], 0)
    keys_values = affine(net["keys_values"], np.concatenate([tokens, net["positions"][-1:]]))
    query, base = np.split(affine(net["query_base"], features), [HEADS * KEY])
    answer = base.copy()
    for head in range(HEADS):
        scores = keys_values[:, head * KEY :][:, :KEY] @ query[head * KEY :][:KEY] / np.sqrt(KEY)
        attention = np.exp(scores - scores.max())
        values = keys_values[:, HEADS * KEY + head * VALUE :][:, :VALUE]
        answer += attention @ values / attention.sum()
    return affine(net["offsets_out"], np.maximum(affine(net["mixing"], np.maximum(answer, 0)), 0))


def test_offsets_are_those_of_attention_and_a_perceptron() -> None:
    rng = np.random.default_rng(0)
    net = {name: rng.normal(scale=0.3, size=shape).astype(np.float32) for name, shape in HUMA1_WEIGHTS.items()}
    speech = rng.normal(size=(2, 3, SPEECH_TOKENS, SPEECH_WIDTH)).astype(np.float32)
    table = rng.normal(size=(2, bundle.HUMA1_FEATURES, 5)).astype(np.float32)
    weights = {name: torch.from_numpy(np.stack([tensor, 0.5 * tensor])) for name, tensor in net.items()}
    found = huma1.offsets(torch.from_numpy(speech), torch.from_numpy(table), weights).numpy()
    assert found.shape == (2, 3, bundle.ATTRIBUTES, 5)
    for row, scale in enumerate((1, 0.5)):
        own = {name: np.float32(scale) * tensor for name, tensor in net.items()}
        for frame in range(3):
            for gaussian in range(5):
                expected = oracle(speech[row, frame], table[row, :, gaussian], own)
                np.testing.assert_allclose(found[row, frame, :, gaussian], expected, rtol=2e-4, atol=2e-4)


def test_the_graph_computes_what_the_module_computes(repository: Path) -> None:
    path, ((graph, module),) = repository / "deformation_huma1" / "1" / "model.onnx", huma1.graphs()
    (found,) = _onnx.parity(graph, module, path, feeds.feeds(graph.name, repository))
    assert 0 < found.difference < 5e-5
    assert {node.name: node.shape for node in feeds.session(path).get_outputs()} == {
        "OFFSETS": ["batch", clock.CHUNK_FRAMES, bundle.ATTRIBUTES, "gaussians"]
    }


def test_a_window_gives_as_many_tokens_as_the_encoder() -> None:
    encoder = moonshine.Encoder(width=8, hidden=8, layers=0)
    assert encoder(torch.zeros(1, clock.WINDOW))[1].shape[1] == WINDOW_TOKENS


def test_tokens_are_taken_around_the_frame() -> None:
    """Tokens that carry their own time: a frame's are spread evenly around the frame's."""
    centres = huma1.TOKEN_CENTRE + huma1.TOKEN_STRIDE * torch.arange(WINDOW_TOKENS, dtype=torch.float32)
    taken = (huma1.token_mixture() @ centres).reshape(clock.CHUNK_FRAMES, SPEECH_TOKENS)
    for frame, times in enumerate(taken):
        place = clock.LEFT_CONTEXT + frame * clock.SAMPLES_PER_FRAME
        assert abs(float(times.mean()) - place) < 1
        np.testing.assert_allclose(times.diff(), huma1.TOKEN_STRIDE, atol=2)


def test_multiply_adds_count_the_products_of_the_graph() -> None:
    """Twice as many Gaussians cost twice as much, and the sums are those of the matrices' sizes."""
    counted = huma1.multiply_adds(1000)
    tokens = SPEECH_TOKENS + 1
    each = 32 * (HEADS * KEY + VALUE) / 4 + HEADS * tokens * (KEY + VALUE) + VALUE * (VALUE + 14)
    assert counted["gaussians"] == 1000 * each
    assert huma1.multiply_adds(2000)["gaussians"] == 2 * counted["gaussians"]


# --- hearing -----------------------------------------------------------------------------------------------------


def test_what_the_fit_hears_is_what_the_server_hears(repository: Path, speech: Float32) -> None:
    """A version is the recording in chunks that begin earlier: every frame's tokens are those of the served window."""
    frames, audio = 13, speech[8000:28_000]
    heard = huma1_fit.hear([audio, audio], frames, lambda done: None)
    encoder = feeds.session(repository / "asr_encoder" / "1" / "model.onnx")
    detector = feeds.session(repository / "vad" / "1" / "model.onnx")
    for version, frame in ((0, 0), (0, 6), (0, 12), (1, 0), (1, 3), (1, 12)):
        chunk, slot = divmod(frame + version, clock.CHUNK_FRAMES)
        start = chunk * clock.CHUNK_SAMPLES - version * clock.SAMPLES_PER_FRAME - clock.LEFT_CONTEXT
        window = np.zeros((1, clock.WINDOW), np.float32)
        window[0, max(-start, 0) :] = audio[max(start, 0) : start + clock.WINDOW]
        hidden = encoder.run(["HIDDEN"], {"AUDIO": window})[0]
        expected = (huma1.token_mixture().numpy() @ hidden[0]).reshape(clock.CHUNK_FRAMES, SPEECH_TOKENS, -1)[slot]
        found = heard.tokens(np.array([version]), np.array([frame]))[0].numpy()
        np.testing.assert_allclose(found, expected, atol=0.01)  # kept in half precision
        probability = detector.run(["SPEECH"], {"AUDIO": window})[0][0, slot]
        np.testing.assert_allclose(heard.speech[version, frame], probability, atol=1e-4)


def test_degraded_audio_has_the_same_length_and_another_sound(speech: Float32) -> None:
    audio = speech[: 10 * clock.SAMPLE_RATE + 77]
    one, again, other = (huma1_fit.degraded(audio, np.zeros(len(audio), bool), seed) for seed in (0, 0, 1))
    assert one.shape == audio.shape
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - audio).max() > 0.01 < np.abs(one - other).max()


# --- descending --------------------------------------------------------------------------------------------------


def small_head() -> huma1_fit.Head:
    canonical = np.random.default_rng(0).normal(size=(bundle.ATTRIBUTES, 6)).astype(np.float32)
    return huma1_fit.Head(canonical, np.zeros((3, 6), np.float32), 0)


def test_an_interrupted_descent_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    speech = torch.randn(2, SPEECH_TOKENS, SPEECH_WIDTH, generator=torch.Generator().manual_seed(0))

    def descend(steps: int, path: Path, stop_at: int | None = None) -> tuple[huma1_fit.Head, list[float]]:
        head = small_head()

        def loss_at(step: int) -> torch.Tensor:
            if step == stop_at:
                raise KeyboardInterrupt
            return (head.offsets(speech[step % 2][None]) - 0.01).square().mean()

        return head, stage_a.descend(head, head.groups(huma1_fit.RATES), steps, loss_at, path, lambda _: None)

    straight, losses = descend(8, tmp_path / "straight.pt")
    with pytest.raises(KeyboardInterrupt):
        descend(8, tmp_path / "cut.pt", stop_at=4)
    resumed, again = descend(8, tmp_path / "cut.pt")
    assert again == losses
    assert losses[-1] < losses[0]
    for name, tensor in straight.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=0, atol=0)
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 and nothing more")
    assert descend(8, tmp_path / "cut.pt")[1] == losses


def test_a_head_at_rest_is_its_canonical_gaussians() -> None:
    head = small_head()
    means, quats, scales, opacities, colors = head(None, torch.zeros(1))
    canonical = head.tensors()["canonical"]
    np.testing.assert_allclose(means[0].detach().numpy().T, canonical[:3])
    np.testing.assert_allclose(quats[0].detach().numpy().T, canonical[3:7])
    np.testing.assert_allclose(scales[0].detach().numpy().T, np.exp(canonical[7:10]), rtol=1e-5)
    np.testing.assert_allclose(opacities[0].detach().numpy(), 1 / (1 + np.exp(-canonical[10])), rtol=1e-5)
    np.testing.assert_allclose(colors[0].detach().numpy().T, canonical[11:])


def test_a_heads_table_is_the_one_that_is_baked_from_its_bundle() -> None:
    head = small_head()
    fitted: dict[str, Any] = head.tensors()
    avatar = replace(make_huma1_avatar("violet", gaussians=6), **fitted)
    np.testing.assert_allclose(triplanes.bake(avatar), head.table().detach().numpy(), atol=2e-3)  # planes are halves


# --- linear bases ------------------------------------------------------------------------------------------------


def made_heard(frames: int, speech: float) -> Heard:
    rng = np.random.default_rng(3)
    hidden = rng.normal(size=(1, -(-frames // clock.CHUNK_FRAMES), WINDOW_TOKENS, SPEECH_WIDTH)).astype(np.float16)
    return Heard(hidden, np.full((1, frames), speech, np.float32))


def test_driving_an_avatar_gives_the_served_graphs_offsets(repository: Path) -> None:
    avatar = make_huma1_avatar("violet")
    heard = made_heard(6, 1.0)
    driven = np.stack(list(huma1_drive.drive(avatar, heard, range(6))))
    inputs = {"HIDDEN": heard.hidden[0].astype(np.float32), "TABLE": np.repeat(triplanes.bake(avatar)[None], 2, 0)}
    inputs |= {name.upper(): np.repeat(tensor[None], 2, 0) for name, tensor in avatar.deformation.items()}
    served = feeds.session(repository / "deformation_huma1" / "1" / "model.onnx").run(None, inputs)[0]
    np.testing.assert_allclose(driven, served.reshape(8, bundle.ATTRIBUTES, -1)[:6], atol=1e-4)
    assert np.ptp(driven, axis=0).max() > 0.01
    for offsets in huma1_drive.drive(avatar, made_heard(6, 0.05), range(6)):
        assert not offsets.any()


@settings(max_examples=25)
@given(st.integers(1, 6), st.integers(2, 12), st.integers(0, 1000))
def test_offsets_of_a_low_rank_are_kept_whole(rank: int, frames: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(frames, rank)) @ rng.normal(size=(rank, bundle.ATTRIBUTES * 9))
    offsets = mixed.reshape(frames, bundle.ATTRIBUTES, 9).astype(np.float32)
    reduction = huma1_drive.reduce(offsets, rank)
    assert len(reduction.bases) <= rank
    assert reduction.energy == pytest.approx(1, abs=1e-4)
    for frame in range(frames):
        coefficients = reduction.coefficients[frame]
        for drawn_by in (coefficients, reduction.project(offsets[frame])):  # a tiny basis' own may differ
            np.testing.assert_allclose(reduction.offsets(drawn_by), offsets[frame], atol=2e-3 * np.abs(offsets).max())
    used = np.sqrt(np.mean(reduction.coefficients**2, 0))
    np.testing.assert_allclose(used, 1, rtol=1e-3)


def test_fewer_bases_keep_less_of_a_made_avatars_motion() -> None:
    avatar = make_huma1_avatar("violet")
    offsets = np.stack(list(huma1_drive.drive(avatar, made_heard(40, 1.0), range(40))))
    errors = []
    for rank in (1, 5, 20):
        reduction = huma1_drive.reduce(offsets, rank)
        left = np.stack([reduction.offsets(coefficients) for coefficients in reduction.coefficients])
        errors.append(float(np.mean((left - offsets) ** 2)))
        assert reduction.bases.shape == (rank, bundle.ATTRIBUTES, avatar.gaussians)
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_a_derived_huma2_draws_what_its_huma1_draws(
    speech: Float32, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as 20 bases keep it: given the projected coefficients, it differs by their quantisation alone."""
    monkeypatch.setattr(stage_b, "STEPS", 20)
    tracked, _ = talking_head.make_track(48)
    paths = talking_head.make(tmp_path, speech, 48, size=64)
    avatar = replace(make_huma1_avatar("violet"), provenance={"train_frames": 40})
    subject = Huma1Subject(avatar, Recording(paths["video"], paths["audio"]), tracked, made_heard(48, 1.0))
    rng = np.random.default_rng(0)
    heard = stage_b.Heard(rng.normal(size=(40, bundle.FEATURES)).astype(np.float32), np.ones(40, np.float32))
    derived, reduction = huma1_drive.derive(subject, [heard], 0)
    assert derived.provenance["derived_from"] == "huma1"
    assert bundle.read(bundle.write(derived, tmp_path / "avatars").parent, "violet").gaussians == avatar.gaussians
    kept = huma1_drive.kept_psnr(subject, reduction, range(0, 40, 8))
    assert min(kept) > 25
    shapes = splat.Blendshapes(derived.canonical, derived.bases, derived.basis_scales)
    grey = np.full((64, 64, 3), 128, np.uint8)
    for frame, offsets in zip((0, 16), huma1_drive.drive(avatar, subject.heard, (0, 16)), strict=True):
        weights = np.append(reduction.project(offsets), tracked.blink[frame]).astype(np.float32)
        (linear,) = splat.render_onto([splat.Job(shapes, weights, tracked.viewmats[frame], avatar.K, grey)])
        full = subject.draw(grey, frame, reduction.offsets(reduction.project(offsets)))
        assert quality.psnr(full, linear) > 35
