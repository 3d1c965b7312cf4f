"""``talksplat doctor``: what this machine has and lacks to talk to avatars, and whether a server answers, in sentences.

Where the package talksplat is installed beside this one, its own command examines the server's side.
"""

from __future__ import annotations

import importlib.metadata as metadata
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ._blocking import Client, Stream
from ._exceptions import InvalidRequestError, MissingExtraError, TalksplatError
from ._extras import import_package
from ._files import encoders
from ._turns import conversation

PACKAGE = "talksplat-client"
EXTRAS = {  # what each gives
    "media": "files, other sample rates, microphones",
    "livekit": "face for LiveKit agents",
    "pipecat": "face for Pipecat",
    "webrtc": "WebRTC by aiortc",
    "llm": "answers of a language model",
    "c2pa": "signed content credentials in written files",
}
CHUNKS = 6  # that are timed; the first does not count
SERVER = "talksplat-server"
PATIENCE = 120.0  # seconds for the server's own command

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One sentence: a problem is in the way of all, a note of some feature."""

    level: Level
    about: str
    sentence: str


def examine(client: Client) -> Iterator[Finding]:
    """All checks, each as soon as it is done. None raises.

    Args:
        client: with ``Limits(in_flight=1)``, so that a chunk's time is one request's.
    """
    yield from python()
    yield from extras()
    yield from codecs()
    yield from microphone()
    yield from server(client)
    yield from serving()


def python() -> Iterator[Finding]:
    """The interpreter, and versions."""
    wanted = metadata.metadata(PACKAGE)["Requires-Python"]
    version = ".".join(map(str, sys.version_info[:3]))
    if not _fits(sys.version_info[:2], wanted):
        yield Finding("problem", "python", f"This is Python {version}, expected {wanted}: make another environment.")
        return
    installed = ", ".join(f"{name} {metadata.version(name)}" for name in (PACKAGE, "tritonclient", "grpcio", "numpy"))
    yield Finding("ok", "python", f"Python {version}, {installed}.")


def extras() -> Iterator[Finding]:
    """Optional packages, and what they are for."""
    wanted: dict[str, list[str]] = {}
    for requirement in metadata.requires(PACKAGE) or []:
        if found := re.fullmatch(r"([\w.-]+)[^;]*;.*extra == ['\"]([\w-]+)['\"].*", requirement):
            wanted.setdefault(found[2], []).append(found[1])
    for extra, packages in wanted.items():
        missing = [package for package in packages if package != PACKAGE and not _installed(package)]
        gives = EXTRAS.get(extra, "more")
        if missing:
            sentence = f"No {gives} without {', '.join(missing)}: pip install '{PACKAGE}[{extra}]'"
            yield Finding("note", extra, sentence)
        else:
            yield Finding("ok", extra, f"There is what it takes for {gives}.")


def codecs() -> Iterator[Finding]:
    """What PyAV's FFmpeg can write."""
    try:
        missing = {form: names for form, names in encoders().items() if names}
    except MissingExtraError:
        return  # which `extras` has said
    if missing:
        told = "; ".join(f"{form}: {', '.join(names)}" for form, names in missing.items())
        sentence = f"This PyAV lacks encoders ({told}): install PyPI's wheel, pip install --force-reinstall av"
        yield Finding("note", "codecs", sentence)
    else:
        yield Finding("ok", "codecs", f"PyAV {metadata.version('av')} writes {', '.join(encoders())}.")


def microphone() -> Iterator[Finding]:
    """Whether there is a default one."""
    try:
        device = import_package("sounddevice", "the microphone").query_devices(kind="input")
    except MissingExtraError:
        return
    except OSError:
        yield Finding("note", "microphone", "Live sound needs the library PortAudio: apt install libportaudio2.")
    except Exception as error:  # PortAudioError and ValueError, of a module that may be missing
        yield Finding("note", "microphone", f"There is no microphone ({error}): live sound comes from pipes only.")
    else:
        yield Finding("ok", "microphone", f"The microphone is {device['name']}.")


def server(client: Client) -> Iterator[Finding]:
    """What answers at the addresses, and how fast."""
    ready = False
    for replica in client.health():
        ready |= replica.ready
        if replica.ready:
            yield Finding("ok", "server", f"{replica.url}: {replica.detail}.")
        else:
            yield Finding("problem", "server", f"{replica.detail}. Start one with `make serve`, or name it with --url.")
    if not ready:
        return
    for check in (_clock, _avatars, _recogniser, _voice):
        try:
            yield from check(client)
        except TalksplatError as error:
            yield Finding("problem", check.__name__.strip("_"), f"{error}.")


def _clock(client: Client) -> Iterator[Finding]:
    clock = client.clock()
    window = (clock.left_context + clock.chunk + clock.look_ahead) / clock.sample_rate
    yield Finding(
        "ok",
        "clock",
        f"{clock.fps} frames a second, {clock.chunk_frames} in a request, which carries {window:g} s of sound at "
        f"{clock.sample_rate} Hz.",
    )


def _avatars(client: Client) -> Iterator[Finding]:
    names = [avatar.id for avatar in client.avatars()]
    if not names:
        yield Finding(
            "problem", "avatars", "The server has no avatar that you may use: fit one, or ask for another key."
        )
        return
    yield Finding("ok", "avatars", f"Avatars: {', '.join(names)}.")
    clock = client.clock()
    model = client.preload(names[0]).model
    noise = np.random.default_rng(0).normal(scale=0.1, size=CHUNKS * clock.chunk).astype(np.float32)
    limit = 1e3 * clock.chunk / clock.sample_rate
    for what, stream in (
        ("rest", client.idle(names[0], model=model)),
        ("speech", client.animate(noise, avatar=names[0], model=model)),
    ):
        took = _chunk_ms(stream, clock.chunk_frames)
        sentence = (
            f"A chunk of {what} of {names[0]} takes {took:.0f} ms there and back; {limit:.0f} ms of it are shown."
        )
        if took < limit:
            yield Finding("ok", "latency", sentence)
        else:
            yield Finding("problem", "latency", f"{sentence} Live streams would stall: use a nearer or faster server.")


def _recogniser(client: Client) -> Iterator[Finding]:
    began = time.monotonic()
    client.transcribe(np.zeros(client.clock().sample_rate, np.float32))
    yield Finding("ok", "recogniser", f"The recogniser answers to a second of silence in {_ms_since(began):.0f} ms.")


def _voice(client: Client) -> Iterator[Finding]:
    prepared = conversation()["script"][0]["says"]
    text = prepared if isinstance(prepared, str) else prepared[0]
    began = time.monotonic()
    next(client.synthesize(text))
    took = _ms_since(began)
    try:
        next(client.synthesize("Seven grey foxes examine this machine."))  # nobody has prepared that
    except InvalidRequestError as error:
        yield Finding("note", "voice", f"The voice begins after {took:.0f} ms, with prepared replies only: {error}")
    else:
        yield Finding("ok", "voice", f"The voice says any text, and begins after {took:.0f} ms.")


def _chunk_ms(stream: Stream, frames: int) -> float:
    """Median of the times between chunks."""
    times = [time.monotonic()]
    with stream:
        for count, _ in enumerate(stream, 1):
            if count % frames == 0:
                times.append(time.monotonic())
            if len(times) > CHUNKS:
                break
    return 1e3 * statistics.median(after - before for before, after in pairwise(times[1:]))


def _ms_since(began: float) -> float:
    return 1e3 * (time.monotonic() - began)


def serving() -> Iterator[Finding]:
    """What the server's own command says, where it is installed."""
    beside = Path(sys.executable).with_name(SERVER)
    program = str(beside) if beside.exists() else shutil.which(SERVER)
    if program is None:
        yield Finding("ok", "serving", "The package talksplat is not installed here: this machine is a client's.")
        return
    try:
        answer = subprocess.run(
            [program, "doctor", "--json"], capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        yield from (Finding(**each) for each in json.loads(answer.stdout)["findings"])
    except (OSError, ValueError, KeyError, TypeError, subprocess.TimeoutExpired) as error:
        yield Finding("problem", "serving", f"`{SERVER} doctor` gives no answer ({error}): install talksplat again.")


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _fits(version: tuple[int, ...], wanted: str) -> bool:
    """Whether a version is within bounds such as ``>=3.11,<3.13``."""
    compare: dict[str, Callable[[Any, Any], bool]] = {">=": lambda a, b: a >= b, "<": lambda a, b: a < b}
    return all(
        compare[sign](version, tuple(map(int, bound.split("."))))
        for sign, bound in re.findall(r"(>=|<)([\d.]+)", wanted)
    )
