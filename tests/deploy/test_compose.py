"""docker-compose.yml and the images: against the specification, linters, and what they repeat of the project.

No engine runs here. Docker's own `docker compose config` is asked where it is installed; test_image.py runs the steps
of the CPU's image outside Docker.
"""

import argparse
import copy
import functools
import http.server
import importlib.util
import json
import os
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import jsonschema
import pytest
import yaml
from compose import FILE, Document, UnsetError, load
from dockerfile import Dockerfile

from talksplat import cli, edge
from talksplat.server import CANARY_FILE, ROOT, Ports
from talksplat.tenants import Tenants

DOCKER = ROOT / "deploy" / "docker"
SCRIPTS = sorted(DOCKER.glob("*.sh"))
BIN = Path(sys.executable).parent  # hadolint and shellcheck come in wheels
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWN = "talksplat-server"

Service: TypeAlias = dict[str, Any]


DOCUMENT = load({"TALKSPLAT_SECRETS": "/secrets"})
SERVICES: dict[str, Service] = DOCUMENT["services"]
LASTING = sorted(set(SERVICES) - {"plans"})
PROFILES = ("cpu", "gpu")


def of_profile(profile: str) -> dict[str, Service]:
    return {name: service for name, service in SERVICES.items() if profile in service["profiles"]}


def is_ours(service: Service) -> bool:
    return str(service["image"]).startswith("talksplat:")


def folders(service: Service) -> set[str]:
    """Where something is mounted."""
    volumes = [each["target"] if isinstance(each, dict) else each.split(":")[1] for each in service.get("volumes", [])]
    return {*volumes, *(each.split(":")[0] for each in service.get("tmpfs", []))}


@pytest.fixture(scope="module")
def schema() -> Document:
    """The compose specification's, out of a package that carries it."""
    spec = importlib.util.find_spec("check_jsonschema")
    if spec is None or spec.origin is None:
        pytest.skip("check-jsonschema, which carries the schema, is not installed: make .venv/.dev")
    path = Path(spec.origin).parent / "builtin_schemas" / "vendor" / "compose-spec.json"
    found: Document = json.loads(path.read_text())
    return found


def test_the_specification_takes_the_file(schema: Document) -> None:
    jsonschema.validate(DOCUMENT, schema)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda services: services["edge"].update(port=["8443:8443"]),
        lambda services: services["edge"].update(cap_drop="ALL"),
        lambda services: services["triton-gpu"]["depends_on"]["plans"].update(condition="finished"),
        lambda services: services["triton-gpu"]["deploy"]["resources"]["limits"].update(memory=[]),
    ],
)
def test_a_wrong_file_would_be_found(spoil: Callable[[Document], None], schema: Document) -> None:
    wrong = copy.deepcopy(DOCUMENT)
    spoil(wrong["services"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


def compose_command() -> list[str]:
    """Docker's own Compose, which needs no engine to read a file."""
    for command in (["docker-compose"], ["docker", "compose"]):
        if shutil.which(command[0]) and subprocess.run([*command, "version"], capture_output=True).returncode == 0:
            return command
    pytest.skip("Docker's Compose is not installed")


@pytest.mark.parametrize("profile", PROFILES)
def test_docker_compose_reads_it_as_meant(profile: str) -> None:
    command = [*compose_command(), "-f", str(FILE), "--profile", profile, "config", "--format", "json"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "TALKSPLAT_SECRETS": "/secrets"}, check=True
    )
    read = json.loads(done.stdout)["services"]
    assert set(read) == set(of_profile(profile))
    for name, service in read.items():
        assert service["read_only"]
        assert service.get("command") == SERVICES[name].get("command")
    without = {name: value for name, value in os.environ.items() if name != "TALKSPLAT_SECRETS"}
    done = subprocess.run(command, capture_output=True, text=True, env=without)
    assert done.returncode != 0
    assert "names the folder of secrets" in done.stderr


def test_what_has_to_be_set_is_named_and_the_rest_has_a_default() -> None:
    with pytest.raises(UnsetError, match=r"TALKSPLAT_SECRETS names the folder of secrets, see deploy/README\.md"):
        load({})
    assert load({"TALKSPLAT_SECRETS": "/secrets"})
    names = set(re.findall(r"\$\{(\w+)", FILE.read_text()))
    readme = (ROOT / "deploy" / "README.md").read_text()
    assert {name for name in names if f"`{name}`" not in readme} == set()


@pytest.mark.parametrize("profile", PROFILES)
def test_each_profile_is_whole(profile: str) -> None:
    services = of_profile(profile)
    assert {"edge", "prometheus", "grafana", f"triton-{profile}"} <= set(services)
    assert len([name for name in services if name.startswith("triton")]) == 1
    for service in services.values():
        assert set(service.get("depends_on", {})) <= set(services)
        mode = service.get("network_mode", "none").removeprefix("service:")
        assert mode in ("none", *services)
        assert ("network_mode" in service) != ("networks" in service)
        assert set(service.get("networks", {})) <= set(DOCUMENT["networks"])
        assert set(service.get("secrets", [])) <= set(DOCUMENT["secrets"])
        for volume in service.get("volumes", []):
            if isinstance(volume, dict) and volume["type"] == "bind":
                continue
            source = volume["source"] if isinstance(volume, dict) else volume.split(":")[0]
            assert source.startswith("./") or source in DOCUMENT["volumes"]


def test_plans_come_before_the_server_that_runs_them() -> None:
    plans, server = SERVICES["plans"], SERVICES["triton-gpu"]
    assert server["depends_on"] == {"plans": {"condition": "service_completed_successfully"}}
    assert plans["restart"] == "no"
    assert plans["image"] == server["image"]  # a plan is for one version of TensorRT and one GPU
    assert plans["deploy"]["resources"]["reservations"] == server["deploy"]["resources"]["reservations"]
    repository = cli._parser().parse_args(server["command"]).repository
    assert plans["command"][1] == str(repository)
    (written,) = (each for each in plans["volumes"] if each.endswith(":/models"))
    (read,) = (each for each in server["volumes"] if each["type"] == "volume")
    assert written == f"{read['source']}:{read['target']}"
    assert read["read_only"]
    assert all(Path(path).is_relative_to(read["target"]) and path != read["target"] for path in plans["command"])


@pytest.mark.parametrize("name", ["triton-cpu", "triton-gpu", "edge"])
def test_our_commands_are_the_ones_that_there_are(name: str) -> None:
    service = SERVICES[name]
    arguments = cli._parser().parse_args(service["command"])
    mounted = folders(service)
    assert str(arguments.run_dir) in mounted
    files = [arguments.tenants, *(getattr(arguments, each, None) for each in ("certificate", "certificate_key"))]
    assert {str(file) for file in files if file} == {f"/run/secrets/{each}" for each in service["secrets"]}
    if name != "edge":
        assert str(arguments.avatars) in mounted
        assert arguments.host != "127.0.0.1"
        assert arguments.log_to_stdout  # what the engine limits


def test_plans_are_built_by_commands_that_there_are() -> None:
    plans, repository = SERVICES["plans"]["command"]
    parsed = []
    for line in (DOCKER / "plans.sh").read_text().splitlines():
        if line.startswith("talksplat-export "):
            words = [{"$1": plans, "$2": repository}.get(word, word) for word in shlex.split(line)[1:]]
            parser = argparse.ArgumentParser()
            importlib.import_module(f"talksplat_export.{words[0]}").add_parser(parser.add_subparsers())
            parsed.append(parser.parse_args(words))
    build, derive = parsed
    assert str(build.plans) == str(derive.plans) == plans
    assert (derive.target, str(derive.output)) == ("tensorrt", repository)
    (export,) = (each.rest for each in Dockerfile(DOCKER / "Dockerfile").stages["models"].instructions[-1:])
    assert build.precision in export.split()  # a plan's ONNX file is in the image


def test_options_that_there_are_not_would_be_found() -> None:
    with pytest.raises(SystemExit):
        cli._parser().parse_args([*SERVICES["edge"]["command"], "--no-such-option"])


def test_every_file_that_is_mounted_is_there() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume["source"] if isinstance(volume, dict) else volume.split(":")[0]
            assert not source.startswith("./") or (ROOT / source).exists(), source
    assert (ROOT / "deploy/docker/targets").is_dir()


@pytest.mark.parametrize("name", SERVICES)
def test_containers_may_as_little_as_possible(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["user"].split(":")[0]) > 0
    assert "privileged" not in service
    assert "cap_add" not in service
    limits = service["deploy"]["resources"]["limits"]
    assert limits["memory"]
    assert limits["pids"]
    assert set(service["logging"]["options"]) == {"max-size", "max-file"}
    for each in service.get("tmpfs", []):
        assert "size=" in each
    for volume in service.get("volumes", []):
        kept = (volume["target"], volume["read_only"]) if isinstance(volume, dict) else (volume, volume.endswith(":ro"))
        assert kept[1] or kept[0] in ("models:/models", "metrics:/prometheus")


@pytest.mark.parametrize("name", LASTING)
def test_what_lasts_is_started_again_and_says_how_it_is(name: str) -> None:
    assert SERVICES[name]["restart"] == "unless-stopped"
    assert SERVICES[name]["init"]
    assert SERVICES[name]["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")


def test_the_wheels_backend_may_run_from_where_it_is_put_together() -> None:
    """Docker mounts a tmpfs without the right to execute, and the wheel's stub is copied into one."""
    (temporary,) = (each for each in SERVICES["triton-cpu"]["tmpfs"] if each.startswith("/tmp:"))
    assert "exec" in temporary.split(":")[1].split(",")


def test_the_user_is_the_images() -> None:
    dockerfile = Dockerfile(DOCKER / "Dockerfile")
    for name in ("cpu", "gpu"):
        words = {each.word: each.rest for each in dockerfile.stages[name].instructions}
        assert words["USER"] == SERVICES[f"triton-{name}"]["user"]
        assert json.loads(words["ENTRYPOINT"]) == [OWN]
        cli._parser().parse_args(json.loads(words["CMD"]))


# ---- who reaches whom


def targets(name: str) -> list[str]:
    listed = yaml.safe_load((DOCKER / "targets" / f"{name}.yml").read_text())
    return [target for each in listed for target in each["targets"]]


def test_prometheus_asks_the_servers_and_the_edge() -> None:
    ports = Ports()
    for profile in PROFILES:
        (alias,) = SERVICES[f"triton-{profile}"]["networks"]["inside"]["aliases"]
        assert targets("talksplat") == [f"{alias}:{ports.metrics}"]
        assert cli._parser().parse_args(SERVICES["edge"]["command"]).replicas == alias
    assert "inside" in SERVICES["edge"]["networks"]
    assert SERVICES["prometheus"]["network_mode"] == "service:edge"
    assert targets("edge") == [f"127.0.0.1:{edge.PORT}"]  # the edge tells nobody else
    assert "allow 127.0.0.1;" in (ROOT / "deploy" / "nginx" / "nginx.conf.template").read_text()
    scraped = (ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text()
    asked = set(re.findall(r"files: \[targets/(\w+)\.yml\]", scraped))
    assert asked == {path.stem for path in (DOCKER / "targets").glob("*.yml")}
    mounted = {each.split(":")[1] for each in SERVICES["prometheus"]["volumes"]}
    (config,) = (each.split("=")[1] for each in SERVICES["prometheus"]["command"] if "config.file" in each)
    assert {config, str(Path(config).parent / "targets"), str(Path(config).parent / "rules.yml")} <= mounted


def test_grafana_finds_prometheus_and_its_dashboards() -> None:
    environment = SERVICES["grafana"]["environment"]
    address = urlsplit(environment["TALKSPLAT_PROMETHEUS"])
    assert address.hostname == SERVICES["prometheus"]["network_mode"].removeprefix("service:")
    assert set(SERVICES["edge"]["networks"]) & set(SERVICES["grafana"]["networks"])
    assert f"127.0.0.1:{address.port}" in SERVICES["prometheus"]["healthcheck"]["test"][-1]
    mounted = {each.split(":")[1] for each in SERVICES["grafana"]["volumes"]}
    assert mounted == {environment["TALKSPLAT_DASHBOARDS"], "/etc/grafana/provisioning"}
    provisioned = "".join(path.read_text() for path in (ROOT / "deploy/grafana/provisioning").rglob("*.yml"))
    assert set(re.findall(r"\$(TALKSPLAT_\w+)", provisioned)) <= set(environment)


def test_only_the_edge_is_open_to_all() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"edge", "grafana"}
    everybody = [port for ports in published.values() for port in ports if not port.startswith("127.0.0.1:")]
    assert everybody == [f"{edge.PORT}:{edge.PORT}"]
    assert DOCUMENT["networks"]["inside"] == {"internal": True}
    for name, service in SERVICES.items():
        if name.startswith("triton"):
            assert set(service["networks"]) == {"inside"}


# ---- health


@pytest.mark.parametrize("name", ["triton-cpu", "triton-gpu"])
def test_health_is_a_fresh_canary(name: str, tmp_path: Path) -> None:
    service = SERVICES[name]
    kind, command = service["healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    folder = str(cli._parser().parse_args(service["command"]).run_dir)
    assert f"{folder}/{CANARY_FILE}" in command

    def passes() -> bool:
        return subprocess.run(["sh", "-c", command.replace(folder, str(tmp_path))], capture_output=True).returncode == 0

    assert not passes()
    file = tmp_path / CANARY_FILE
    file.touch()
    assert passes()
    then = file.stat().st_atime - 60
    os.utime(file, (then, then))
    assert not passes()


def test_health_of_the_edge_is_what_it_says(tmp_path: Path) -> None:
    """Asked of a stand-in for nginx; tests/edge ask the real one for the same page."""
    status = 200

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    edge.make_certificate(tmp_path / "certificate", tmp_path / "key", "localhost")
    server = http.server.HTTPServer(("127.0.0.1", 0), Page)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kind, program, *rest = SERVICES["edge"]["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "python")
    command = [sys.executable, *(each.replace(f":{edge.PORT}", f":{server.server_port}") for each in rest)]
    try:
        assert subprocess.run(command, capture_output=True).returncode == 0
        status = 503
        assert subprocess.run(command, capture_output=True).returncode != 0
    finally:
        server.shutdown()
        server.server_close()


# ---- secrets


def test_no_secret_is_written_down() -> None:
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if re.search("KEY|SECRET|TOKEN|PASSWORD", name):
                assert name.endswith("__FILE")
                assert value.startswith("/run/secrets/")
    for secret in DOCUMENT["secrets"].values():
        assert set(secret) == {"file"}
        assert secret["file"].startswith("/secrets/")  # outside the repository: see TALKSPLAT_SECRETS
    for path in (FILE, DOCKER / "Dockerfile", *SCRIPTS):
        assert not looks_secret(path.read_text()), path


def looks_secret(text: str) -> bool:
    """A literal that may be a key: long hexadecimal or base64 with digits in it, PEM, or a password that is given."""
    pattern = r"-----BEGIN|\b[0-9a-f]{32,}\b|(?i:password|token|api_?key)\s*[=:]\s*[\"']?[\w-]{6,}"
    return re.search(pattern, text) is not None


@pytest.mark.parametrize(
    "text", ["PASSWORD=hunter22", "token: 'abcdefgh'", "a" * 8 + "0" * 24, "-----BEGIN PRIVATE KEY"]
)
def test_a_secret_would_be_found(text: str) -> None:
    assert looks_secret(f"environment:\n  {text}\n")


def test_a_first_folder_of_secrets_is_what_the_services_want(tmp_path: Path) -> None:
    def make() -> str:
        return subprocess.run(
            [DOCKER / "secrets.sh", tmp_path / "secrets", "talksplat.example"],
            env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    said = make()
    made = {path.name: path for path in (tmp_path / "secrets").iterdir()}
    assert set(made) == set(DOCUMENT["secrets"])
    assert all(path.stat().st_mode & 0o077 == 0 for path in made.values())
    Tenants.read(made["tenants.toml"])
    before = {name: path.read_bytes() for name, path in made.items()}
    assert not any(content.strip() in said.encode() for content in before.values())
    make()
    assert {name: path.read_bytes() for name, path in made.items()} == before
    shown = subprocess.run(
        ["openssl", "x509", "-noout", "-ext", "subjectAltName", "-in", made["certificate.pem"]],
        capture_output=True,
        text=True,
    ).stdout
    assert "DNS:talksplat.example" in shown


# ---- images


def lint(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BIN / program, *arguments], capture_output=True, text=True)


def test_hadolint_finds_nothing_wrong() -> None:
    done = lint("hadolint", DOCKER / "Dockerfile")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("sound", "spoilt", "rule"),
    [
        ("COPY constraints.txt", "ADD constraints.txt", "DL3020"),
        ("-slim-bookworm AS cpu\n", ":latest AS cpu\n", "DL3007"),
        ("# hadolint ignore=DL3008  # of one Ubuntu release: its fixes are wanted\n", "", "DL3008"),
    ],
)
def test_hadolint_would_find_it(sound: str, spoilt: str, rule: str, tmp_path: Path) -> None:
    text = (DOCKER / "Dockerfile").read_text()
    assert sound in text
    wrong = text.replace(sound, spoilt).replace("python:${PYTHON_VERSION}:latest", "python:latest")
    (tmp_path / "Dockerfile").write_text(wrong)
    assert rule in lint("hadolint", tmp_path / "Dockerfile").stdout


def test_shellcheck_finds_nothing_wrong(tmp_path: Path) -> None:
    done = lint("shellcheck", *SCRIPTS)
    assert done.returncode == 0, done.stdout
    for path in SCRIPTS:
        assert os.access(path, os.X_OK)
        assert "\nset -eu\n" in path.read_text()
    (tmp_path / "wrong.sh").write_text("#!/bin/sh\nrm -rf $1/*\n")
    assert "SC2086" in lint("shellcheck", tmp_path / "wrong.sh").stdout


def test_images_are_pinned_and_ours_have_the_projects_version() -> None:
    dockerfile = Dockerfile(DOCKER / "Dockerfile")
    for service in SERVICES.values():
        _, _, tag = service["image"].partition(":")
        assert re.search(r"\d+\.\d+\.\d+", tag), service["image"]
        if is_ours(service):
            target = service["build"]["target"]
            assert tag == f"{PROJECT['version']}-{target}"
            assert target in dockerfile.stages
            assert (ROOT / service["build"]["dockerfile"]).samefile(dockerfile.path)
        else:
            assert "build" not in service
    for stage in dockerfile.stages.values():
        base = dockerfile.expand(stage.base, dockerfile.defaults)
        assert base in dockerfile.stages or re.search(r":\d+\.\d+", base)


def test_versions_are_those_of_the_one_place() -> None:
    """Which is the Dockerfile's head."""
    dockerfile = Dockerfile(DOCKER / "Dockerfile")
    head = dockerfile.path.read_text().partition("\nARG ")[0]
    stated = dict(re.findall(r"(Triton|TensorRT|ONNX Runtime|CUDA|Python) (\d+(?:\.\d+)+)", head.replace("\n# ", " ")))
    assert dockerfile.defaults["TRITON_RELEASE"] == re.findall(r"NVIDIA's Triton (\d+\.\d+)", head)[0]
    triton = re.findall(r"is Triton (\d+\.\d+\.\d+)", head)[0]
    assert (ROOT / "tests" / "server" / f"tritonserver-{triton}.txt").exists()  # its options, which ours are among
    assert tuple(map(int, stated["TensorRT"].split("."))) >= (10, 8)  # strongly typed networks
    assert dockerfile.defaults["CUDA_VERSION"].startswith(stated["CUDA"].rpartition(".")[0])
    assert dockerfile.defaults["PYTHON_VERSION"].startswith(f"{stated['Python']}.")
    assert stated["Python"] in ("3.11", "3.12")
    assert PROJECT["requires-python"] == ">=3.11,<3.13"
    constraints = (ROOT / "constraints.txt").read_text()
    pinned = re.findall(r"^tensorrt-cu13-bindings==(\S+)", constraints, re.M)
    assert set(pinned) <= {stated["TensorRT"]}
    for path in (FILE, *SCRIPTS):
        assert not re.search(r"\b25\.10\b|10\.13\.\d", path.read_text()), path


def test_what_images_copy_is_there_and_not_ignored() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = {source for source, _ in context_copies()}
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(Path(source) == Path(each) or Path(each) in Path(source).parents for each in kept), source
    for each in kept:
        assert any(Path(source) == Path(each) or Path(each) in Path(source).parents for source in copied), each


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("cpu", {"deploy/nginx", "client/web", "client/talksplat_client/conversation.json"}),
        ("gpu", {"avatars/ava", "demo/speech.wav"}),
    ],
)
def test_images_have_what_the_code_looks_for_beside_it(name: str, more: set[str]) -> None:
    """The edge renders its configuration and serves the page; plans are checked on the recording and the avatar."""
    copied = {
        word.removeprefix("/opt/talksplat/")
        for each in Dockerfile(DOCKER / "Dockerfile").stages[name].instructions
        if each.word == "COPY"
        for word in each.rest.split()
    }
    assert {"model_repository", "backends", *more} <= copied


def context_copies() -> Iterator[tuple[str, str]]:
    for stage in Dockerfile(DOCKER / "Dockerfile").stages.values():
        for each in stage.instructions:
            if each.word == "COPY" and not each.rest.startswith("--from"):
                *sources, target = each.rest.split()
                yield from ((source, target) for source in sources)


def test_scripts_are_copied_before_they_run() -> None:
    dockerfile = Dockerfile(DOCKER / "Dockerfile")
    for stage in dockerfile.stages.values():
        copied: set[str] = set()
        base: str | None = stage.base
        while base in dockerfile.stages:
            copied |= {word for each in dockerfile.stages[base].instructions for word in each.rest.split()}
            base = dockerfile.stages[base].base
        for each in stage.instructions:
            if each.word == "COPY":
                copied |= set(each.rest.split())
            if each.word == "RUN":
                assert set(re.findall(r"deploy/docker/\w+\.\w+", each.rest)) <= copied


# ---- the scripts, on what is installed here: what they would install, and nothing more


@functools.cache
def dry(*command: str) -> str:
    """A script, with pip told to install nothing and to ask no index: it fails where something is missing here."""
    told = {"PIP_DRY_RUN": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    script, *arguments = command
    done = subprocess.run(
        [DOCKER / script, *arguments], cwd=ROOT, env={**os.environ, **told}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_environments_are_what_the_projects_ask_for() -> None:
    said = dry("environment.sh", str(BIN.parent), ".", "./export")
    assert "Would install" not in said  # it is the environment that runs this test
    for name in ("nvidia-pytriton", "onnxruntime", "torch"):
        assert f"Requirement already satisfied: {name}" in said


def test_the_gpus_image_has_no_second_triton() -> None:
    (run,) = (
        each.rest
        for each in Dockerfile(DOCKER / "Dockerfile").stages["gpu-build"].instructions
        if "environment.sh" in each.rest and each.word == "RUN"
    )
    arguments = run.split("environment.sh .venv ")[1].replace("'", "").split()
    listed = subprocess.run(
        [sys.executable, DOCKER / "requirements.py", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "nvidia-pytriton;" not in " ".join(listed)
    assert {"torch", "gsplat", "onnxruntime", "numpy<2"} <= set(listed)


def test_the_project_is_installed_with_its_rasterizer() -> None:
    said = dry("project.sh", str(BIN.parent), ".", "./export")
    assert f"Would install talksplat-{PROJECT['version']}" in said
    assert f"Would install talksplat-export-{PROJECT['version']}" in said


def test_weights_are_those_of_the_makefile() -> None:
    def packages(text: str) -> set[str]:
        (line,) = re.findall(r"--no-deps (?:-c \S+ )?(silero-vad .*)", text)
        return set(line.split())

    assert packages((DOCKER / "weights.sh").read_text()) == packages((ROOT / "Makefile").read_text())
