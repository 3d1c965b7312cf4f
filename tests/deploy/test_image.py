"""The CPU's image without Docker: the Dockerfile's own steps, then services confined as docker-compose.yml says.

A stand-in for an engine. A stage is a folder that is mounted at the image's place, over this machine's own Debian, in
a mount namespace of its own; so base images and what `apt-get` adds to them are this machine's, and all services share
one network. It takes minutes, packages from an index, and root: `make image-check`.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from compose import load
from dockerfile import Dockerfile

from talksplat.server import ROOT
from talksplat_export import registry

pytestmark = [
    pytest.mark.skipif("IMAGE_CHECK" not in os.environ, reason="minutes, as root: make image-check"),
    pytest.mark.timeout(1800),
]
PLACE = "/opt/talksplat"
PYTHON = os.environ.get("PYTHON") or str(Path(sys._base_executable).resolve())  # type: ignore[attr-defined]

# A root of its own over this machine's, with mounts by the lines of MOUNTS; then the command, as USER if there is one.
ENTER = r"""
set -eu
mount --make-rprivate /
mount -t tmpfs none "$WORK"
mkdir "$WORK/upper" "$WORK/work" "$WORK/root"
mount -t overlay -o "lowerdir=/,upperdir=$WORK/upper,workdir=$WORK/work" none "$WORK/root"
cd "$WORK/root"
chmod o+x root  # an interpreter may lie there
echo "127.0.0.1 localhost triton edge" > etc/hosts
mount --rbind /dev dev
mount -t proc none proc
mount -t tmpfs none dev/shm
eval "$MOUNTS"
[ -z "${READ_ONLY:-}" ] || mount -o remount,ro .
[ -z "${USER_ID:-}" ] || as="setpriv --reuid $USER_ID --regid $USER_ID --clear-groups
  --bounding-set=-all --inh-caps=-all --no-new-privs"
exec chroot . ${as:-} sh -c 'cd "$1" && shift && exec env -i "$@"' sh "$PLACE" "$@"
"""


def enter(work: Path, command: list[str], environment: dict[str, str], **told: str) -> tuple[list[str], dict[str, str]]:
    """A command line, and its environment, that runs another one in a root of its own."""
    work.mkdir(parents=True, exist_ok=True)
    variables = [f"{name}={value}" for name, value in environment.items()]
    line = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", ENTER, "sh", *variables, *command]
    return line, {**os.environ, "WORK": str(work), "PLACE": PLACE, **told}


def bind(source: Path, target: str, *, read_only: bool) -> str:
    place = f'"./{target.lstrip("/")}"'
    make = f"mkdir -p {place}" if source.is_dir() else f'mkdir -p "$(dirname {place})" && touch {place}'
    lines = [make, f'mount --bind "{source}" {place}']
    return "\n".join([*lines, f"mount -o remount,bind,ro {place}"] if read_only else lines)


class Builder:
    """Builds stages into folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dockerfile = Dockerfile(ROOT / "deploy" / "docker" / "Dockerfile")
        self.context = folder / "context"
        self.left_out: list[str] = []
        self._built: dict[str, dict[str, str]] = {}
        ignore = (ROOT / ".dockerignore").read_text().split("\n")
        kept = [Path(line[1:]) for line in ignore if line.startswith("!")]
        dropped = [Path(line) for line in ignore if line and line[0] not in "!#*"]
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for name in listed.splitlines():
            around = [Path(name), *Path(name).parents]
            if set(kept) & set(around) and not set(dropped) & set(around) and (ROOT / name).exists():
                (self.context / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.context / name)

    def build(self, name: str) -> dict[str, str]:
        """Build a stage, and what it stands on; returns the environment that it sets."""
        if name in self._built:
            return self._built[name]
        stage, root = self.dockerfile.stages[name], self.folder / name
        values: dict[str, str] = {}
        if stage.base in self.dockerfile.stages:
            values = dict(self.build(stage.base))
            subprocess.run(["cp", "-a", self.folder / stage.base, root], check=True)
        root.mkdir(exist_ok=True)
        arguments: dict[str, str] = {}
        for each in stage.instructions:
            if each.word == "ARG":
                key, _, default = each.rest.partition("=")
                arguments[key] = os.environ.get(key, default)
            elif each.word == "ENV":
                for key, value in re.findall(r"(\w+)=(\S+)", each.rest):
                    values[key] = self.dockerfile.expand(
                        value, {"PATH": "/usr/local/bin:/usr/bin:/usr/sbin:/bin", **values}
                    )
            elif each.word == "COPY":
                self._copy(root, each.rest)
            elif each.word == "RUN":
                self._run(root, re.sub(r"--mount=\S+\s*", "", each.rest), {**values, **arguments})
        self._built[name] = values
        return values

    def _copy(self, root: Path, text: str) -> None:
        words = text.split()
        source = self.context
        if words[0].startswith("--from="):
            stage = words.pop(0).removeprefix("--from=")
            self.build(stage)
            source = self.folder / stage
        *names, target = (word.removeprefix(PLACE).lstrip("/") for word in words)
        for name in names:
            origin, place = source / name, root / target
            into = place if origin.is_dir() or target[-1:] in ("/", ".", "") or len(names) > 1 else place.parent
            into.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-a", f"{origin}/." if origin.is_dir() else origin, into], check=True)

    def _run(self, root: Path, command: str, values: dict[str, str]) -> None:
        if "apt-get" in command:
            self.left_out.append(command)
            return
        passed = {
            name: value for name, value in os.environ.items() if name.startswith("PIP_") or name in ("PATH", "HOME")
        }
        line, environment = enter(
            self.folder / "work",
            ["sh", "-euc", command],
            {**passed, **values, "PYTHON": PYTHON},
            MOUNTS=bind(root, PLACE, read_only=False),
        )
        print(f"\n$ {command}", flush=True)
        began = time.monotonic()
        subprocess.run(line, env=environment, check=True)
        print(f"  {time.monotonic() - began:.1f} s", flush=True)


class Engine:
    """Runs services of docker-compose.yml; all in one network, in which nothing but they is."""

    def __init__(self, builder: Builder, folder: Path, environment: dict[str, str]) -> None:
        document = load(environment)
        self.services: dict[str, Any] = document["services"]
        self._secrets = {name: Path(each["file"]) for name, each in document["secrets"].items()}
        self._builder = builder
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._net = subprocess.Popen(["unshare", "--net", "sh", "-c", "ip link set lo up && exec sleep infinity"])

    @property
    def _network(self) -> list[str]:
        return ["nsenter", f"--net=/proc/{self._net.pid}/ns/net"]

    def up(self, name: str) -> None:
        service = self.services[name]
        mounts, values, command = [], {"PATH": "/usr/bin:/usr/sbin:/bin"}, [Path(service["image"].split(":")[0]).name]
        if "build" in service:
            stage = service["build"]["target"]
            values = self._builder.build(stage)
            mounts.append(bind(self._builder.folder / stage, PLACE, read_only=True))
            command = ["talksplat-server"]
        user = service["user"].split(":")[0]
        for each in service.get("tmpfs", []):
            target, options = each.split(":")
            options = options if "exec" in options.split(",") else f"noexec,{options}"
            mounts.append(f'mkdir -p ".{target}" && mount -t tmpfs -o "{options}" none ".{target}"')
        for each in service.get("volumes", []):
            source, target, read_only = (
                (each["source"], each["target"], each["read_only"])
                if isinstance(each, dict)
                else (*each.split(":")[:2], each.endswith(":ro"))
            )
            if not source.startswith(("./", "/")):  # a volume: its own, and the image's user's
                volume = self._folder / source
                volume.mkdir(exist_ok=True)
                os.chown(volume, int(user), int(user))
                source = volume
            mounts.append(bind((ROOT / source).resolve(), target, read_only=read_only))
        for secret in service.get("secrets", []):
            mounts.append(bind(self._secrets[secret], f"/run/secrets/{secret}", read_only=True))
        line, environment = enter(
            self._folder / f"work-{name}",
            [*service.get("entrypoint", command), *service["command"]],
            {**values, **service.get("environment", {})},
            MOUNTS="\n".join(mounts),
            READ_ONLY="yes",
            USER_ID=user,
            **({} if "build" in service else {"PLACE": "/"}),
        )
        log = (self._folder / f"{name}.log").open("wb")
        os.fchown(log.fileno(), int(user), int(user))  # as engines do, so that nginx can open its standard output
        self._running[name] = subprocess.Popen(
            [*self._network, *line], env=environment, stdout=log, stderr=subprocess.STDOUT
        )

    def execute(self, name: str, command: list[str]) -> subprocess.CompletedProcess[str]:
        """In a running service."""
        (inner,) = psutil.Process(self._running[name].pid).children()
        values = [f"{key}={value}" for key, value in inner.environ().items()]
        into = ["nsenter", f"--target={inner.pid}", "--mount", "--pid", "--net", "--root", "--wd=/"]
        return subprocess.run([*into, "env", "-i", *values, *command], capture_output=True, text=True)

    def outside(self, command: list[str | Path]) -> subprocess.CompletedProcess[str]:
        """In the network, but in no service."""
        return subprocess.run([*self._network, *command], capture_output=True, text=True)

    def wait_until_healthy(self, name: str, seconds: float) -> None:
        kind, *test = self.services[name]["healthcheck"]["test"]
        deadline = time.monotonic() + seconds
        while self.execute(name, ["sh", "-c", test[0]] if kind == "CMD-SHELL" else test).returncode != 0:
            assert self._running[name].poll() is None, self.log(name)
            assert time.monotonic() < deadline, self.log(name)
            time.sleep(0.5)

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text()

    def stop(self, name: str) -> int:
        process = self._running.pop(name)
        for inner in psutil.Process(process.pid).children():
            inner.terminate()
        return process.wait(float(self.services[name]["stop_grace_period"].removesuffix("s")))

    def close(self) -> None:
        for process in (*self._running.values(), self._net):
            for inner in psutil.Process(process.pid).children():  # who has become another user outlives its parent
                inner.kill()
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def builder() -> Iterator[Builder]:
    with tempfile.TemporaryDirectory(prefix="talksplat-image-") as folder:
        Path(folder).chmod(0o755)
        yield Builder(Path(folder))


@pytest.fixture(scope="module")
def engine(builder: Builder) -> Iterator[Engine]:
    builder.build("cpu")
    folder = builder.folder / "engine"
    secrets = folder / "secrets"
    secrets.mkdir(parents=True)
    os.chown(secrets, 1000, 1000)
    line, environment = enter(
        folder / "work-secrets",
        ["deploy/docker/secrets.sh", "/secrets", "localhost"],
        builder.build("cpu"),
        MOUNTS=f"{bind(builder.folder / 'cpu', PLACE, read_only=True)}\n{bind(secrets, '/secrets', read_only=False)}",
        USER_ID="1000",
    )
    said = subprocess.run(line, env=environment, capture_output=True, text=True, check=True).stdout
    (folder / "key").write_text(re.findall(r"shown this once: (\S+)", said)[0])
    engine = Engine(builder, folder, {"TALKSPLAT_SECRETS": str(secrets)})
    try:
        for name in ("triton-cpu", "edge", "prometheus"):
            engine.up(name)
        yield engine
    finally:
        engine.close()


def test_nothing_but_packages_of_the_system_was_left_out(builder: Builder) -> None:
    builder.build("cpu")
    assert len(builder.left_out) == 2  # the compiler, and nginx with the user


def test_serving_needs_no_torch(builder: Builder) -> None:
    builder.build("cpu")
    packages = {path.name for path in (builder.folder / "cpu" / ".venv").glob("lib/python*/site-packages/*")}
    assert "onnxruntime" in packages
    assert not {"torch", "mediapipe"} & packages
    exported = list((builder.folder / "cpu" / "model_repository").glob("*/1/model.onnx"))
    assert {path.parts[-3] for path in exported} == {graph.name for graph in registry.GRAPHS}


def test_a_client_gets_its_video_through_the_edge(engine: Engine, tmp_path: Path) -> None:
    engine.wait_until_healthy("triton-cpu", 120)
    engine.wait_until_healthy("edge", 30)
    secrets = engine._secrets
    asked: list[str | Path] = [Path(sys.executable).parent / "talksplat", "animate", ROOT / "demo" / "speech.wav"]
    asked += ["--url", "localhost:8443", "--ca", secrets["certificate.pem"], "--avatar", "ava", "--out"]
    refused = engine.outside([*asked, tmp_path / "none.mp4", "--api-key-file", "/etc/hostname"])
    assert refused.returncode != 0
    done = engine.outside([*asked, tmp_path / "ava.mp4", "--api-key-file", engine._folder / "key"])
    assert done.returncode == 0, done.stderr + engine.log("triton-cpu")
    assert (tmp_path / "ava.mp4").stat().st_size > 100_000
    assert "Serving" in engine.log("triton-cpu")
    assert '"model":"animate"' in engine.log("edge")


def test_prometheus_sees_server_and_edge(engine: Engine) -> None:
    """By its own configuration and the targets of the compose file; this machine's Prometheus, not the image's."""
    engine.wait_until_healthy("triton-cpu", 120)
    deadline = time.monotonic() + 30
    query = "http://127.0.0.1:9090/api/v1/query?query=sum(up)"
    while '"2"' not in (found := engine.outside(["wget", "-qO-", query]).stdout):
        assert time.monotonic() < deadline, found + engine.log("prometheus")
        time.sleep(1)


def test_a_confined_server_can_write_nowhere_else(engine: Engine) -> None:
    engine.wait_until_healthy("triton-cpu", 120)
    for place in ("/", PLACE, f"{PLACE}/model_repository", "/avatars", "/run/secrets/tenants.toml"):
        assert engine.execute("triton-cpu", ["sh", "-c", f"> {place}/x || > {place}"]).returncode != 0, place
    status = engine.execute("triton-cpu", ["cat", "/proc/1/status"]).stdout
    assert re.search(r"^Uid:\t1000\t1000", status, re.M)
    assert re.search(r"^CapBnd:\t0+$", status, re.M)
    assert re.search(r"^NoNewPrivs:\t1$", status, re.M)


def test_services_stop_when_they_are_told_to(engine: Engine) -> None:
    for name in ("edge", "triton-cpu"):
        began = time.monotonic()
        assert engine.stop(name) == 0, engine.log(name)
        assert time.monotonic() - began < 15
