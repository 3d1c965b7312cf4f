"""Starting and stopping, for real: `talksplat-server up` as a process of its own. tests/faults breaks it."""

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from make_avatar import write_avatar
from supervised import Up

from talksplat import cli
from talksplat import server as server_module
from talksplat.server import (
    ROOT,
    MissingModelsError,
    MissingTritonError,
    PortInUseError,
    Ports,
    Server,
    ServerError,
    StartError,
    UnsupportedPythonError,
    readable,
)
from talksplat.supervisor import LOOK_SECONDS, Supervisor


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("up")
    write_avatar(folder / "avatars")
    with Up(folder / "avatars", folder) as up:
        yield up


def test_up_says_where_it_serves(up: Up) -> None:
    for port in vars(up.ports).values():
        assert f"127.0.0.1:{port}" in up.text()
    assert "Avatars: red." in up.text()


def test_stopping_leaves_no_process_and_no_shared_memory(up: Up) -> None:
    prefix = f"talksplat-{up.process.pid}-"
    processes = psutil.Process(up.process.pid).children(recursive=True)
    assert any(region.name.startswith(prefix) for region in server_module.SHARED_MEMORY.iterdir())
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(30) == 0
    assert up.text().endswith("Stopped.\n")
    assert not [process for process in processes if server_module._is_there(process)]
    assert not list(server_module.SHARED_MEMORY.glob(f"{prefix}*"))


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind((server_module.HOST, 0))
        taken.listen()
        ports = Ports(http=taken.getsockname()[1])
        with pytest.raises(PortInUseError, match=rf"Port {ports.http} \(http\)") as caught:
            Server(avatars=tmp_path, ports=ports).start()
    for command in ("up", "secure"):  # both have the options that it names
        cli._parser().parse_args([command, *re.findall(r"--[a-z-]+", str(caught.value))])


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_does_not_exist_is_named(tmp_path: Path, port: int) -> None:
    with pytest.raises(PortInUseError, match=rf"Port {port} \(grpc\)"):
        Server(avatars=tmp_path, ports=Ports(http=0, grpc=port)).start()


def test_missing_models_are_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "vad" / "1").mkdir(parents=True)
    (tmp_path / "vad" / "config.pbtxt").write_text((ROOT / "model_repository/vad/config.pbtxt").read_text())
    with pytest.raises(MissingModelsError, match="vad: run `make models`"):
        Server(tmp_path, tmp_path).start()
    with pytest.raises(MissingModelsError, match="no model repository"):
        Server(tmp_path / "nowhere", tmp_path).start()


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingTritonError, match="nvidia-pytriton"):
        Server(avatars=tmp_path).start()


def test_a_python_without_a_stub_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.version_info", type("Version", (), {"major": 3, "minor": 99}))
    with pytest.raises(UnsupportedPythonError, match=r"Python 3\.99"):
        Server(avatars=tmp_path).start()


def test_a_model_that_fails_to_load_is_shown(tmp_path: Path) -> None:
    """And the server that ended over it leaves nothing behind."""
    (tmp_path / "bad" / "1").mkdir(parents=True)
    (tmp_path / "bad" / "config.pbtxt").write_text('backend: "python"\ninstance_group [ { kind: KIND_CPU } ]\n')
    (tmp_path / "bad" / "1" / "model.py").write_text("raise RuntimeError('no such luck')\n")
    server = Server(tmp_path, tmp_path, ports=Ports.free(), run_dir=tmp_path / "run")
    with pytest.raises(StartError, match="no such luck"):
        server.start()
    assert server.pid is None
    assert "no such luck" in (tmp_path / "run" / "triton.log").read_text()
    with pytest.raises(StartError, match="no such luck"):
        server.start()
    assert "no such luck" in (tmp_path / "run" / "triton.previous.log").read_text()
    assert not list(server_module.SHARED_MEMORY.glob(f"talksplat-{os.getpid()}-{server.ports.grpc}-*"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["up", "--repository", "."], "is no model repository"),
        (["up", "--free-ports", "--run-dir", "a_file/run"], "Not a directory: 'a_file/run'"),
        (["bench", "splat", "--quick", "--avatar", "./nobody"], "there is no avatar 'nobody'"),
    ],
)
def test_the_command_fails_with_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    reason: str,
) -> None:
    (tmp_path / "a_file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("talksplat-server: ")
    assert error.count("\n") == 1
    assert reason in error


def test_what_a_killed_launcher_left_is_removed_and_what_a_living_one_uses_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen(["true"]) as launcher:
        pass
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(server_module, "SHARED_MEMORY", tmp_path / "shm")
    dead, alive = (f"talksplat-{pid}-8001-x" for pid in (launcher.pid, os.getpid()))
    for name in (dead, alive):
        (tmp_path / name / "backends").mkdir(parents=True)
        (tmp_path / "shm").mkdir(exist_ok=True)
        (tmp_path / "shm" / name).touch()
    server_module._remove_abandoned()
    assert {each.name for each in tmp_path.iterdir()} == {alive, "shm"}
    assert [each.name for each in (tmp_path / "shm").iterdir()] == [alive]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ('I1122 13:15:45.288123 99 server.cc:31] "Started"\n', "13:15:45.288 INFO Started"),
        ("E1122 13:15:45.288123 99 model.cc:7] failed to load\n", "13:15:45.288 ERROR failed to load"),
        ('W1122 13:15:45.288123 99 pinned.cc:1] "Unable to allocate pinned memory: CUDA"\n', None),
        (r"E1122 13:15:45.288123 99 model.cc:7] no luck\n\nAt:\n  /some/model.py(3): f", "13:15:45.288 ERROR no luck"),
        ("| server_id | triton |\n", None),
        ("I1122 13:15:45.288123 99 tritonserver.cc:2598]\n", None),
        ("Signal (15) received.\n", "Signal (15) received."),
        ("\n", None),
    ],
)
def test_the_log_is_readable(raw: str, expected: str | None) -> None:
    assert readable(raw) == expected


class Scripted:
    """A server whose starts and looks go as written."""

    def __init__(self, *starts: ServerError | None) -> None:
        self.starts = list(starts)
        self.stops = 0
        self.restarts = 0

    def start(self) -> None:
        if not self.starts:
            raise KeyboardInterrupt
        if (error := self.starts.pop(0)) is not None:
            raise error

    def dead_processes(self) -> str:
        return "a stub ended"

    def kill(self) -> None:
        pass

    def stop(self) -> None:
        self.stops += 1


def test_repeated_failures_are_tried_again_at_growing_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[float] = []
    monkeypatch.setattr("threading.Event.wait", lambda _, seconds: delays.append(seconds))
    said: list[str] = []
    server = Scripted(None, None, None, StartError("no luck"), None)
    with pytest.raises(KeyboardInterrupt):
        Supervisor(server, said.append).run(lambda: None)  # type: ignore[arg-type]
    assert [seconds for seconds in delays if seconds != LOOK_SECONDS] == [0, 0, 1, 2, 4]
    assert "The server stopped serving: a stub ended." in said
    assert "no luck" in said
    assert server.stops == 1
    assert server.restarts == 5


def test_a_first_start_that_fails_is_not_tried_again() -> None:
    server = Scripted(MissingModelsError("run `make models`"), None)
    with pytest.raises(MissingModelsError):
        Supervisor(server, print).run(lambda: None)  # type: ignore[arg-type]
    assert server.stops == 1
