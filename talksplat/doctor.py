"""``talksplat-server doctor``: what this machine has and lacks for serving, in sentences.

    {"findings": [{"level": "problem", "about": "models", "sentence": "... run `make models`."}]}

A problem keeps a server from starting or an avatar from being shown; a note is what some feature lacks.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil

from talksplat import avatar as bundle
from talksplat import edge, phonemiser, server
from talksplat.server import ROOT, SHARED_MEMORY, Ports

MEMORY = 3.0  # GB that a server with a few avatars and the recogniser takes, with room
SHARED = 0.5  # GB of shared memory that its processes hand requests around in
DISK = 2.0  # GB: models, logs, a fit's work folder takes more

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One sentence about a machine."""

    level: Level
    about: str
    sentence: str


def examine(repository: Path, avatars: Path) -> list[Finding]:
    """All checks. None of them raises, changes anything or takes more than seconds."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        tools,
        processor,
        memory,
        lambda: models(repository),
        lambda: bundles(avatars),
        ports,
        nginx,
        browser,
        gpu,
        voice,
        disk,
    ]
    return [finding for check in checks for finding in check()]


def tools() -> Iterator[Finding]:
    """What building needs; a checkout knows."""
    preflight = ROOT / "tools" / "preflight.py"
    if not preflight.exists():
        return
    missing = runpy.run_path(str(preflight))["missing"]()
    yield (
        Finding("problem", "tools", missing) if missing else Finding("ok", "tools", "All that building needs is there.")
    )


def processor() -> Iterator[Finding]:
    """Cores and vector units."""
    cores = len(os.sched_getaffinity(0))
    try:
        from talksplat import splat

        fastest = splat.isas()[0]
    except ImportError as error:
        yield Finding("problem", "processor", f"The rasterizer is not built ({error}): run `make models`.")
        return
    sentence = f"{cores} cores may be used; the rasterizer draws with {fastest}."
    if cores < 2:
        yield Finding("note", "processor", f"{sentence} One core carries a single viewer, if that: give it two.")
    elif fastest == "portable":
        yield Finding("note", "processor", f"{sentence} The processor has neither AVX2 nor AVX-512: expect a third.")
    else:
        yield Finding("ok", "processor", sentence)


def memory() -> Iterator[Finding]:
    """Memory, and what of it processes can share."""
    free = psutil.virtual_memory().available / 1e9
    enough = free >= MEMORY
    more = "" if enough else f" A server wants {MEMORY:g} GB: close other programs, or serve elsewhere."
    yield Finding("ok" if enough else "note", "memory", f"{free:.1f} GB of memory are free.{more}")
    try:
        shared = shutil.disk_usage(SHARED_MEMORY).free / 1e9
    except OSError as error:
        yield Finding("problem", "memory", f"{SHARED_MEMORY} can't be used ({error.strerror}), and Triton needs it.")
        return
    enough = shared >= SHARED
    more = "" if enough else f" {SHARED:g} GB are wanted: give a container --shm-size 1g."
    yield Finding("ok" if enough else "problem", "memory", f"{shared:.1f} GB are free in {SHARED_MEMORY}.{more}")


def models(repository: Path) -> Iterator[Finding]:
    """Triton itself, and the models that it serves."""
    try:
        server.require_startable(repository)
    except server.ServerError as error:
        yield Finding("problem", "models", str(error))
        return
    export = Path(sys.executable).with_name("talksplat-export")
    if not export.exists():
        sentence = (
            f"Triton and the models of {repository} are there; whether they are fresh, only talksplat-export knows."
        )
        yield Finding("ok", "models", sentence)
        return
    command: list[str | Path] = [export, "models", "--check", "--repository", repository]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        yield Finding("problem", "models", (answer.stdout or answer.stderr).strip())
    else:
        yield Finding("ok", "models", f"Triton and the models of {repository} are there and fresh.")


def bundles(avatars: Path) -> Iterator[Finding]:
    """Avatars: whole, and with the consent of who was recorded."""
    names = bundle.available(avatars)
    if not names:
        yield Finding("problem", "avatars", f"There is no avatar in {avatars}: fit one, see docs/first-avatar.md.")
    for name in names:
        try:
            found = bundle.read(avatars, name, bundle.AnyAvatar)
        except (bundle.BundleError, bundle.UnknownAvatarError) as error:
            yield Finding("problem", "avatars", f"{error}.")
            continue
        size = f"The avatar {name} is whole: {found.profile}, {found.width} x {found.height}"
        if found.consent is None:
            yield Finding(
                "note", "avatars", f"{size}. It has no consent of who was recorded: fit it with --consent FILE."
            )
        else:
            yield Finding("ok", "avatars", f"{size}, with its person's consent, {found.consent.name}.")


def ports() -> Iterator[Finding]:
    """Whether a server with the default ports could start now."""
    try:
        Ports().check()
    except server.PortInUseError as error:
        yield Finding("note", "ports", f"{error} A server that runs already is one such.")
    else:
        yield Finding("ok", "ports", f"The ports {', '.join(map(str, vars(Ports()).values()))} are free.")


def nginx() -> Iterator[Finding]:
    """What the edge and the page stand on."""
    try:
        yield Finding("ok", "nginx", f"{edge.find_nginx()} and its Lua module are there, for the edge and the page.")
    except edge.MissingNginxError as error:
        yield Finding("note", "nginx", f"{error} The edge (`make serve-secure`) and the page (`make web`) want it.")


def browser() -> Iterator[Finding]:
    """What the page's tests run in."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found:
        yield Finding("ok", "browser", f"{found} is there, for the page's tests.")
    else:
        yield Finding("note", "browser", "The page's tests are skipped without Chromium: apt install chromium.")


def gpu() -> Iterator[Finding]:
    """NVIDIA's driver, and the TensorRT that plans are built with."""
    program = shutil.which("nvidia-smi")
    answer = program and subprocess.run([program, "--list-gpus"], capture_output=True, text=True, check=False)
    if not answer or answer.returncode or not answer.stdout.strip():
        yield Finding("ok", "gpu", "There is no NVIDIA GPU: everything runs on the processor, as it may.")
        return
    inside = (server.CONTAINER / "bin").is_dir()
    where = "and this is Triton's container" if inside else "which `docker compose --profile gpu up` uses"
    yield Finding("ok", "gpu", f"{answer.stdout.splitlines()[0]}, {where}.")


def voice() -> Iterator[Finding]:
    """The phonemiser of the model tts."""
    try:
        with phonemiser.Espeak() as espeak:
            espeak.ipa("Hello.")
    except phonemiser.PhonemiserError as error:
        yield Finding("note", "voice", f"The voice says prepared replies only: {error}")
    else:
        yield Finding("ok", "voice", "espeak-ng answers: the voice says any text.")


def disk() -> Iterator[Finding]:
    """Room for models and logs."""
    free = shutil.disk_usage(ROOT).free / 1e9
    enough = free >= DISK
    more = "" if enough else f" Models and logs want {DISK:g} GB: make room."
    yield Finding("ok" if enough else "note", "disk", f"{free:.1f} GB are free at {ROOT}.{more}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--json", action="store_true", help="the findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; 1 if there is a problem."""
    findings = examine(arguments.repository, arguments.avatars)
    if arguments.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}))
    else:
        for finding in findings:
            print(f"{finding.level:>7}  {finding.about}: {finding.sentence}")
    return int(any(finding.level == "problem" for finding in findings))
