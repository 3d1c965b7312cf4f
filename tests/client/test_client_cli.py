"""The command `talksplat`."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
import wave
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from scripted_server import ScriptedServer

from talksplat.server import Server
from talksplat_client import cli
from talksplat_client._audio import Samples

RATE = 22_050
SECONDS = 1.5


def syllables(seconds: float = SECONDS) -> Samples:
    t = np.arange(round(RATE * seconds)) / RATE
    return np.asarray(0.3 * np.sin(2 * np.pi * 150 * t) * np.sin(2 * np.pi * 4 * t) ** 2, np.float32)


def pcm(seconds: float = SECONDS) -> bytes:
    return bytes(np.round(syllables(seconds) * 32767).astype("<i2"))


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "voice.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(pcm())
    return path


def feed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))


def start(*arguments: str) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    # What a shell starts in the background ignores Ctrl-C, and so would the tests' own child.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "talksplat_client.cli", *arguments]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)


def test_animate_writes_a_video_and_reports(
    server: Server, recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "red.mp4"
    out.parent.mkdir()
    command = ["animate", str(recording), "--url", server.grpc_url, "--avatar", "red", "--out", str(out)]
    assert cli.main([*command, "--json", "--transcript"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"transcript", "files", "frames", "seconds_of_audio", "ttff_ms", "fps", "preload_ms"}
    assert (report["frames"], report["seconds_of_audio"]) == (38, SECONDS)
    assert min(report["ttff_ms"], report["fps"], report["preload_ms"]) > 0
    assert list(out.parent.iterdir()) == [out]
    with av.open(str(out)) as container:
        assert container.streams.video[0].frames == 38
        assert container.streams.audio[0].duration
    assert cli.main(command) == 0
    assert "38 frames for 1.5 s" in capsys.readouterr().out


@pytest.mark.parametrize("raw", [False, True], ids=["wav", "raw"])
def test_animate_reads_standard_input(
    server: Server, recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: bool
) -> None:
    feed(monkeypatch, pcm() if raw else recording.read_bytes())
    out = tmp_path / "red.mp4"
    command = ["animate", "-", "--url", server.grpc_url, "--avatar", "red", "--out", str(out)]
    assert cli.main([*command, "--raw", str(RATE)] if raw else command) == 0
    with av.open(str(out)) as container:
        assert container.streams.video[0].frames == 38


def test_transcribe_prints_the_text(
    recording: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with ScriptedServer() as server:
        assert cli.main(["transcribe", str(recording), "--url", server.url]) == 0
        feed(monkeypatch, pcm())
        assert cli.main(["transcribe", "-", "--raw", str(RATE), "--url", server.url, "--json"]) == 0
    plain, as_json = capsys.readouterr().out.splitlines()
    assert json.loads(as_json) == {"transcript": plain}
    assert plain == f"[{round(16_000 * SECONDS)}]"


def test_avatars_lists_and_preloads(capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedServer() as server:
        assert cli.main(["avatars", "--url", server.url]) == 0
        assert capsys.readouterr().out == "ava\tloaded\nbob\ton disk\n"
        assert cli.main(["avatars", "--url", server.url, "--preload", "ava", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
    assert report["avatars"] == [{"id": "ava", "loaded": True}, {"id": "bob", "loaded": False}]
    assert [each["avatar"] for each in report["preloaded"]] == ["ava"]


def test_stream_writes_jpegs_one_after_the_other(server: Server) -> None:
    command = ["stream", "-", "--raw", str(RATE), "--url", server.grpc_url, "--avatar", "red", "--out", "-"]
    out, errors = start(*command).communicate(pcm(), timeout=30)
    assert out.count(b"\xff\xd8\xff") == out.count(b"\xff\xd9") == 38
    assert out.startswith(b"\xff\xd8")
    assert errors.decode().startswith("38 frames, ")


def test_stream_plays_a_file_as_if_it_were_live(recording: Path, tmp_path: Path) -> None:
    out = tmp_path / "frames"
    with ScriptedServer() as server:
        command = ["stream", str(recording), "--url", server.url, "--avatar", "ava", "--out", str(out)]
        assert cli.main(command) == 0
    indices = [json.loads(each)["index"] for each in out.read_text().replace("}{", "}\n{").splitlines()]
    assert indices == list(range(38))


def test_a_raw_pipe_may_cut_samples_anywhere() -> None:
    class Pipe(io.RawIOBase):
        def __init__(self, data: bytes) -> None:
            self.rest = data

        def read(self, size: int = -1) -> bytes:
            head, self.rest = self.rest[:3], self.rest[3:]
            return head

    heard = np.concatenate(list(cli._raw_packets(Pipe(pcm(0.1)))))  # type: ignore[arg-type]  # all that is needed of it
    np.testing.assert_allclose(heard, syllables(0.1), atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["transcribe", "none.wav"], "none.wav: No such file"),
        (["transcribe", "."], "Is a directory"),
        (["animate", __file__, "--avatar", "ava", "--out", "x.mp4"], "no audio or video file"),
        (["avatars", "--url", "http://x"], "expected host:port"),
        (["avatars", "--url", "127.0.0.1:1"], "127.0.0.1:1: Connection refused"),
    ],
)
def test_what_went_wrong_is_one_sentence(capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str) -> None:
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("talksplat: ")
    assert captured.err.count("\n") == 1
    assert reason in captured.err


@pytest.mark.parametrize("avatar", ["ava", "eve"])
def test_an_animation_that_fails_leaves_no_file(
    recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], avatar: str
) -> None:
    with ScriptedServer() as server:  # its frames are no pictures
        out = tmp_path / "out.mp4"
        command = ["animate", str(recording), "--url", server.url, "--avatar", avatar, "--out", str(out)]
        assert cli.main(command) == 1
    assert ("no avatar 'eve'" if avatar == "eve" else "frame 0 is no JPEG") in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [recording]


@pytest.mark.parametrize(
    "arguments", [[], ["dance"], ["animate", "x.wav"], ["stream"], ["transcribe", "-", "--raw", "x"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: talksplat" in capsys.readouterr().err


def test_an_interrupt_exits_with_130_and_leaves_no_file(recording: Path, tmp_path: Path) -> None:
    with ScriptedServer(delay=lambda chunk: 60 if chunk >= 0 else 0) as server:
        process = start(
            *("animate", str(recording), "--url", server.url, "--avatar", "ava"), *("--out", str(tmp_path / "out.mp4"))
        )
        while server.count < 2:  # the preload, then the first chunk
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=20)
    assert (process.returncode, out, errors) == (130, b"", b"")
    assert list(tmp_path.iterdir()) == [recording]


def test_a_reader_that_goes_away_ends_the_stream_quietly() -> None:
    with ScriptedServer() as server:
        process = start("stream", "-", "--raw", str(RATE), "--url", server.url, "--avatar", "ava", "--out", "-")
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(pcm(3))
        process.stdin.close()
        os.read(process.stdout.fileno(), 100)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=20) == 1
        process.stderr.close()
