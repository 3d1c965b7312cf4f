"""The comparison of the families: complete, from real runs, and of like with like."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import talking_head
import torch
from make_avatar import make_avatar, make_huma1_avatar
from rich.console import Console
from torch import nn

from talksplat import avatar as bundle
from talksplat import clock
from talksplat.bench import preload
from talksplat.server import Ports, Server
from talksplat_export import compare, fit, quality, report, stage_b, track
from talksplat_export.families import radiance_field
from talksplat_export.families.baseline import Baseline
from talksplat_export.families.inpainting import Inpainting
from talksplat_export.families.radiance_field import RadianceField
from talksplat_export.fit import Settings
from talksplat_export.recording import Recording, RecordingError
from talksplat_export.steps import Steps
from talksplat_export.track import LAYOUTS

pytestmark = pytest.mark.timeout(300)  # fits four heads and starts the server

Float32 = npt.NDArray[np.float32]
Row = dict[str, Any]
FRAMES, TRAIN_SECONDS = 260, 9.0


class SmallInpainting(Inpainting):
    size, batch, steps = 48, 2, 20


class SmallField(RadianceField):
    size, batch, steps = 32, 2, 20


class ByColour:
    """In place of MediaPipe: how far the drawn head's dark inner mouth reaches down."""

    def __init__(self, model: Path) -> None:
        pass

    def __enter__(self) -> ByColour:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, frame: npt.NDArray[np.uint8]) -> tuple[Float32, None, None]:
        dark = (frame[40:, 30:66, 0] < 110) & (frame[40:, 30:66, 1] < 60)
        points = np.zeros((478, 2), np.float32)
        points[list(LAYOUTS[478].eyes[1]), 0] = 10  # level
        points[list(LAYOUTS[478].inner_lips[1]), 1] = dark.sum() / 10
        return points, None, None


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, speech: Float32) -> dict[str, Path]:
    paths: dict[str, Path] = talking_head.make(tmp_path_factory.mktemp("head"), speech, FRAMES)
    return paths


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., AbstractContextManager[Server]]]:
    """In place of a fresh server for each generation: one for both, without avatars until then."""
    server = Server(avatars=tmp_path_factory.mktemp("served"), ports=Ports.free())
    server.start()
    yield lambda _: nullcontext(server)
    server.kill()


@pytest.fixture(scope="module", autouse=True)
def _small(served: object) -> Iterator[None]:
    small = Settings(gaussians=300, plates=5, steps=4, degraded=1)
    generations = {"Huma 1": ("huma1", fit.HUMA1), "Huma 2": ("huma2", small)}
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (compare, "GENERATIONS", generations),
            (compare, "BASELINES", (SmallInpainting, SmallField)),
            (compare, "Landmarker", ByColour),
            (compare, "sources", lambda: "the same"),  # even while somebody edits them
            (compare, "STREAM_SECONDS", 1.0),
            (compare, "ROBUSTNESS_SECONDS", 1.0),
            (compare, "TIMED_CHUNKS", 2),
            (compare, "_torch_threads", lambda count: nullcontext()),  # two threads on a busy core take far longer
            (compare.Generation, "_served", served),
            (report, "write", lambda done, *_: done.folder / report.NAME),
            (preload, "COLD", 2),
            (stage_b, "STEPS", 100),
            (radiance_field, "RAYS", 100),
            (radiance_field, "SAMPLES", 6),
        ):
            patch.setattr(module, name, value)
        yield


def run(head: dict[str, Path], folder: Path, name: str) -> int:
    """The command, with its table in NAME.json and its picture in NAME.jpg; of Huma 1 there is a bundle."""
    model = folder / "no.task"
    model.touch()
    parser = ArgumentParser()
    compare.add_parser(parser.add_subparsers())
    arguments = ["compare", head["video"], "--audio", head["audio"], "--track", head["track"], "--landmarker", model]
    arguments += ["--huma1", folder / "avatars" / "huma1", "--work", folder]
    arguments += ["--train-seconds", TRAIN_SECONDS, "--minutes", 60]
    arguments += ["--json", folder / f"{name}.json", "--picture", folder / f"{name}.jpg"]
    args = parser.parse_args([str(argument) for argument in arguments])
    return int(args.run(args))


@pytest.fixture(scope="module")
def compared(head: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """The work folder of a comparison that was interrupted while the third contender was measured.

    Huma 2 is fitted; of Huma 1, whose fit takes longer, there is a bundle.
    """
    folder = tmp_path_factory.mktemp("compared")
    recording = Recording(head["video"], head["audio"])
    provenance = {
        "train_frames": round(TRAIN_SECONDS * clock.FPS),
        "recording_sha256": recording.sha256,
        "seconds": {"static": 30.0, "deformation": 60.0},
    }
    bundle.write(replace(make_huma1_avatar("huma1", size=96), provenance=provenance), folder / "avatars")
    with pytest.MonkeyPatch.context() as patch:
        measure = compare._measure

        def interrupted(contender: compare.Contender, *rest: Any) -> compare.Measured:
            if isinstance(contender, compare.Other):
                raise KeyboardInterrupt
            return measure(contender, *rest)

        patch.setattr(compare, "_measure", interrupted)
        assert run(head, folder, "table") == 130
        assert not (folder / "table.json").exists()

        def resumed(contender: compare.Contender, *rest: Any) -> compare.Measured:
            assert isinstance(contender, compare.Other), "measured twice"
            return measure(contender, *rest)

        patch.setattr(compare, "_measure", resumed)
        assert run(head, folder, "table") == 0
    return folder


@pytest.fixture(scope="module")
def rows(compared: Path) -> dict[str, Row]:
    return {row["family"]: row for row in json.loads((compared / "table.json").read_text())["rows"]}


def test_the_table_is_complete(rows: dict[str, Row]) -> None:
    assert list(rows) == ["Huma 1", "Huma 2", "2D generator", "radiance field"]
    columns = set(rows["Huma 1"])
    for name, row in rows.items():
        assert set(row) == columns
        missing = {column for column, value in row.items() if value is None}
        if name.startswith("Huma"):
            assert not missing
        else:  # not served, and nothing is done for one that is in memory
            assert missing == {"preload_warm_ms", "first_frame_ms", *compare.ROBUSTNESS}
        assert row["frames"] == FRAMES - round(TRAIN_SECONDS * clock.FPS)


def test_its_numbers_are_those_of_the_runs(rows: dict[str, Row], compared: Path, head: dict[str, Path]) -> None:
    for name, (profile, _) in compare.GENERATIONS.items():
        folder = compared / "avatars" / profile
        avatar = bundle.read(folder.parent, folder.name, bundle.AnyAvatar)
        seconds = sum(avatar.provenance["seconds"].values())
        assert rows[name]["train_minutes"] == pytest.approx(seconds / 60, abs=0.06)
        assert rows[name]["bundle_mb"] == pytest.approx(sum(f.stat().st_size for f in folder.iterdir()) / 1e6, abs=0.01)
    done = Steps(compared, {}, Console(quiet=True))
    assert rows["radiance field"]["train_minutes"] == pytest.approx(done.seconds["radiance field"] / 60, abs=0.06)

    huma2 = bundle.read(compared / "avatars", "huma2", bundle.Avatar)
    recording = Recording.as_fitted(head["video"], head["audio"], huma2.width, huma2.provenance)
    tracked = track.from_ground_truth(head["track"], recording)
    subject = quality.Subject(huma2, recording, tracked, stage_b.hear(recording.audio, len(tracked)))
    measured = quality.measure(subject, "audio", ByColour(Path()))  # type: ignore[arg-type]
    assert {name: rows["Huma 2"][name] for name in measured} == measured


def test_costs_are_those_of_the_networks(rows: dict[str, Row]) -> None:
    small, large = rows["Huma 2"], rows["Huma 1"]
    assert small["net_params"] == 129 * 64 + 65 * 20
    assert small["net_mflop"] * 1e6 == pytest.approx(2 * (128 * 64 + 64 * 20 + 21 * 14 * 300), rel=0.01)
    assert large["net_params"] == 49_294
    assert large["encoder_mflop"] > 20 * small["encoder_mflop"]
    assert rows["2D generator"]["encoder_params"] == small["encoder_params"]
    assert rows["radiance field"]["table_params"] == 3 * (8 * 24**2 + 16 * 144**2)
    assert rows["2D generator"]["table_params"] == 0


def test_degraded_speech_is_as_noisy_as_its_column_says(speech: Float32) -> None:
    clean = speech[: 3 * clock.SAMPLE_RATE]
    found = compare.degraded(clean, speech[3 * clock.SAMPLE_RATE :])
    assert list(found) == list(compare.ROBUSTNESS)
    white, babble = (np.square(found[name] - clean).mean() for name in ("r_noise_10_db", "r_babble_10_db"))
    assert white == pytest.approx(babble, rel=0.05)
    assert 5 < 10 * np.log10(np.square(clean).mean() / white) <= 10.1  # pauses do not count as signal
    assert np.abs(found["r_gain_minus_20_db"]).max() == pytest.approx(np.abs(clean).max() / 10, rel=0.01)
    high = np.abs(np.fft.rfft(found["r_sampled_at_8_khz"]))[len(clean) * 5 // 16 :]  # above 5 kHz
    assert np.square(high).sum() < 0.01 * np.square(np.abs(np.fft.rfft(clean))[len(clean) * 5 // 16 :]).sum()


def test_flops_are_two_for_each_weight_of_a_product() -> None:
    layer = nn.Linear(30, 20)
    assert compare.mflop(lambda: layer(torch.zeros(7, 30))) == pytest.approx(2 * 7 * 30 * 20 / 1e6)


def test_the_picture_shows_all_families_side_by_side(compared: Path) -> None:
    data = (compared / "table.jpg").read_bytes()
    assert data[:2] == b"\xff\xd8"
    assert len(data) <= compare.PICTURE_BYTES


def test_a_wide_open_a_closed_and_a_blinking_frame_are_looked_at(compared: Path, head: dict[str, Path]) -> None:
    huma2 = bundle.read(compared / "avatars", "huma2", bundle.Avatar)
    recording = Recording(head["video"], head["audio"])
    tracked = track.from_ground_truth(head["track"], recording)
    heard = stage_b.Heard(np.zeros((FRAMES, 128), np.float32), np.ones(FRAMES, np.float32))
    wide, closed, *_ = frames = compare.notable(quality.Subject(huma2, recording, tracked, heard))
    test = slice(frames[0] // FRAMES + round(TRAIN_SECONDS * clock.FPS), FRAMES)
    assert tracked.lip_opening[wide] > np.percentile(tracked.lip_opening[test], 80)
    assert tracked.lip_opening[closed] < np.percentile(tracked.lip_opening[test], 30)
    assert tracked.blink[frames].max() > 0.9


def test_a_finished_comparison_trains_nothing_again(
    compared: Path, head: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Baseline, "fit", lambda *_: pytest.fail("trained again"))
    folders = {name: compared / "avatars" / profile for name, (profile, _) in compare.GENERATIONS.items()}
    done = Steps(compared, {}, Console(quiet=True))
    found = compare.contenders(folders, head["video"], head["audio"], head["track"], None, 60.0, 0, done)
    assert [each.name for each in found] == ["Huma 1", "Huma 2", "2D generator", "radiance field"]


def test_another_recordings_avatar_is_refused(head: dict[str, Path], compared: Path, tmp_path: Path) -> None:
    folders = {"Huma 1": compared / "avatars" / "huma1", "Huma 2": tmp_path / "red"}
    own = bundle.read(compared / "avatars", "huma1", bundle.AnyAvatar)
    provenance = {**own.provenance, "recording_sha256": "0" * 64}
    bundle.write(replace(make_avatar("red", size=96), provenance=provenance), tmp_path)
    done = Steps(tmp_path, {}, Console(quiet=True))
    with pytest.raises(RecordingError, match="another recording"):
        compare.contenders(folders, head["video"], head["audio"], head["track"], None, 60.0, 0, done)
