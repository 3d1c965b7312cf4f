"""The baselines of other families learn to draw a small head, see only what they may, and can be interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import talking_head
import torch
from rich.console import Console

from talksplat_export import geometry, stage_b, track
from talksplat_export.families import radiance_field
from talksplat_export.families.baseline import Baseline, Crops, Scene, fitted
from talksplat_export.families.inpainting import Inpainting
from talksplat_export.families.radiance_field import RadianceField
from talksplat_export.quality import psnr
from talksplat_export.recording import Recording
from talksplat_export.steps import Steps

Float32 = npt.NDArray[np.float32]
FRAMES, TRAINING = 72, 60


class SmallInpainting(Inpainting):
    size = 48
    batch = 4
    steps = 90
    rate = 2e-3


class SmallField(RadianceField):
    size = 48
    batch = 3
    steps = 130
    rate = 1.2e-2


KINDS: tuple[type[Baseline], ...] = (SmallInpainting, SmallField)


@pytest.fixture(scope="module", autouse=True)
def _small_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(radiance_field, "RAYS", 250)
        patch.setattr(radiance_field, "SAMPLES", 8)
        yield


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, speech: Float32) -> Scene:
    paths = talking_head.make(tmp_path_factory.mktemp("head"), speech, FRAMES)
    recording = Recording(paths["video"], paths["audio"])
    tracked = track.from_ground_truth(paths["track"], recording)
    # The drawn mouth does not follow the speech; a sound that tells how far it is open stands in for it.
    features = np.random.default_rng(0).normal(size=(FRAMES, 128)).astype(np.float32) * 0.1
    features[:, :8] += 3 * tracked.expression[:, :1]
    return Scene.of(recording, tracked, stage_b.Heard(features, np.ones(FRAMES, np.float32)), TRAINING)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def trained(request: pytest.FixtureRequest, scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Baseline:
    kind: type[Baseline] = request.param
    return fitted(kind, scene, 0, 60.0, Steps(tmp_path_factory.mktemp("work"), {}, Console(quiet=True)))


def test_a_baseline_learns_more_than_the_mean_picture(trained: Baseline, scene: Scene) -> None:
    crops = Crops.read(trained.window, lambda done: None)
    mean = torch.from_numpy(crops.pixels.astype(np.float32).mean(0) / 255)
    drawn, average = [], []
    for index, recorded in enumerate(scene.recording.frames(0, TRAINING)):
        if scene.track.expression[index, 0] > 0.7:  # wide open
            low, high = (scene.track.landmarks[index, 48:].round().astype(int) for _ in range(2))
            mouth = slice(low[:, 1].min(), high[:, 1].max()), slice(low[:, 0].min(), high[:, 0].max())
            drawn.append(psnr(recorded[mouth], trained.draw(recorded, index)[mouth]))
            average.append(psnr(recorded[mouth], trained.window.paste(mean, recorded, index)[mouth]))
    assert np.mean(drawn) > np.mean(average) + 1


def test_only_what_lies_under_the_mask_is_drawn(trained: Baseline, scene: Scene) -> None:
    recorded = next(scene.recording.frames(TRAINING, TRAINING + 1))
    drawn = trained.draw(recorded, TRAINING)
    covered = np.zeros(recorded.shape[:2], bool)
    covered[trained.window.place(TRAINING)] = trained.window.mask[..., 0] > 0
    np.testing.assert_array_equal(drawn[~covered], recorded[~covered])
    assert (drawn[covered] != recorded[covered]).any()


def test_what_is_to_be_drawn_is_not_seen(trained: Baseline, scene: Scene) -> None:
    recorded = next(scene.recording.frames(TRAINING, TRAINING + 1))
    place = trained.window.place(TRAINING)
    spoilt = recorded.copy()
    spoilt[place][trained.window.mask[..., 0] > 0] = (0, 255, 0)
    with torch.inference_mode():
        honest, blind = (trained.predict(image, TRAINING) for image in (recorded, spoilt))
    inner = trained.window.reduced_mask()[0] > 0.9
    assert float((honest - blind).abs()[:, inner].max()) < 0.05


def test_the_sound_moves_the_mouth(trained: Baseline, scene: Scene) -> None:
    recorded = next(scene.recording.frames(TRAINING, TRAINING + 1))
    pictures = []
    for level in (0.0, 3.0):
        trained.sound.inputs[TRAINING].view(-1, 129)[:, :8] = level
        with torch.inference_mode():
            pictures.append(trained.predict(recorded, TRAINING))
    assert float((pictures[0] - pictures[1]).abs().max()) > 0.1


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_an_interrupted_fit_goes_on_to_the_same_result(kind: type[Baseline], scene: Scene, tmp_path: Path) -> None:
    def start() -> Baseline:
        torch.manual_seed(0)
        return kind(scene)

    straight = start()
    crops = Crops.read(straight.window, lambda done: None)
    losses = straight.fit(crops, 0, 60.0, tmp_path / "straight.pt", lambda done: None, steps=6)

    def interrupt(done: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start().fit(crops, 0, 60.0, tmp_path / "resumed.pt", interrupt, steps=6)
    resumed = start()
    assert resumed.fit(crops, 0, 60.0, tmp_path / "resumed.pt", lambda done: None, steps=6) == losses
    for one, other in zip(straight.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_fit_ends_when_its_time_is_up(scene: Scene, tmp_path: Path) -> None:
    baseline = SmallField(scene)
    crops = Crops.read(baseline.window, lambda done: None)
    losses = baseline.fit(crops, 0, 1 / 60, tmp_path / "net.pt", lambda done: None, steps=100_000)
    assert 0 < len(losses) < 1000


def test_what_is_fitted_is_not_fitted_again(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SmallField, "steps", 2)
    done = Steps(tmp_path, {}, Console(quiet=True))
    first = fitted(SmallField, scene, 0, 60.0, done)
    monkeypatch.setattr(SmallField, "fit", lambda *_: pytest.fail("fitted again"))
    again = fitted(SmallField, scene, 0, 60.0, done)
    for one, other in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_rays_meet_the_face_where_the_landmarks_are(scene: Scene) -> None:
    field = SmallField(scene)
    region = scene.region
    rows, columns = np.nonzero(region.mask > 0.9)
    pixels = np.stack([columns, rows], 1)[::37] + 0.5
    points = geometry.unproject(pixels, region.depth[rows, columns].astype(float)[::37], region.viewmat, region.K)
    viewmat = scene.track.viewmats[TRAINING]
    seen = points @ viewmat[:3, :3].T + viewmat[:3, 3]
    rays = torch.from_numpy((seen / seen[:, 2:]).astype(np.float32))[None]
    view = torch.from_numpy(viewmat)

    def lift(depth: torch.Tensor) -> torch.Tensor:
        return (rays * depth[..., None] - view[:3, 3]) @ view[:3, :3]

    np.testing.assert_allclose(field._surface(lift, rays)[0].numpy(), seen[:, 2], atol=2e-3)
