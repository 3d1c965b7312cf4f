"""What `talksplat-server doctor` finds: each failure made to happen."""

from __future__ import annotations

import json
import math
import shutil
import socket
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from make_avatar import make_avatar

from talksplat import avatar as bundle
from talksplat import doctor, edge, splat
from talksplat.cli import main
from talksplat.doctor import Finding
from talksplat.server import HOST, ROOT, Ports

REPOSITORY = ROOT / "model_repository"


def only(findings: Iterable[Finding], level: str) -> str:
    """The one sentence of this level."""
    [found] = [each.sentence for each in findings if each.level == level]
    return found


def linked(tmp_path: Path) -> Path:
    """A repository that stands for the real one: files are links."""
    target = tmp_path / "model_repository"
    shutil.copytree(REPOSITORY, target, copy_function=lambda source, at: Path(at).symlink_to(source))
    return target


def test_what_building_needs_is_said_by_the_preflight(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(doctor.tools(), "ok")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "The C++ compiler no-such-compiler, named by CXX, is missing" in only(doctor.tools(), "problem")


def test_a_processor_that_is_too_small_or_too_old_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(splat, "isas", lambda: ("avx2", "portable"))
    assert only(doctor.processor(), "ok") == "2 cores may be used; the rasterizer draws with avx2."
    monkeypatch.setattr(splat, "isas", lambda: ("portable",))
    assert "neither AVX2 nor AVX-512" in only(doctor.processor(), "note")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    assert "give it two" in only(doctor.processor(), "note")


def test_memory_that_does_not_suffice_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "MEMORY", math.inf)
    monkeypatch.setattr(doctor, "SHARED", math.inf)
    found = list(doctor.memory())
    assert "close other programs" in only(found, "note")
    assert "--shm-size 1g" in only(found, "problem")
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path / "none")
    assert "can't be used (No such file or directory)" in only(doctor.memory(), "problem")


def test_models_are_there_and_fresh() -> None:
    assert only(doctor.models(REPOSITORY), "ok").endswith("are there and fresh.")


def test_a_model_that_is_missing_is_named(tmp_path: Path) -> None:
    repository = linked(tmp_path)
    (repository / "vad" / "1" / "model.onnx").unlink()
    assert "lacks the model file of vad: run `make models`" in only(doctor.models(repository), "problem")
    assert "is no model repository" in only(doctor.models(tmp_path / "none"), "problem")


def test_a_model_of_older_code_is_named(tmp_path: Path) -> None:
    stamp = linked(tmp_path) / "vad" / "1" / "model.onnx.stamp"
    stamp.unlink()
    stamp.write_text(json.dumps({"stamp": "of another version", "rows": []}))
    sentence = only(doctor.models(tmp_path / "model_repository"), "problem")
    assert sentence == "Missing or stale: vad (fp32). Run `make models`."


def test_avatars_are_checked_for_damage_and_consent(tmp_path: Path) -> None:
    assert "There is no avatar in" in only(doctor.bundles(tmp_path), "problem")
    bundle.write(make_avatar("green"), tmp_path)
    assert "has no consent of who was recorded: fit it with --consent FILE" in only(doctor.bundles(tmp_path), "note")
    bundle.write(replace(make_avatar("green"), consent=bundle.Consent(".pdf", b"%PDF yes")), tmp_path)
    assert only(doctor.bundles(tmp_path), "ok").endswith("with its person's consent, consent.pdf.")
    (tmp_path / "green" / "plates.bin").write_bytes(b"")
    assert "plates.bin is 0 bytes, not as recorded" in only(doctor.bundles(tmp_path), "problem")


def test_a_port_that_is_taken_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    free = Ports.free()
    monkeypatch.setattr(doctor, "Ports", lambda: free)
    assert str(free.grpc) in only(doctor.ports(), "ok")
    with socket.create_server((HOST, free.grpc)):
        assert f"Port {free.grpc} (grpc) can't be used" in only(doctor.ports(), "note")


def test_missing_programs_are_noted_with_what_wants_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(edge, "MODULES", tmp_path)
    assert "apt install" in only(doctor.nginx(), "note")
    assert "apt install chromium" in only(doctor.browser(), "note")
    assert "There is no NVIDIA GPU" in only(doctor.gpu(), "ok")


def test_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"  # stands for the driver's: there may be no GPU here
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA L4 (UUID: x)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert only(doctor.gpu(), "ok").startswith("GPU 0: NVIDIA L4")


def test_a_missing_phonemiser_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "prepared replies only: espeak-ng (GPL-3) is needed" in only(doctor.voice(), "note")


def test_a_disk_that_is_almost_full_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISK", math.inf)
    assert "make room" in only(doctor.disk(), "note")


def test_the_command_exits_by_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--avatars", str(tmp_path), "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [each["about"] for each in findings if each["level"] == "problem"] == ["avatars"]
    status = main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert status == any(line.startswith("problem") for line in lines)
    assert any(line.startswith("     ok  avatars: The avatar ava is whole") for line in lines)
