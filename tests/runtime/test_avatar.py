import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_avatar import make_huma1_avatar

from talksplat import avatar as bundle
from talksplat.avatar import AnyAvatar, Avatar, BundleError, Huma1Avatar, ProfileError, UnknownAvatarError

ROOT = Path(__file__).resolve().parents[2]


def make(avatar_id: str = "kim", n: int = 5, **changes: Any) -> Avatar:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (16, 24, 3), dtype=np.uint8)
    fields: dict[str, Any] = {
        "id": avatar_id,
        "canonical": rng.normal(size=(14, n)).astype(np.float32),
        "bases": rng.integers(-127, 128, (14, 21, n), dtype=np.int8),
        "basis_scales": rng.random((14, 21), dtype=np.float32),
        "adapter_in": rng.normal(size=(129, 64)).astype(np.float32),
        "adapter_out": rng.normal(size=(65, 20)).astype(np.float32),
        "plates": [simplejpeg.encode_jpeg(picture, quality=50 + i) for i in range(3)],
        "viewmats": np.tile(np.eye(4, dtype=np.float32), (3, 1, 1)),
        "K": np.eye(3, dtype=np.float32),
        "width": 24,
        "height": 16,
        "audio_encoder": "0" * 64,
        "provenance": {"source": "noise"},
    }
    return Avatar(**(fields | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return bundle.write(make(), tmp_path)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "avatar.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written = make()
    bundle.write(written, tmp_path)
    found = bundle.read(tmp_path, "kim")
    for name in ("canonical", "bases", "basis_scales", "adapter_in", "adapter_out", "viewmats", "K"):
        np.testing.assert_array_equal(getattr(found, name), getattr(written, name))
    assert [bytes(plate) for plate in found.plates] == list(written.plates)
    assert (found.width, found.height, found.provenance) == (24, 16, {"source": "noise"})
    assert bundle.available(tmp_path) == ["kim"]


def test_arrays_in_any_memory_layout_are_read_back(tmp_path: Path) -> None:
    scales = np.asfortranarray(np.random.default_rng(1).random((14, 21), dtype=np.float32))
    bundle.write(make(basis_scales=scales), tmp_path)
    np.testing.assert_array_equal(bundle.read(tmp_path, "kim").basis_scales, scales)


def test_writing_again_replaces_the_bundle_and_leaves_nothing_else(tmp_path: Path) -> None:
    bundle.write(make(n=5), tmp_path)
    bundle.write(make(n=7), tmp_path)
    assert bundle.read(tmp_path, "kim").gaussians == 7
    assert [path.name for path in tmp_path.iterdir()] == ["kim"]


def test_a_failed_write_keeps_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle.write(make(n=5), tmp_path)

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        bundle.write(make(n=7), tmp_path)
    assert bundle.read(tmp_path, "kim").gaussians == 5
    assert [path.name for path in tmp_path.iterdir()] == ["kim"]


@pytest.mark.parametrize("name", ["gaussians.safetensors", "adapter.safetensors", "plates.safetensors", "plates.bin"])
def test_one_flipped_bit_is_refused_by_name(folder: Path, name: str) -> None:
    path = folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} is damaged"):
        bundle.read(folder.parent, "kim")


def test_a_missing_or_truncated_file_is_refused(folder: Path) -> None:
    (folder / "plates.bin").write_bytes(b"")
    with pytest.raises(BundleError, match="not as recorded"):
        bundle.read(folder.parent, "kim")
    (folder / "plates.bin").unlink()
    with pytest.raises(BundleError, match=r"plates\.bin is missing"):
        bundle.read(folder.parent, "kim")


def test_a_newer_schema_is_refused_with_advice(folder: Path) -> None:
    edit(folder, schema_version=bundle.SCHEMA_VERSION + 1)
    with pytest.raises(BundleError, match="update talksplat"):
        bundle.read(folder.parent, "kim")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "other"}, "something else wrote it"),
        ({"schema_version": "1"}, "schema_version"),
        ({"id": "lee"}, "renamed"),
        ({"files": {}}, "must list exactly"),
        ({"width": None}, "'width'"),
        ({"fps": 30}, "30 frames"),
        ({"profile": "huma9"}, "huma9"),
    ],
)
def test_a_foreign_manifest_is_refused_with_the_reason(folder: Path, change: dict[str, object], reason: str) -> None:
    edit(folder, **change)
    with pytest.raises(BundleError, match=reason):
        bundle.read(folder.parent, "kim")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
def test_any_bytes_as_manifest_are_refused_cleanly(folder: Path, data: bytes) -> None:
    (folder / "avatar.json").write_bytes(data)
    with pytest.raises(BundleError):
        bundle.read(folder.parent, "kim")


@pytest.mark.parametrize("name", ["", "../kim", "Kim", "a/b", ".hidden", "x" * 65, "kim\n"])
def test_an_id_is_never_a_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnknownAvatarError, match="no avatar id"):
        bundle.read(tmp_path, name)
    with pytest.raises(BundleError, match="no avatar id"):
        make(name)


def test_an_absent_avatar_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(UnknownAvatarError, match="'kim'"):
        bundle.read(tmp_path, "kim")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"canonical": np.zeros((14, 4), np.float32)}, r"bases is int8 \[14, 21, 5\]"),
        ({"canonical": np.zeros((14, 0), np.float32)}, "0 Gaussians"),
        ({"canonical": np.full((14, 5), np.nan, np.float32)}, "NaN"),
        ({"adapter_in": np.zeros((129, 64))}, "float64"),
        ({"plates": []}, "0 plates"),
        ({"canonical": np.zeros((), np.float32)}, "canonical is"),
        ({"K": np.zeros((3, 3), np.float32)}, "focal length"),
        ({"width": 20}, "multiple of 8"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(BundleError, match=reason):
        make(**change)


@pytest.mark.parametrize("plate", [b"GIF89a", simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8))])
def test_plates_that_are_no_jpeg_of_the_size_are_refused(plate: bytes) -> None:
    with pytest.raises(BundleError, match="plate 0"):
        make(plates=[plate], viewmats=np.eye(4, dtype=np.float32)[None])


def test_a_manifest_that_is_huge_or_deep_is_refused(folder: Path) -> None:
    for text, reason in (
        ("[" * 200_000, "not JSON"),
        (" " * (bundle.MAX_MANIFEST_BYTES + 1), "at most 1048576 are read"),
    ):
        (folder / "avatar.json").write_text(text)
        with pytest.raises(BundleError, match=reason):
            bundle.read(folder.parent, "kim")
    with pytest.raises(BundleError, match="at most 1048576 are read"):
        bundle.write(make(provenance={"source": "x" * bundle.MAX_MANIFEST_BYTES}), folder.parent)


def test_what_the_disk_refuses_is_a_bundle_that_cannot_be_read(folder: Path) -> None:
    manifest = folder / "avatar.json"
    manifest.unlink()
    manifest.mkdir()
    with pytest.raises(BundleError, match="'kim' can't be read: Is a directory"):
        bundle.read_adapter(folder.parent, "kim")
    manifest.rmdir()
    manifest.symlink_to(manifest)
    with pytest.raises(BundleError, match="'kim' can't be read: Too many levels"):
        bundle.version(folder.parent, "kim")


def test_a_bundle_that_is_replaced_while_it_is_read_is_read_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = bundle._contents

    def replaced(*arguments: Any) -> dict[str, bytes]:
        monkeypatch.setattr(bundle, "_contents", sound)
        bundle.write(make(n=7), folder.parent)  # the manifest that was read is of the old one
        return sound(*arguments)

    monkeypatch.setattr(bundle, "_contents", replaced)
    assert bundle.read(folder.parent, "kim").gaussians == 7


def test_an_interrupt_between_the_two_renames_keeps_the_old_bundle(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, moves = Path.rename, []

    def interrupted(self: Path, target: Path) -> Path:
        moves.append(target)
        if len(moves) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bundle.write(make(n=7), folder.parent)
    assert bundle.read(folder.parent, "kim").gaussians == 5
    assert list(folder.parent.iterdir()) == [folder]


def test_the_committed_avatar_belongs_to_the_committed_audio_encoder() -> None:
    weights = ROOT / "export" / "talksplat_export" / "weights" / "audio_encoder.safetensors"
    ava = bundle.read(ROOT / "avatars", "ava")
    assert ava.audio_encoder == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert sum(path.stat().st_size for path in (ROOT / "avatars" / "ava").iterdir()) <= 8_000_000


# The profile huma1


def make_huma1(**changes: Any) -> Huma1Avatar:
    return replace(make_huma1_avatar("kim", size=16, gaussians=5, plates=3), **changes)


def test_what_is_written_of_a_huma1_is_read_back(tmp_path: Path) -> None:
    written = make_huma1()
    folder = bundle.write(written, tmp_path)
    assert {path.name for path in folder.iterdir()} == {
        *("avatar.json", "gaussians.safetensors", "triplanes.safetensors", "deformation.safetensors"),
        *("plates.safetensors", "plates.bin"),
    }
    for kind in (Huma1Avatar, AnyAvatar):
        found = bundle.read(tmp_path, "kim", kind)
        assert isinstance(found, Huma1Avatar)
        for name, array in vars(written).items():
            if isinstance(array, np.ndarray):
                np.testing.assert_array_equal(getattr(found, name), array)


def test_a_profile_that_was_not_asked_for_is_refused_with_the_model_to_ask(tmp_path: Path) -> None:
    bundle.write(make_huma1(), tmp_path)
    bundle.write(make("lee"), tmp_path)
    for read in (bundle.read, bundle.read_adapter):
        with pytest.raises(ProfileError, match="'kim' is of the profile huma1, not huma2: the model animate_huma1"):
            read(tmp_path, "kim")
    with pytest.raises(ProfileError, match="'lee' is of the profile huma2, not huma1: the model animate animates"):
        bundle.read(tmp_path, "lee", Huma1Avatar)
    assert isinstance(bundle.read(tmp_path, "lee", AnyAvatar), Avatar)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"blink": np.zeros((14, 4), np.float32)}, r"blink is float32 \[14, 4\], expected float32 \[14, 5\]"),
        ({"coarse": np.zeros((3, 16, 64, 64), np.float32)}, "coarse is float32"),
        ({"fine": np.full((3, 16, 128, 128), np.inf, np.float16)}, "fine holds NaN or infinity"),
        ({"box": np.zeros((2, 3), np.float32)}, "box has no volume"),
        ({"mixing": np.zeros((64, 64), np.float32)}, r"mixing is float32 \[64, 64\]"),
        ({"speech_in": np.full((417, 64), np.nan, np.float32)}, "speech_in holds NaN"),
    ],
)
def test_arrays_of_a_huma1_that_do_not_fit_together_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(BundleError, match=reason):
        make_huma1(**change)


def test_a_bundle_that_lies_about_its_profile_is_refused(tmp_path: Path) -> None:
    edit(bundle.write(make_huma1(), tmp_path), profile="huma2")
    with pytest.raises(BundleError, match="must list exactly"):
        bundle.read(tmp_path, "kim")


def test_consent_is_kept_checked_and_read_alone(tmp_path: Path) -> None:
    consent = bundle.Consent(".txt", b"I agree. Kim")
    folder = bundle.write(make(consent=consent), tmp_path)
    assert (folder / "consent.txt").read_bytes() == b"I agree. Kim"
    assert bundle.read(tmp_path, "kim").consent == bundle.read_consent(tmp_path, "kim") == consent
    (folder / "consent.txt").write_bytes(b"I agreed. Kim")
    for read in (bundle.read, bundle.read_consent):
        with pytest.raises(BundleError, match=r"consent\.txt is 13 bytes, not as recorded"):
            read(tmp_path, "kim")


def test_a_bundle_without_consent_is_read_as_ever(folder: Path) -> None:
    assert "consent" not in json.loads((folder / "avatar.json").read_text())
    assert bundle.read(folder.parent, "kim").consent is bundle.read_consent(folder.parent, "kim") is None


def test_consent_is_no_file_that_older_readers_would_refuse(tmp_path: Path) -> None:
    manifest = json.loads(
        (bundle.write(make(consent=bundle.Consent(".md", b"yes")), tmp_path) / "avatar.json").read_text()
    )
    assert set(manifest["files"]) == {*Avatar.tensors, "plates.safetensors", "plates.bin"}  # all that they know


@pytest.mark.parametrize("consent", ["yes", {"name": "../../passwords.txt", "bytes": 1}, {"name": "consent.exe"}, [1]])
def test_a_consent_that_names_another_file_is_refused(folder: Path, consent: object) -> None:
    edit(folder, consent=consent)
    with pytest.raises(BundleError, match='"consent"'):
        bundle.read(folder.parent, "kim")


def test_the_committed_avatar_says_that_it_is_nobody() -> None:
    consent = bundle.read_consent(ROOT / "avatars", "ava")
    assert consent is not None
    assert b"ava is nobody" in consent.data


@pytest.mark.parametrize("name", ["triplanes.safetensors", "deformation.safetensors"])
def test_one_flipped_bit_of_a_huma1_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = bundle.write(make_huma1(), tmp_path) / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} is damaged"):
        bundle.read(tmp_path, "kim", Huma1Avatar)
