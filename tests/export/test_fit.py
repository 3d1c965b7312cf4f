"""Fitting an avatar, from end to end, to a small drawn head."""

from __future__ import annotations

import base64
import errno
import io
import json
import re
import shutil
from argparse import ArgumentParser
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import av
import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
import talking_head
from safetensors.torch import save_file

from talksplat import avatar as bundle
from talksplat.files import sha256
from talksplat_export import (
    audio_encoder,
    fit,
    huma1_fit,
    plates,
    quality,
    refinement,
    report,
    splat_torch,
    stage_a,
    stage_b,
    track,
)
from talksplat_export.recording import Recording

Float32 = npt.NDArray[np.float32]
TRAIN_SECONDS, FRAMES = 3.0, 260


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory, speech: Float32) -> dict[str, Path]:
    paths: dict[str, Path] = talking_head.make(tmp_path_factory.mktemp("head"), speech, FRAMES)
    return paths


def run(module: Any, name: str, *arguments: object) -> int:
    """Run a subcommand; its exit status."""
    parser = ArgumentParser()
    module.add_parser(parser.add_subparsers())
    args = parser.parse_args([name, *map(str, arguments)])
    return int(args.run(args))


def fit_head(head: dict[str, Path], folder: Path, *more: object) -> int:
    return run(
        fit,
        "fit",
        head["video"],
        *("--audio", head["audio"], "--track", head["track"]),
        *("--out", folder / "avatars" / "head", "--work", folder / "work"),
        *("--train-seconds", TRAIN_SECONDS, "--gaussians", 400, "--steps", 40, "--plates", 10),
        *more,
    )


@pytest.fixture(scope="session")
def fitted(head: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished fit; its parts may be read, not changed."""
    folder = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_b, "STEPS", 100)
        assert fit_head(head, folder) == 0
    return folder


@pytest.fixture(autouse=True)
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the fit of `fitted` draws a report: it takes as long as the rest."""
    monkeypatch.setattr(report, "write", lambda done, *_: done.folder / report.NAME)


@pytest.fixture
def copy(fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished fit that may be changed."""
    monkeypatch.setattr(stage_b, "STEPS", 100)
    shutil.copytree(fitted, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_recording_becomes_a_bundle_that_can_be_read(fitted: Path) -> None:
    avatar = bundle.read(fitted / "avatars", "head")
    assert (avatar.width, avatar.height) == (96, 96)
    assert 8 <= len(avatar.plates) <= 10
    assert avatar.provenance["train_frames"] == round(TRAIN_SECONDS * 25)
    assert avatar.audio_encoder == sha256(audio_encoder.WEIGHTS)
    assert np.abs(avatar.bases).max() == 127


def test_what_the_person_agreed_to_goes_into_the_bundle_and_that_it_lacks_is_said(
    copy: Path, head: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    signed = tmp_path / "signed by Kim.PDF"
    signed.write_bytes(b"%PDF-1.7 yes")
    for options, consent, finding in (
        ((), None, "warning: There is no consent of the recorded person"),
        (("--consent", signed), bundle.Consent(".pdf", b"%PDF-1.7 yes"), "note: The person's consent goes into"),
    ):
        assert fit_head(head, copy, *options) == 0
        avatar = bundle.read(copy / "avatars", "head")
        assert avatar.consent == consent
        assert finding in capsys.readouterr().out
        assert avatar.provenance["findings"][0].startswith(finding)


def test_a_consent_that_can_not_be_kept_is_refused_before_work(
    head: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "yes.exe").write_bytes(b"MZ")
    (tmp_path / "empty.txt").write_bytes(b" ")
    for name, reason in (("yes.exe", "ends with '.exe'"), ("empty.txt", "is empty"), ("none.txt", "No such file")):
        assert fit_head(head, tmp_path, "--consent", tmp_path / name) == 1
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_the_loss_falls(fitted: Path) -> None:
    losses = json.loads((fitted / "work" / "losses.json").read_text())
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def content(self, tag: str, attribute: str) -> list[tuple[str, bytes]]:
        """Kind and bytes of what lies in the page itself."""
        found = [
            re.fullmatch("data:(.*);base64,(.*)", attrs[attribute] or "") for name, attrs in self.tags if name == tag
        ]
        assert all(found), "the page needs another file"
        return [(match[1], base64.b64decode(match[2])) for match in found if match]


@pytest.fixture(scope="module")
def page(fitted: Path) -> Page:
    return Page(fitted / "work" / "report.html")


def test_the_report_is_one_well_formed_page_with_findings_and_figures(page: Page) -> None:
    assert page.open == []
    for words in ("Face, PSNR", "Lip opening, correlation", "10.4 s long", "The mouth was found closed", "SHA-256"):
        assert words in page.text
    assert re.search(r"split\d+\s+stage A\d+\s+hear\d+\s+stage B\d+", page.text)
    pictures = page.content("img", "src")
    assert [kind for kind, _ in pictures].count("image/svg+xml") == 3
    assert [kind for kind, _ in pictures].count("image/jpeg") == 6
    for kind, data in pictures:
        if kind == "image/jpeg":
            assert simplejpeg.decode_jpeg(data).shape[1] % 3 == 0


def test_the_report_plays_recorded_and_driven_frames_side_by_side_with_sound(page: Page) -> None:
    ((kind, data),) = page.content("video", "src")
    assert kind == "video/mp4"
    with av.open(io.BytesIO(data), "r") as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        container.seek(0)
        sound = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    assert frames[0].shape == (96, 3 * 96, 3)
    assert len(frames) == FRAMES - round(TRAIN_SECONDS * 25)
    assert np.abs(sound).max() > 0.05
    # The three pictures are of the same moment: nearer to each other than to those of other moments.
    first, second, _ = np.split(np.array(frames, np.float32), 3, axis=2)
    same = np.abs(first - second).mean()
    assert same < np.abs(first - np.roll(second, 20, axis=0)).mean()


def test_quality_is_better_than_that_of_an_avatar_that_does_not_move(
    head: dict[str, Path], copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (head["video"], "--audio", head["audio"], "--track", head["track"], "--json")
    assert run(quality, "quality", copy / "avatars" / "head", *arguments, copy / "q.json") == 0
    rows = json.loads((copy / "q.json").read_text())["rows"]
    assert [row["driven_by"] for row in rows] == ["coefficients", "audio"]
    assert rows[0]["frames"] == FRAMES - round(TRAIN_SECONDS * 25)
    assert rows[0]["lip_r"] > 0.99
    assert rows[0]["measured_by"] == "regression"

    avatar = bundle.read(copy / "avatars", "head")
    still = bundle.Avatar(**{**vars(avatar), "bases": np.zeros_like(avatar.bases)})
    bundle.write(still, copy / "avatars")
    run(quality, "quality", copy / "avatars" / "head", *arguments, copy / "still.json")
    worse = json.loads((copy / "still.json").read_text())["rows"]
    assert worse[0]["mouth_psnr_db"] < rows[0]["mouth_psnr_db"] - 1


def test_a_track_refined_by_the_avatar_draws_the_test_frames_better(head: dict[str, Path], fitted: Path) -> None:
    avatar = bundle.read(fitted / "avatars", "head")
    recording = Recording(head["video"], head["audio"])
    truth = track.from_ground_truth(head["track"], recording)
    shaken = truth.viewmats.copy()
    shaken[:, :2, 3] += np.random.default_rng(0).normal(0, 0.003, (len(truth), 2))  # half a pixel
    heard = stage_b.Heard(np.zeros((len(truth), 128), np.float32), np.zeros(len(truth), np.float32))
    given = quality.Subject(avatar, recording, replace(truth, viewmats=shaken), heard)
    found = given.refined()
    before, after = (quality.measure(subject, "coefficients", None)["face_psnr_db"] for subject in (given, found))
    assert float(after) > float(before) + 0.5  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.track.blink[: found.test.start], truth.blink[: found.test.start])


def test_a_fit_that_is_done_is_not_done_again(
    head: dict[str, Path], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (stage_a, stage_b):
        monkeypatch.setattr(module, "fit", lambda *_: pytest.fail("done again"))
    assert fit_head(head, copy) == 0


def test_a_track_from_pictures_is_refined_between_two_fits_and_that_is_not_done_again(
    head: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = track.from_ground_truth(head["track"], Recording(head["video"], head["audio"]))
    rng = np.random.default_rng(0)
    shaken = replace(truth, blink=np.clip(truth.blink + rng.normal(0, 0.1, len(truth)), 0, 1).astype(np.float32))
    model = tmp_path / "any.task"
    model.write_bytes(b"")
    monkeypatch.setattr(stage_b, "STEPS", 10)
    monkeypatch.setattr(fit, "_probe", lambda recording, *_: (recording, []))
    monkeypatch.setattr(track, "find", lambda *_: shaken)

    def fit_pictures() -> int:
        options = ("--gaussians", 300, "--steps", 40, "--plates", 10, "--train-seconds", FRAMES)  # none to report
        folders = ("--out", tmp_path / "avatars" / "head", "--work", tmp_path / "work")
        return run(fit, "fit", head["video"], "--audio", head["audio"], "--landmarker", model, *folders, *options)

    assert fit_pictures() == 0
    refined = track.Track.load(tmp_path / "work" / "refined.npz")
    assert len(refined) == len(truth)
    assert not np.array_equal(refined.viewmats, shaken.viewmats)
    served = bundle.read(tmp_path / "avatars", "head")
    start, stop = served.provenance["plate_frames"]
    np.testing.assert_array_equal(served.viewmats, plates.poses(refined, range(start, stop)))
    for module, name in ((stage_a, "fit"), (refinement, "refine")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("done again"))
    assert fit_pictures() == 0


def test_new_encoder_weights_repeat_stage_b_alone(
    head: dict[str, Path], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bundle.read(copy / "avatars", "head")
    weights = copy / "other.safetensors"
    encoder = audio_encoder.load()
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    state["project.weight"] *= -1
    save_file(state, weights)
    monkeypatch.setattr(audio_encoder, "WEIGHTS", weights)
    monkeypatch.setattr(stage_a, "fit", lambda *_: pytest.fail("stage A was repeated"))
    assert fit_head(head, copy) == 0
    after = bundle.read(copy / "avatars", "head")
    assert after.audio_encoder == sha256(weights)
    assert not np.array_equal(after.adapter_in, before.adapter_in)
    assert np.array_equal(after.bases, before.bases)


def test_an_interrupt_leaves_no_bundle_and_the_same_command_goes_on(
    head: dict[str, Path], tmp_path: Path, fitted: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(stage_b, "STEPS", 100)
    whole, calls = splat_torch.rasterization, 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 15:
            raise KeyboardInterrupt
        return whole(*args, **options)

    monkeypatch.setattr(splat_torch, "rasterization", interrupted)
    assert fit_head(head, tmp_path) == 130
    assert "same command" in capsys.readouterr().err
    assert not (tmp_path / "avatars").exists()
    assert fit_head(head, tmp_path) == 0
    assert calls == 15 + 40 - 14  # the steps before the interrupt were not repeated
    resumed, straight = (bundle.read(folder / "avatars", "head") for folder in (tmp_path, fitted))
    np.testing.assert_array_equal(resumed.canonical, straight.canonical)
    np.testing.assert_array_equal(resumed.bases, straight.bases)


@pytest.mark.parametrize(
    ("module", "name", "error"),
    [
        (bundle, "write", OSError(errno.ENOSPC, "No space left on device")),
        (stage_a, "cut", OSError(errno.ENOSPC, "No space left on device")),
        (
            stage_a,
            "fit",
            RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0: file write failed"),
        ),
    ],
)
def test_a_full_disk_is_said_and_leaves_no_bundle(
    head: dict[str, Path],
    tmp_path: Path,
    module: Any,
    name: str,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(stage_b, "STEPS", 20)
    monkeypatch.setattr(module, name, Mock(side_effect=error))
    assert fit_head(head, tmp_path) == 1
    assert "error: The disk is full:" in capsys.readouterr().err
    assert not list((tmp_path / "avatars").glob("*/avatar.json"))
    assert not (tmp_path / "work" / "crops").exists() or name != "cut"


def test_a_full_disk_keeps_the_bundle_that_there_was(
    head: dict[str, Path], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(bundle.read(copy / "avatars", "head").plates)
    monkeypatch.setattr(bundle, "write", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    assert fit_head(head, copy, "--plates", 5) == 1
    assert len(bundle.read(copy / "avatars", "head").plates) == before


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
)
def test_too_little_memory_is_said_and_leaves_no_bundle(
    head: dict[str, Path],
    tmp_path: Path,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(stage_a, "fit", Mock(side_effect=error))
    assert fit_head(head, tmp_path) == 1
    assert "error: There is not enough memory" in capsys.readouterr().err
    assert not (tmp_path / "avatars").exists()


def test_other_errors_are_not_hidden(head: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_a, "fit", Mock(side_effect=RuntimeError("a mistake")))
    with pytest.raises(RuntimeError, match="a mistake"):
        fit_head(head, tmp_path)


@pytest.mark.parametrize("name", ["steps.json", "track.npz", "gaussians.safetensors"])
def test_a_damaged_work_folder_is_mended(head: dict[str, Path], copy: Path, name: str) -> None:
    before = bundle.read(copy / "avatars", "head")
    file = copy / "work" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert fit_head(head, copy) == 0
    after = bundle.read(copy / "avatars", "head")
    np.testing.assert_array_equal(after.canonical, before.canonical)
    np.testing.assert_array_equal(after.adapter_in, before.adapter_in)


def test_a_damaged_checkpoint_is_left_out(
    head: dict[str, Path], tmp_path: Path, fitted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_b, "STEPS", 100)
    monkeypatch.setattr(stage_b, "versions", Mock(side_effect=KeyboardInterrupt))
    assert fit_head(head, tmp_path) == 130  # after stage A
    monkeypatch.undo()
    monkeypatch.setattr(stage_b, "STEPS", 100)
    records = json.loads((tmp_path / "work" / "steps.json").read_text())
    records["steps"]["stage A"]["finished"] = False
    (tmp_path / "work" / "steps.json").write_text(json.dumps(records))
    (tmp_path / "work" / "stage_a.pt").write_bytes(b"PK half a file")
    assert fit_head(head, tmp_path) == 0
    np.testing.assert_array_equal(
        bundle.read(tmp_path / "avatars", "head").canonical, bundle.read(fitted / "avatars", "head").canonical
    )


def test_another_recording_in_the_same_work_folder_is_fitted_itself(
    head: dict[str, Path], copy: Path, tmp_path: Path
) -> None:
    with av.open(str(head["video"])) as container:
        frames = [np.asarray(frame.to_ndarray(format="bgr24"), np.uint8) for frame in container.decode(video=0)]
    talking_head.write_video(tmp_path / "other.mp4", frames)
    before = bundle.read(copy / "avatars", "head")
    assert fit_head({**head, "video": tmp_path / "other.mp4"}, copy) == 0
    after = bundle.read(copy / "avatars", "head")
    red, blue = (avatar.canonical[[11, 13]].mean(1) for avatar in (before, after))
    assert np.diff(red) * np.diff(blue) < 0


def test_a_preview_is_small_lies_beside_the_avatar_and_none_of_its_steps_goes_into_the_fit(
    head: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_b, "STEPS", 20)
    monkeypatch.setattr(
        fit, "PREVIEW", replace(fit.PREVIEW, gaussians=300, steps=10, plates=5, seconds=10.0, max_size=64)
    )
    files = ("--audio", head["audio"], "--track", head["track"])
    folders = ("--out", tmp_path / "avatars" / "head", "--work", tmp_path / "work")
    assert run(fit, "fit", head["video"], *files, *folders, "--preview") == 0
    first = bundle.read(tmp_path / "avatars", "head-preview")
    assert not (tmp_path / "avatars" / "head").exists()
    assert (first.width, first.gaussians) == (64, 300)
    assert 4 <= len(first.plates) <= 5
    assert first.provenance["used_s"] == 10.0
    assert (tmp_path / "work" / "preview" / "steps.json").exists()
    assert fit_head(head, tmp_path) == 0
    second = bundle.read(tmp_path / "avatars", "head")
    assert (second.width, second.gaussians) == (96, 400)
    assert 8 <= len(second.plates) <= 10


@pytest.mark.parametrize(
    ("seconds", "fitted_to"), [(12, 9), (60, 45), (120, 90), (160, 125), (185.04, 150), (240, 150)]
)
def test_enough_is_kept_to_test_with_whatever_the_length(seconds: float, fitted_to: float) -> None:
    frames = round(seconds * 25)
    assert fit.Settings().training_frames(frames) == pytest.approx(fitted_to * 25, abs=1)
    assert fit.Settings(train_seconds=1000).training_frames(frames) == frames


def test_a_bundle_that_can_not_be_small_enough_is_refused(
    head: dict[str, Path], copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit_head(head, copy, "--megabytes", 0.2) == 1
    assert "do not fit into" in capsys.readouterr().err


def test_a_recording_that_is_too_short_is_refused(
    head: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit_head(head, tmp_path, "--train-seconds", 1) == 1
    assert "expected 2 s or more" in capsys.readouterr().err


def test_an_id_that_is_none_is_refused_before_work(
    head: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (head["video"], "--track", head["track"], "--audio", head["audio"], "--out", tmp_path / "No Id")
    assert run(fit, "fit", *arguments) == 1
    assert "avatar id" in capsys.readouterr().err


def test_a_folder_that_can_not_be_written_is_refused_before_work(
    head: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "avatars").write_bytes(b"")
    assert fit_head(head, tmp_path) == 1
    assert "avatars is a file" in capsys.readouterr().err
    (tmp_path / "avatars").unlink()
    refused = Mock(side_effect=PermissionError(errno.EACCES, "Permission denied"))  # root may write anywhere
    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    assert fit_head(head, tmp_path) == 1
    assert "takes no files (Permission denied)" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "option", [("--gaussians", 0), ("--steps", 0), ("--plates", -1), ("--size", 32), ("--seed", "x")]
)
def test_numbers_that_make_no_avatar_are_refused_before_work(
    head: dict[str, Path], tmp_path: Path, option: tuple[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        fit_head(head, tmp_path, *option)
    error = capsys.readouterr().err
    assert f"{option[0]}: " in error
    assert "expected" in error or "is no int" in error


def test_the_first_generation_is_not_fitted_on_a_gpu(
    head: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit_head(head, tmp_path, "--profile", "huma1", "--device", "cuda") == 1
    assert "huma1 are fitted with --device cpu only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_pose_deg": np.zeros((FRAMES, 2), np.float32)}, r"head_pose_deg of .* expected \[260, 3\]"),
        ({"eye_blink": np.zeros(7, np.float32)}, r"eye_blink of .* is \[7\], expected \[260\]"),
        ({"blendshapes": np.zeros((50, 2), np.float32)}, r"expected \[50"),
        ({"landmarks68_px": None}, "landmarks68_px"),
        ({"blendshapes": np.full((FRAMES, 2), np.nan, np.float32)}, "NaN"),
    ],
)
def test_ground_truth_that_does_not_fit_is_refused(
    head: dict[str, Path],
    tmp_path: Path,
    change: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arrays = {**np.load(head["track"]), **change}
    path = tmp_path / "track.npz"
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    assert fit_head({**head, "track": path}, tmp_path) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error)
    assert not (tmp_path / "avatars").exists()


def test_a_missing_landmarker_is_one_clear_sentence(
    head: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (head["video"], "--audio", head["audio"], "--out", tmp_path / "head", "--work", tmp_path / "work")
    assert run(fit, "fit", *arguments, "--landmarker", tmp_path / "none.task") == 1
    assert "There is no FaceLandmarker model at" in capsys.readouterr().err


def test_a_landmarker_that_can_not_be_downloaded_says_where_to_get_it(
    head: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("talksplat_export.track.LANDMARKER_URL", "http://127.0.0.1:9/face_landmarker.task")
    arguments = (head["video"], "--audio", head["audio"], "--out", tmp_path / "head", "--work", tmp_path / "work")
    assert run(fit, "fit", *arguments) == 1
    assert "--landmarker" in capsys.readouterr().err


def test_calm_frames_become_the_plates(head: dict[str, Path]) -> None:
    tracked = track.from_ground_truth(head["track"], Recording(head["video"]))
    chosen = plates.choose(tracked, 10)
    assert 8 <= len(chosen) <= 10
    assert tracked.lip_opening[chosen.start : chosen.stop].max() < np.percentile(tracked.lip_opening, 60)
    assert tracked.blink[chosen.start : chosen.stop].max() == 0
    assert 3 * len(tracked) <= 4 * len(plates.choose(tracked, 10_000)) <= 4 * len(tracked)


def test_frames_without_a_face_are_neither_plates_nor_fitted_to() -> None:
    tracked, _ = talking_head.make_track(60)
    seen = np.ones(60, bool)
    seen[20:26] = False
    tracked = replace(tracked, seen=seen)
    assert seen[list(plates.choose(tracked, 20))].all()
    share = stage_a.sampling(tracked)
    assert share[~seen].max() == 0
    assert share[seen].min() > 0


def test_the_first_generation_is_fitted_by_the_same_command_and_goes_on_after_an_interrupt(
    head: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huma1_fit, "DEGRADED", 1)
    more = ("--profile", "huma1", "--steps", 6, "--train-seconds", 2.0)
    photometric, calls = stage_a.photometric, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return photometric(*arguments)

    monkeypatch.setattr(stage_a, "photometric", interrupted)
    assert fit_head(head, tmp_path, *more) == 130
    assert not (tmp_path / "avatars").exists()
    assert fit_head(head, tmp_path, *more) == 0
    assert len(calls) == 5 + (2 + 6 - 4)  # static and deformation, without what was done before
    avatar = bundle.read(tmp_path / "avatars", "head", bundle.Huma1Avatar)
    assert (avatar.gaussians, avatar.provenance["settings"]["profile"]) == (400, "huma1")
    losses = json.loads((tmp_path / "work" / "losses.json").read_text())
    assert len(losses) == 6
    left = {path.name for path in (tmp_path / "work").iterdir()}
    assert left == {"steps.json", "track.npz", "losses.json", "huma1.safetensors"}
    again = bundle.read(tmp_path / "avatars", "head", bundle.Huma1Avatar)
    assert fit_head(head, tmp_path, *more) == 0
    np.testing.assert_array_equal(again.canonical, avatar.canonical)
    assert len(calls) == 9
    assert fit_head(head, tmp_path, "--profile", "huma1", "--preview") == 1
