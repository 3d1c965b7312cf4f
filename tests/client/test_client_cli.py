"""The command `talksplat`."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
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


def test_one_run_writes_every_format_from_the_same_frames(
    server: Server, recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    names = ("a.mp4", "a.webm", "a.webp", "a.srt", "a.vtt", "png/", "jpg/%02d.jpg")
    outs = [argument for name in names for argument in ("--out", f"{out}/{name}")]
    command = ["animate", str(recording), "--url", server.grpc_url, "--avatar", "red", *outs]
    assert cli.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == outs[1::2]
    assert sorted(os.listdir(out)) == ["a.mp4", "a.srt", "a.vtt", "a.webm", "a.webp", "jpg", "png"]
    assert len(os.listdir(out / "jpg")) == len(os.listdir(out / "png")) == 38
    for name in names[:2]:
        with av.open(str(out / name)) as container:
            assert sum(1 for _ in container.decode(video=0)) == 38


@pytest.mark.parametrize("form", ["mp4", "webm"])
def test_a_film_goes_to_standard_output_and_the_report_elsewhere(server: Server, recording: Path, form: str) -> None:
    command = ["animate", str(recording), "--url", server.grpc_url, "--avatar", "red"]
    out, errors = start(*command, "--out", "-", "--format", form, "--json").communicate(timeout=60)
    assert json.loads(errors)["frames"] == 38
    with av.open(io.BytesIO(out), "r") as container:
        assert sum(1 for _ in container.decode(video=0)) == 38


def test_the_sound_of_a_video_in_a_pipe_is_animated(server: Server, recording: Path, tmp_path: Path) -> None:
    film, pipe, again = tmp_path / "film.mp4", tmp_path / "pipe", tmp_path / "again.mp4"
    command = ["--url", server.grpc_url, "--avatar", "red", "--out"]
    assert cli.main(["animate", str(recording), *command, str(film)]) == 0
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(film.read_bytes()))
    writer.start()
    assert cli.main(["animate", str(pipe), *command, str(again)]) == 0
    writer.join(10)
    with av.open(str(again)) as container:
        assert 38 <= container.streams.video[0].frames <= 40  # AAC comes in blocks


def test_only_the_label_can_be_left_out(server: Server, recording: Path, tmp_path: Path) -> None:
    corners = []
    for name, *options in (("a", "--no-label"), ("b",)):
        command = ["animate", str(recording), "--url", server.grpc_url, "--avatar", "red", *options]
        assert cli.main([*command, "--out", f"{tmp_path}/{name}.mp4"]) == 0
        with av.open(f"{tmp_path}/{name}.mp4") as container:
            assert "the avatar red" in container.metadata["comment"]
            corners.append(next(container.decode(video=0)).to_ndarray(format="rgb24")[-18:, -22:].astype(int))
    assert np.abs(corners[0] - corners[1]).max() > 50


def test_progress_says_how_fast_it_is_and_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli._progress(50, 200, 2.0)
    assert capsys.readouterr().err == ""  # nobody looks
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cli._progress(50, 200, 2.0)
    cli._progress(50, None, 2.0)
    cli._progress(201, 200, 2.0)  # a file may be longer than it says
    first, unknown, last = re.findall(r"\r([^\r]*)\x1b\[K", capsys.readouterr().err)
    assert first == "[######..................] 50 of 200 frames, 25 frames/s, 6 s left"
    assert unknown == "50 frames, 25 frames/s"
    assert last.endswith("0 s left")


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
        (["animate", __file__, "--avatar", "ava", "--out", "x.avi"], "no audio or video file: Invalid data found"),
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


def test_a_raw_rate_of_zero_is_one(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["transcribe", __file__, "--raw", "0", "--url", server.grpc_url]) == 1
    assert capsys.readouterr().err.startswith("talksplat: the sample rate is 0 Hz, expected ")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["x.avi"], "x.avi does not say its format: expected one of the endings .mp4"),
        (["-"], "- does not say its format"),
        (["none/x.mp4"], "none/x.mp4 can't be written: No such file or directory"),
        (["x.mp4", "--out", "./x.mp4"], "two --out are the same file"),
        (["-", "--format", "webp"], "- is a pipe, and webp files can't be written into one"),
        (["x.mp4", "--c2pa-key", "key.pem"], "--c2pa-certificate and --c2pa-key belong together"),
        (["x.webm", "--c2pa-key", "k", "--c2pa-certificate", "c"], "webm files take no content credentials"),
        (["x.mp4", "--c2pa-key", "k", "--c2pa-certificate", "c"], "c can't be used: No such file or directory"),
    ],
)
def test_what_can_not_be_written_is_one_sentence(
    recording: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with ScriptedServer() as server:
        assert cli.main(["animate", str(recording), "--url", server.url, "--avatar", "ava", "--out", *options]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"talksplat: {reason}")
    assert list(tmp_path.iterdir()) == [recording]


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


@pytest.mark.parametrize("raw", [["--raw", "16000"], []])
def test_sound_of_no_length_is_said_and_leaves_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], raw: list[str]
) -> None:
    empty = tmp_path / "empty.wav"
    with wave.open(str(empty), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
    if raw:
        empty.write_bytes(b"")
    with ScriptedServer() as server:
        command = ["animate", str(empty), *raw, "--url", server.url, "--avatar", "ava", "--out", f"{tmp_path}/x.mp4"]
        assert cli.main(command) == 1
    assert capsys.readouterr().err == f"talksplat: {empty} holds no sound at all\n"
    assert list(tmp_path.iterdir()) == [empty]


def test_an_api_key_file_that_is_no_text_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_bytes(b"\xff")
    assert cli.main(["avatars", "--api-key-file", str(tmp_path / "key")]) == 1
    assert "holds no API key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "arguments"),
    [("/dev/full", ["avatars"]), ("closed", ["animate", "-", "--avatar", "red", "--out", "-", "--format", "mp4"])],
)
def test_output_that_nobody_takes_is_one_sentence_at_most(
    server: Server, recording: Path, monkeypatch: pytest.MonkeyPatch, place: str, arguments: list[str]
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    reading, closed = os.pipe()
    os.close(reading)
    with recording.open("rb") as sound, open("/dev/full" if place == "/dev/full" else closed, "wb") as out:
        command = [sys.executable, "-m", "talksplat_client.cli", *arguments, "--url", server.grpc_url]
        process = subprocess.run(command, stdin=sound, stdout=out, stderr=subprocess.PIPE, check=False)
        assert process.returncode == 1
        assert process.stderr.count(b"\n") == (place == "/dev/full")
        assert (b"No space left on device" in process.stderr) == (place == "/dev/full")


@pytest.mark.parametrize(
    "arguments", [[], ["dance"], ["animate", "x.wav"], ["stream"], ["transcribe", "-", "--raw", "x"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: talksplat" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_exits_with_130_and_leaves_no_file(recording: Path, tmp_path: Path, number: int) -> None:
    with ScriptedServer(delay=lambda chunk: 60 if chunk >= 0 else 0) as server:
        process = start(
            *("animate", str(recording), "--url", server.url, "--avatar", "ava"),
            *("--out", str(tmp_path / "out.mp4"), "--out", f"{tmp_path}/frames/"),
        )
        while server.count < 2:  # the preload, then the first chunk
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
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
