"""Where the server finds its Triton, and what it asks of it: the wheel is real, NVIDIA's container a stand-in."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from talksplat import server as server_module
from talksplat.server import (
    ROOT,
    STUB,
    MissingModelsError,
    MissingTritonError,
    Ports,
    Server,
    StartError,
    Trace,
    UnsupportedPythonError,
    readable,
)

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
# every option of tritonserver 2.62.0, which NVIDIA's container 25.10 has: src/command_line_parser.cc at the tag v2.62.0
OPTIONS_OF_THE_CONTAINER = frozenset((Path(__file__).parent / "tritonserver-2.62.0.txt").read_text().split())


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for /opt/tritonserver: its folders, and a server that only writes down how it was started."""
    root = tmp_path / "container"
    for name in ("onnxruntime", "tensorrt", "python"):
        (root / "backends" / name).mkdir(parents=True)
        (root / "backends" / name / f"libtriton_{name}.so").touch()
    (root / "backends" / "python" / STUB).write_bytes(f"\x7fELF...libpython{HERE}.so.1.0\0".encode())
    (root / "caches" / "local").mkdir(parents=True)
    (root / "bin").mkdir()
    server = root / "bin" / "tritonserver"
    server.write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys\n"
        "(folder,) = (each.split('=')[1] for each in sys.argv if each.startswith('--backend-directory='))\n"
        "backends = {name: os.path.realpath(os.path.join(folder, name)) for name in os.listdir(folder)}\n"
        "said = {'arguments': sys.argv[1:], 'backends': backends, 'environment': dict(os.environ)}\n"
        f"open({str(tmp_path / 'said.json')!r}, 'w').write(json.dumps(said))\n"
        "print('a stand-in serves nobody')\n"
        "sys.exit(3)\n"
    )
    server.chmod(0o755)
    monkeypatch.setattr(server_module, "CONTAINER", root)
    return root


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    (folder / "own" / "1").mkdir(parents=True)
    (folder / "own" / "config.pbtxt").write_text('backend: "python"\n')
    return folder


def said(server: Server, tmp_path: Path) -> dict[str, object]:
    with pytest.raises(StartError, match="ended with 3"):
        server.start()
    found: dict[str, object] = json.loads((tmp_path / "said.json").read_text())
    return found


def options(arguments: object) -> set[str]:
    assert isinstance(arguments, list)
    return {each.removeprefix("--").split("=")[0] for each in arguments}


def test_in_the_container_its_own_server_backends_and_caches_are_used(
    container: Path, repository: Path, tmp_path: Path
) -> None:
    started = said(Server(repository, tmp_path, ports=Ports.free()), tmp_path)
    assert started["backends"] == {
        name: str(container / "backends" / name) for name in ("onnxruntime", "tensorrt", "python")
    }
    assert f"--cache-directory={container / 'caches'}" in str(started["arguments"])


def test_a_container_without_onnx_runtime_gets_ours(container: Path, repository: Path, tmp_path: Path) -> None:
    (container / "backends" / "onnxruntime" / "libtriton_onnxruntime.so").unlink()
    (container / "backends" / "onnxruntime").rmdir()
    backends = said(Server(repository, tmp_path, ports=Ports.free()), tmp_path)["backends"]
    assert isinstance(backends, dict)
    assert backends["onnxruntime"] == str(ROOT / "backends" / "onnxruntime")


def test_stubs_run_in_this_environment(container: Path, repository: Path, tmp_path: Path) -> None:
    environment = said(Server(repository, tmp_path, ports=Ports.free()), tmp_path)["environment"]
    assert isinstance(environment, dict)
    assert environment["PATH"].startswith(str(Path(sys.executable).parent))
    assert "nvidia_pytriton.libs" not in environment["LD_LIBRARY_PATH"]


def test_another_server_that_takes_the_ports_meanwhile_does_not_pass_for_this_one(
    container: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_is_ready", lambda port: True)  # says the other one
    said(Server(repository, tmp_path, ports=Ports.free()), tmp_path)


def test_the_container_knows_every_option(container: Path, repository: Path, tmp_path: Path) -> None:
    server = Server(
        repository, tmp_path, trace=Trace("http://127.0.0.1:4318/v1/traces"), shared_memory=True, ports=Ports.free()
    )
    asked = options(said(server, tmp_path)["arguments"])
    assert {"model-repository", "trace-config", "grpc-restricted-protocol"} <= asked
    assert asked <= OPTIONS_OF_THE_CONTAINER


def test_the_wheel_knows_every_option(repository: Path, tmp_path: Path) -> None:
    installation = server_module._Installation.find()
    help_text = subprocess.run(
        [installation.server, "--help"],
        env=server_module._environment(installation),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ).stdout
    server = Server(repository, tmp_path, trace=Trace("http://127.0.0.1:4318/v1/traces"))
    for option in options(server._command(installation, tmp_path)[1:]):
        assert re.search(rf"--{option}\s", help_text), option


def test_a_stub_of_another_python_is_named(container: Path, repository: Path, tmp_path: Path) -> None:
    (container / "backends" / "python" / STUB).write_bytes(b"\x7fELF...libpython3.99.so.1.0\0")
    with pytest.raises(UnsupportedPythonError, match=rf"is for Python 3\.99, and this is {HERE}"):
        Server(repository, tmp_path, ports=Ports.free()).start()


@pytest.mark.parametrize("part", ["bin/tritonserver", f"backends/python/{STUB}"])
def test_a_missing_part_is_named(container: Path, repository: Path, tmp_path: Path, part: str) -> None:
    (container / part).unlink()
    with pytest.raises(MissingTritonError, match=part):
        Server(repository, tmp_path, ports=Ports.free()).start()


@pytest.mark.parametrize(
    ("config", "file"),
    [
        ('backend: "onnxruntime"', "model.onnx"),
        ('backend: "tensorrt"', "model.plan"),
        ('platform: "tensorrt_plan"', "model.plan"),
        ('backend: "tensorrt" default_model_filename: "other.plan"', "other.plan"),
    ],
)
def test_each_model_has_its_file(repository: Path, config: str, file: str) -> None:
    (repository / "net" / "1").mkdir(parents=True)
    (repository / "net" / "config.pbtxt").write_text(config)
    with pytest.raises(MissingModelsError, match="lacks the model file of net"):
        server_module._require_models(repository)
    (repository / "net" / "1" / file).touch()
    server_module._require_models(repository)


def test_what_a_gpu_says_is_kept_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = 'W1122 13:15:45.288123 99 pinned.cc:1] "no pinned memory: CUDA driver version is insufficient"\n'
    monkeypatch.setattr(server_module, "_GPU", tmp_path / "nvidiactl")
    assert readable(line) is None
    (tmp_path / "nvidiactl").touch()
    assert "insufficient" in str(readable(line))


def test_the_log_can_go_to_standard_output(
    container: Path, repository: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As a container's engine wants it, which keeps it and limits it."""
    server = Server(repository, tmp_path, ports=Ports.free(), run_dir=tmp_path / "run", log_to_stdout=True)
    said(server, tmp_path)
    assert "a stand-in serves nobody" in capfd.readouterr().out
    assert not (tmp_path / "run" / "triton.log").exists()
