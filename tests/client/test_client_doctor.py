"""What `talksplat doctor` finds: each failure made to happen."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import av
import pytest
from scripted_server import ScriptedServer

from talksplat.server import Server
from talksplat_client import Client, Limits, Timeout, cli, doctor
from talksplat_client.doctor import Finding


def only(findings: Iterable[Finding], level: str, about: str) -> str:
    """The one sentence of this level about it."""
    [found] = [each.sentence for each in findings if (each.level, each.about) == (level, about)]
    return found


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds all programs there are: a machine without talksplat."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    return tmp_path


def test_another_python_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(doctor.python(), "ok", "python").startswith("Python 3.1")
    monkeypatch.setattr(importlib.metadata, "metadata", lambda _: {"Requires-Python": ">=3.8,<3.10"})
    assert "expected >=3.8,<3.10" in only(doctor.python(), "problem", "python")
    monkeypatch.setattr(importlib.metadata, "metadata", lambda _: {"Requires-Python": ">=4.0"})
    assert "make another environment" in only(doctor.python(), "problem", "python")


def test_each_extra_that_is_missing_says_what_it_would_give(monkeypatch: pytest.MonkeyPatch) -> None:
    named = {each.about for each in doctor.extras()}
    assert named >= {"media", "livekit", "pipecat", "webrtc", "c2pa"}
    assert named <= doctor.EXTRAS.keys()
    needs = ["numpy", 'av; extra == "media"', 'no-such-package>=1; extra == "media"', 'c2pa-python; extra == "c2pa"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: needs)
    sentence = only(doctor.extras(), "note", "media")
    assert sentence == (
        "No files, other sample rates, microphones without no-such-package: pip install 'talksplat-client[media]'"
    )


def test_an_ffmpeg_without_an_encoder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(doctor.codecs(), "ok", "codecs").endswith("writes mp4, webm, webp, png, jpeg.")
    monkeypatch.setattr(av.codec, "codecs_available", av.codec.codecs_available - {"libvpx-vp9", "png"})
    assert "(webm: libvpx-vp9; png: png)" in only(doctor.codecs(), "note", "codecs")
    monkeypatch.setitem(sys.modules, "av", None)
    assert list(doctor.codecs()) == []  # the extra is missing, and that was said


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError("PortAudio library not found"), "apt install libportaudio2"), (ValueError("no device"), "(no device)")],
)
def test_a_missing_microphone_is_a_note(monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str) -> None:
    def scripted(*_: object) -> Any:
        raise error

    monkeypatch.setattr(doctor, "import_package", scripted)
    assert reason in only(doctor.microphone(), "note", "microphone")


def test_a_server_that_is_not_there_is_a_problem() -> None:
    with Client("127.0.0.1:1") as client:
        [finding] = doctor.server(client)
    assert (finding.level, finding.about) == ("problem", "server")
    assert "127.0.0.1:1: Connection refused. Start one with `make serve`" in finding.sentence


def test_a_real_server_is_timed(server: Server) -> None:
    with Client(server.grpc_url, limits=Limits(in_flight=1)) as client:
        found = list(doctor.server(client))
    assert {each.about for each in found} == {"server", "clock", "avatars", "latency", "recogniser", "voice"}
    assert "problem" not in {each.level for each in found if each.about != "latency"}  # a busy machine is slow
    assert [each.sentence.split(" of ")[1] for each in found if each.about == "latency"] == ["rest", "speech"]


def test_a_server_that_is_slower_than_time_passes_is_a_problem() -> None:
    with (
        ScriptedServer(delay=lambda chunk: 0.25 if chunk >= 0 else 0) as server,
        Client(server.url, limits=Limits(in_flight=1), timeout=Timeout(recovery=0.1)) as client,
    ):
        slow = [each for each in doctor.server(client) if each.about == "latency"]
    assert [each.level for each in slow].count("problem") >= 1
    assert all("Live streams would stall" in each.sentence for each in slow if each.level == "problem")


def test_a_machine_without_the_server_s_package_is_a_client(elsewhere: Path) -> None:
    assert "is a client's" in only(doctor.serving(), "ok", "serving")


def test_the_server_s_own_command_is_asked(elsewhere: Path) -> None:
    program(
        elsewhere,
        "talksplat-server",
        """[ "$*" = "doctor --json" ] && echo '{"findings": [
        {"level": "note", "about": "disk", "sentence": "Little is free."}]}'; exit 1""",
    )
    assert list(doctor.serving()) == [Finding("note", "disk", "Little is free.")]


def test_a_server_s_command_that_breaks_is_a_problem(elsewhere: Path) -> None:
    program(elsewhere, "talksplat-server", "echo Traceback")
    assert "install talksplat again" in only(doctor.serving(), "problem", "serving")


def test_the_command_prints_sentences_or_json_and_exits_by_what_it_found(
    server: Server, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.main(["doctor", "--url", server.grpc_url])
    lines = capsys.readouterr().out.splitlines()
    assert status == any(line.startswith("problem") for line in lines)
    assert any(line.startswith("     ok  server: ") for line in lines)
    assert cli.main(["doctor", "--url", "127.0.0.1:1", "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [each["about"] for each in findings if each["level"] == "problem"] == ["server"]
    assert os.listdir(elsewhere) == []
