"""Every command of docs/ and of the README: run here as it stands, or listed in `NOT_RUN` with the reason and checked.

A page's blocks of ``sh`` are one script, run in a folder that looks like the checkout, against the real server. Its
blocks of ``text`` are what that script prints, with other numbers; those of ``text quoted`` are what sources say, see
test_messages.py. Blocks of ``python`` are programs, run there after the script, whose files they may read (those of the
README are sketches). Those of ``python excerpt`` are lines of one of client/examples.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
import wave
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import compose
import helm
import pytest
from documents import Page
from make_avatar import write_avatar

from talksplat import cli as server_cli
from talksplat import edge
from talksplat.server import HOST, ROOT, Ports, Server
from talksplat_client import cli as client_cli

README = ROOT / "README.md"
PAGES = [*sorted((ROOT / "docs").glob("*.md")), README]
PATIENCE = 100  # seconds, for all of a page
VENV = ".venv/bin/"
GRPC, HTTP, SECURE = "127.0.0.1:8001", "127.0.0.1:8000", "127.0.0.1:8443"  # what the docs call the servers


# --- what is not run ---------------------------------------------------------------------------------------------


def by_make(words: list[str], _: Path) -> None:
    """Make knows the target, and what it would run."""
    made = plan_of_make(*words[1:])
    assert made.returncode == 0, made.stderr


@functools.cache
def plan_of_make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True)


def by_parser(words: list[str], _: Path) -> None:
    """The program's own parser takes the options."""
    program, *arguments = words
    if program == "talksplat-server":
        server_cli._parser().parse_args(arguments)
    elif program == "talksplat":
        client_cli._parser().parse_args(arguments)
    else:
        parser = argparse.ArgumentParser()
        importlib.import_module(f"talksplat_export.{arguments[0]}").add_parser(parser.add_subparsers())
        parser.parse_args(arguments)


@functools.cache
def said(*command: str) -> str:
    """What Python prints."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def by_help(words: list[str], _: Path) -> None:
    """The help of a program of Python names all options."""
    module = words[words.index("-m") + 1]
    options = {word for word in words if word.startswith("--")}
    assert options <= set(re.findall(r"--[\w-]+", said("-m", module, "--help")))


def by_locust(words: list[str], _: Path) -> None:
    """Locust's help names all options, the locustfile's own among them, and it knows the users."""
    known = said("-c", "import loadtests.locustfile, locust.argument_parser as p; p.get_parser().print_help()")
    options = {word for word in words if word.startswith("--")}
    assert options <= set(re.findall(r"--[\w-]+", known))
    users = {word for word in words if word.endswith("User")}
    assert users <= set(re.findall(r"\w+User", (ROOT / "loadtests" / "locustfile.py").read_text()))


def by_helm(words: list[str], folder: Path) -> None:
    """Helm renders the chart with these values."""
    helm.unpack(folder, "helm")
    done = subprocess.run(
        [folder / "helm", "template", *words[2:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "HOME": str(folder)},
    )
    assert done.returncode == 0, done.stderr


def by_kubectl(words: list[str], folder: Path) -> None:
    """Kubectl makes the object, and sends it nowhere."""
    helm.unpack(folder, "kubectl")
    for name in ("tenants.toml", "certificate.pem", "key.pem"):
        (folder / name).write_text("")
    if "tls" in words:
        edge.make_certificate(folder / "certificate.pem", folder / "key.pem", HOST)
    done = subprocess.run(
        [folder / "kubectl", *words[1:], "--dry-run=client", "-o", "yaml"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def by_compose(words: list[str], _: Path) -> None:
    """The profile and the services are docker-compose.yml's."""
    document = compose.load({"TALKSPLAT_SECRETS": "/secrets"})
    parser = argparse.ArgumentParser()
    parser.add_argument("--profile", choices=("cpu", "gpu"))
    commands = parser.add_subparsers(required=True)
    commands.add_parser("up").add_argument("-d", action="store_true")
    run = commands.add_parser("run")
    run.add_argument("--rm", action="store_true")
    run.add_argument("service", choices=document["services"])
    parser.parse_args(words[2:])


def by_pins(words: list[str], _: Path) -> None:
    """The client has the extras; other packages are pinned."""
    project = tomllib.loads((ROOT / "client" / "pyproject.toml").read_text())["project"]
    for wanted in words[words.index("constraints.txt") + 1 :]:
        name, *extras = wanted.rstrip("]").split("[")
        if name == "./client":
            assert set(",".join(extras).split(",")) <= set(project["optional-dependencies"])
        else:
            assert f"\n{wanted}==" in (ROOT / "constraints.txt").read_text()


@dataclass(frozen=True)
class NotRun:
    """Commands that the tests do not run."""

    pattern: str  # that a command begins with
    why: str
    check: Callable[[list[str], Path], None]  # given the words of the command and a folder; raises


NOT_RUN = [
    NotRun(r"make [a-z]", "takes minutes, or serves until stopped: its parts have tests", by_make),
    NotRun(
        r"talksplat-server (up|web|secure|edge)\b", "serves until stopped: the tests' server stands for it", by_parser
    ),
    NotRun(r"talksplat(-server)? doctor", "its exit code is this machine's: tests/client, tests/runtime", by_parser),
    NotRun(r"talksplat-export fit ", "takes 20 minutes: tests/export/test_fit.py", by_parser),
    NotRun(r"talksplat-export quality ", "needs a person's recording: tests/export/test_quality.py", by_parser),
    NotRun(r"talksplat-export (models|aot|tensorrt) ", "takes minutes, or a GPU: tests/export", by_parser),
    NotRun(
        r"talksplat-export derive ", "needs files of the commands before it: tests/export/test_derive.py", by_parser
    ),
    NotRun(r"talksplat-export experiment (?!.*--check)", "takes minutes: tests/export/test_experiment.py", by_parser),
    NotRun(r"talksplat animate .*--c2pa", "needs a signer's certificate: tests/client signs", by_parser),
    NotRun(r"locust |python -m loadtests( |$)", "takes minutes: tests/loadtests/test_locust.py", by_locust),
    NotRun(r"python -m loadtests\.\w+", "takes minutes: tests/loadtests", by_help),
    NotRun(r"docker compose ", "needs Docker's engine: tests/deploy/test_compose.py", by_compose),
    NotRun(r"helm install ", "needs a cluster: tests/deploy/test_chart.py", by_helm),
    NotRun(r"kubectl create ", "needs a cluster", by_kubectl),
    NotRun(r"python -m pip install ", "changes the environment", by_pins),
]


def not_run(command: str) -> NotRun | None:
    """Why a command is not run, if it is not."""
    words = command.removeprefix("exec ").replace(VENV, "")
    words = re.sub(r"^(\w+=\S+ +)+", "", words)  # variables for it alone
    return next((each for each in NOT_RUN if re.match(each.pattern, words)), None)


LEFT_OUT = [
    pytest.param(each, command, id=f"{page.path.stem}-{block.line}-{number}")
    for page in map(Page, PAGES)
    for block in page.of_kind("sh")
    for number, command in enumerate(block.commands)
    if (each := not_run(command)) is not None
]


@pytest.mark.parametrize(("left_out", "command"), LEFT_OUT)
def test_a_command_that_is_not_run_would_be_understood(left_out: NotRun, command: str, tmp_path: Path) -> None:
    words = [word.removeprefix(VENV) for word in shlex.split(command, comments=True)]
    while "=" in words[0]:
        del words[0]
    try:
        left_out.check(words, tmp_path)
    except SystemExit:
        pytest.fail(f"its parser refuses: {command}")


def test_nothing_is_listed_that_is_not_in_the_docs() -> None:
    listed = {id(param.values[0]) for param in LEFT_OUT}
    assert [each.pattern for each in NOT_RUN if id(each) not in listed] == []


@pytest.mark.parametrize(
    "command",
    [
        "make no-such-target",
        "talksplat-server up --no-such-option",
        "talksplat-export fit --no-such-option",
        "docker compose --profile tpu up",
        "python -m pip install -c constraints.txt './client[no-such-extra]'",
    ],
)
def test_a_wrong_command_would_be_found(command: str, tmp_path: Path) -> None:
    left_out = not_run(command)
    assert left_out is not None
    with pytest.raises((AssertionError, SystemExit)):
        left_out.check(shlex.split(command), tmp_path)


# --- what is run -------------------------------------------------------------------------------------------------


class Checkout:
    """A folder that looks like the checkout to the docs' commands, and where what they write stays."""

    def __init__(self, folder: Path, server: Server, secure: edge.Address) -> None:
        self.folder = folder
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("TALKSPLAT")}
        self._addresses = {GRPC: server.grpc_url, HTTP: server.http_url, SECURE: secure.url}
        for path in ROOT.iterdir():
            if path.suffix != ".md" and path.name not in ("runs", "bench", "demo", ".git", ".venv"):
                (folder / path.name).symlink_to(path)
        programs = folder / VENV
        programs.mkdir(parents=True)
        as_default = (
            f"import sys; from talksplat_client import _config; _config.DEFAULT_URL = {server.grpc_url!r}; "
            "from talksplat_client.cli import main; sys.exit(main())"
        )
        for name, command in {
            "python": [sys.executable],
            "talksplat": [sys.executable, "-c", as_default],  # which finds the tests' server where a plain one would be
            "talksplat-server": [sys.executable, "-m", "talksplat.cli"],
            "talksplat-export": [sys.executable, "-m", "talksplat_export.cli"],
        }.items():
            program = programs / name
            program.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
            program.chmod(0o755)

    def run(self, command: Sequence[str | Path], text: str) -> str:
        """What a script prints; fails where it does."""
        for address, real in self._addresses.items():
            text = text.replace(address, real)
        done = subprocess.run(
            [*command, text],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
            env=self._environment,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}"
        return done.stdout


@pytest.fixture(scope="module")
def checkout(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    """With a recording to animate, and as if an avatar `kim` had been fitted and `make serve-secure` ran."""
    folder = tmp_path_factory.mktemp("checkout")
    write_avatar(server.avatars, "kim")
    address = edge.Address(
        folder / "runs" / "secure" / "certificate.pem",
        folder / "runs" / "secure" / "certificate-key.pem",
        port=Ports.free().http,
    )
    address.certificate.parent.mkdir(parents=True)
    made = Checkout(folder, server, address)
    shorten(folder / "demo" / "speech.wav")
    encode(folder / "demo" / "speech.wav", folder / "speech.mp3")
    edge.make_tenants(address.certificate.with_name("tenants.toml"))
    edge.make_certificate(address.certificate, address.certificate_key, HOST)
    try:
        nginx = edge.Edge(address.certificate.with_name("tenants.toml"), [server.ports], address, folder / "edge")
    except edge.MissingNginxError:
        yield made
    else:
        nginx.start()
        nginx.passed(server.ports)
        stopped = threading.Event()

        def look() -> None:
            while not stopped.wait(0.1):
                nginx.look()
                nginx.passed(server.ports)

        thread = threading.Thread(target=look)
        thread.start()
        yield made
        stopped.set()
        thread.join()
        nginx.stop()
    shutil.rmtree(server.avatars / "kim")


def shorten(path: Path) -> None:
    """The first two seconds of the project's speech, where the docs find all of it."""
    path.parent.mkdir()
    with wave.open(str(ROOT / "demo" / "speech.wav")) as whole, wave.open(str(path), "wb") as file:
        file.setparams(whole.getparams())
        file.writeframes(whole.readframes(2 * whole.getframerate()))


def encode(source: Path, path: Path) -> None:
    """The same, as another kind of file."""
    with wave.open(str(source)) as file:
        rate, data = file.getframerate(), file.readframes(file.getnframes())
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mp3", rate=rate, layout="mono")
        frame = av.AudioFrame(format="s16", layout="mono", samples=len(data) // 2)
        frame.planes[0].update(data)
        frame.sample_rate = rate
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)


RUN = [page for page in map(Page, PAGES) if page.of_kind("sh") or page.of_kind("python")]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.path.stem)
def test_the_commands_and_programs_of_a_page_do_what_it_says(page: Page, checkout: Checkout) -> None:
    commands = [each for block in page.of_kind("sh") for each in block.commands if not_run(each) is None]
    if any(SECURE in each for each in commands):
        try:
            edge.find_nginx()
        except edge.MissingNginxError as error:
            pytest.skip(str(error))
    if any(each.startswith("curl ") for each in commands) and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    printed = checkout.run(["bash", "-euo", "pipefail", "-c"], "\n".join(commands))
    for block in page.of_kind("text"):
        for line in filter(None, map(str.strip, block.text.splitlines())):
            words = (re.sub(r"\d+(\\?\.\d+)*", r"[\\d.]+", re.escape(word)) for word in line.split())
            pattern = r"\s+".join(words)
            assert re.search(rf"^\s*{pattern}\s*$", printed, re.MULTILINE), f"{line}\nis not in:\n{printed}"
    if page.path != README:
        for block in page.of_kind("python"):
            checkout.run([sys.executable, "-c"], block.text)


KINDS = [("sh",), ("python",), ("python", "excerpt"), ("text",), ("text", "quoted")]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_no_block_escapes_the_tests(page: Path) -> None:
    others = {block.kind for block in Page(page).blocks} - set(KINDS)
    assert others <= ({()} if page == README else set())  # where the README draws with letters


EXAMPLES = [path.read_text() for path in sorted((ROOT / "client" / "examples").glob("*.py"))]
EXCERPTS = [
    pytest.param(block.text, id=f"{page.path.stem}-{block.line}")
    for page in map(Page, PAGES)
    for block in page.of_kind("python", "excerpt")
]


@pytest.mark.parametrize("excerpt", EXCERPTS)
def test_an_excerpt_is_of_an_example(excerpt: str) -> None:
    """Those are run by tests/integrations."""
    lines = [line.strip() for line in excerpt.splitlines() if line.strip() not in ("", "...")]
    assert any(set(lines) <= {line.strip() for line in example.splitlines()} for example in EXAMPLES)
