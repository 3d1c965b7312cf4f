"""The page in a real Chromium: frames a second, sound to picture, how soon it answers, how it outlives its server.

    python -m loadtests.page --json bench/page.json

Chromium is the system's, headless, with a microphone that plays a file. It stands for a viewer's own device but runs on
the server's machine, so a viewer's figures are no worse.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import psutil
from playwright.sync_api import Browser, Page, sync_playwright
from rich.console import Console

from loadtests.conversation import SPEECH
from talksplat import clock
from talksplat.bench._report import Row, report
from talksplat.edge import EdgeError, MissingNginxError, find_nginx
from talksplat.server import HOST, ROOT, Ports

Stats: TypeAlias = dict[str, Any]  # of the page: window.talksplat.stats()

SECONDS = 30
FRAMES_PER_SECOND = 24.0  # targets
SKEW_MS = 45.0
TURNS = 5
FIRST_SENTENCE = 1.9  # seconds of demo/speech.wav: "Hello, and welcome.", up to the middle of the pause after it
PATIENCE = 60.0  # seconds
OPTIONS = (
    *("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--use-fake-device-for-media-stream"),
)


class MissingChromiumError(RuntimeError):
    """There is no Chromium on this machine."""


def find_chromium() -> Path:
    """The installed Chromium, or Chrome.

    Raises:
        MissingChromiumError: there is none.
    """
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if (found := shutil.which(name)) is not None:
            return Path(found)
    raise MissingChromiumError("Chromium is not installed: apt install chromium.")


def speech() -> npt.NDArray[np.int16]:
    """[T] of demo/speech.wav, at `clock.SAMPLE_RATE`."""
    with wave.open(str(SPEECH)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), np.int16)


def write(path: Path, samples: npt.NDArray[np.int16]) -> Path:
    """A WAV file of samples [T] at `clock.SAMPLE_RATE`."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, clock.SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    return path


def recording(path: Path, seconds: float) -> Path:
    """Speech of that length, with its pauses."""
    return write(path, np.resize(speech(), int(seconds * clock.SAMPLE_RATE)))  # repeated, or cut off


def greeting(path: Path, silence: float) -> Path:
    """ "Hello, and welcome." and silence, for a microphone that repeats it."""
    samples = speech()[: int(FIRST_SENTENCE * clock.SAMPLE_RATE)]
    return write(path, np.concatenate([samples, np.zeros(int(silence * clock.SAMPLE_RATE), np.int16)]))


class Web:
    """`talksplat-server web` as a process of its own; a context manager, which stops it.

    Args:
        run_dir: of the logs, and of what the command says.
        avatars: the folder of the bundles.

    Raises:
        EdgeError: it does not serve.
    """

    def __init__(self, run_dir: Path, avatars: Path = ROOT / "avatars") -> None:
        port = Ports.free().http
        self.url = f"http://{HOST}:{port}/"
        self.output = run_dir / "web.txt"
        command = [sys.executable, "-m", "talksplat.cli", "web", f"--port={port}"]
        command += [f"--avatars={avatars}", f"--run-dir={run_dir}"]
        run_dir.mkdir(parents=True, exist_ok=True)
        with self.output.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
        deadline = time.monotonic() + PATIENCE
        while self.url not in self.output.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise EdgeError(f"The page is not served:\n{self.output.read_text()}")
            time.sleep(0.05)

    def __enter__(self) -> Web:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop it, and what it runs."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        self.process.wait(PATIENCE)

    def kill_server(self) -> None:
        """SIGKILL Triton."""
        (triton,) = [child for child in psutil.Process(self.process.pid).children() if "triton" in child.name()]
        triton.kill()


class Visit:
    """One viewer's page.

    Args:
        page: opened.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []  # of its scripts, and what its policy forbade
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)

    def stats(self) -> Stats:
        """What the page says of itself."""
        found: Stats = self.page.evaluate("() => window.talksplat?.stats() ?? { state: 'loading' }")
        return found

    def wait_for(self, condition: Callable[[Stats], object], seconds: float = 20) -> Stats:
        """Its figures as soon as they meet the condition.

        Raises:
            TimeoutError: they don't.
        """
        deadline = time.monotonic() + seconds
        while not condition(stats := self.stats()):
            if time.monotonic() > deadline:
                told = {name: value for name, value in stats.items() if not name.endswith("Ms")}
                problem = self.page.text_content("#problem")
                raise TimeoutError(f"not within {seconds:g} s: {told}, {problem}, {self.errors}")
            self.page.wait_for_timeout(20)
        return stats

    def is_(self, state: str, seconds: float = 20) -> Stats:
        """Wait until it is in a state: idle, listening, thinking, speaking, reconnecting, stopped."""
        return self.wait_for(lambda stats: stats["state"] == state, seconds)

    def now(self) -> float:
        """The page's clock, in ms."""
        return float(self.page.evaluate("() => performance.now()"))

    def observe(self, seconds: float) -> Row:
        """How it draws for so many seconds from now on."""
        before, begin = self.stats(), self.now()
        self.page.wait_for_timeout(1e3 * seconds)
        after, end = self.stats(), self.now()
        drawn = np.array([each for each in after["drawTimesMs"] if begin <= each < end])
        skews = np.array(after["skewsMs"][len(before["skewsMs"]) :] or [np.nan])
        return {
            "seconds": round(1e-3 * (end - begin), 1),
            "frames_per_s": round(1e3 * len(drawn) / (end - begin), 2),
            "longest_gap_ms": round(float(np.diff(drawn).max()), 1) if len(drawn) > 1 else None,
            "missed": after["framesMissed"] - before["framesMissed"],
            "out_of_order": after["outOfOrder"] - before["outOfOrder"],
            "skew_p50_ms": _round(np.percentile(skews, 50)),
            "skew_p95_ms": _round(np.percentile(skews, 95)),
        }


class Chromium:
    """The browser; a context manager, which ends it.

    Args:
        microphone: a WAV file, which it repeats.

    Raises:
        MissingChromiumError: there is no Chromium.
    """

    def __init__(self, microphone: Path) -> None:
        self._executable = find_chromium()
        self._options = [*OPTIONS, f"--use-file-for-fake-audio-capture={microphone}"]
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Chromium:
        playwright = self._stack.enter_context(sync_playwright())
        launched = playwright.chromium.launch(
            executable_path=self._executable, args=self._options, chromium_sandbox=False
        )
        self._browser: Browser = self._stack.enter_context(contextlib.closing(launched))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def visit(
        self, url: str, *, microphone: bool = True, prepare: Callable[[Page], None] | None = None, **look: Any
    ) -> Iterator[Visit]:
        """Open a page in a context of its own.

        Args:
            url: of the page.
            microphone: whether it may have it.
            prepare: is given the page before it is opened.
            look: what Playwright's `new_context` takes: viewport, color_scheme, has_touch ...
        """
        context = self._browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **look})
        with contextlib.closing(context):
            context.grant_permissions(["microphone"] if microphone else [])
            page = context.new_page()
            visit = Visit(page)
            if prepare is not None:
                prepare(page)
            page.goto(url)
            yield visit


def main(argv: list[str] | None = None) -> int:
    """Measure, print the tables; 0 also where a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.page", description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of speech; default: %(default)s")
    parser.add_argument("--turns", type=int, default=TURNS, help="of conversation; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    arguments = parser.parse_args(argv)
    try:
        find_nginx(lua=False)
        find_chromium()
    except (MissingNginxError, MissingChromiumError) as error:
        Console(stderr=True).print(f"page: left out. {error}", highlight=False)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        microphone = greeting(folder / "microphone.wav", silence=7)
        with Web(folder / "run") as web, Chromium(microphone) as chromium, chromium.visit(web.url) as visit:
            visit.is_("idle")
            rows: list[Row] = [{"what": "rest", **visit.observe(min(5, arguments.seconds))}]
            talk(visit, recording(folder / "speech.wav", arguments.seconds + 5))
            rows.append({"what": "speech", **visit.observe(arguments.seconds)})
            visit.page.keyboard.press("Escape")
            conversation = converse(visit, arguments.turns)
            lost = reconnect(web, visit)
    speaking = rows[-1]
    targets: list[Row] = [
        target("frames_per_s", speaking, FRAMES_PER_SECOND, at_least=True),
        target("skew_p95_ms", speaking, SKEW_MS),
        target("out_of_order", speaking, 0),
    ]
    report("page", rows, arguments.json, {"conversation": conversation, "server killed": lost, "targets": targets})
    return 0


def talk(visit: Visit, sound: Path) -> None:
    """Have the avatar speak with the voice in a file; returns when it does."""
    visit.page.set_input_files("#file", sound)
    visit.is_("speaking")


def converse(visit: Visit, turns: int) -> list[Row]:
    """Speak so many turns into the microphone; the median of each stage that the page measured, in ms."""
    measured: list[Mapping[str, float]] = []
    visit.page.click("#talk")
    for _ in range(turns):
        visit.is_("listening", 30)
        visit.is_("speaking")
        measured.append(visit.stats()["stages"])
        visit.is_("idle", 30)
    visit.page.click("#talk")
    row: Row = {"turns": turns}
    for stage in dict.fromkeys(stage for stages in measured for stage in stages):
        median = np.median([stages[stage] for stages in measured if stage in stages])
        row[f"{''.join('_' + c.lower() if c.isupper() else c for c in stage)}_ms"] = round(float(median))
    return [row]


def reconnect(web: Web, visit: Visit) -> list[Row]:
    """Kill the server; the seconds until it is noticed and until frames come again."""
    web.kill_server()
    began = time.monotonic()
    visit.is_("reconnecting")
    noticed = time.monotonic() - began
    drawn = visit.stats()["framesDrawn"]
    stats = visit.wait_for(lambda stats: stats["state"] == "idle" and stats["framesDrawn"] > drawn, PATIENCE)
    back = time.monotonic() - began
    return [{"noticed_s": round(noticed, 2), "back_s": round(back, 2), "out_of_order": stats["outOfOrder"]}]


def target(name: str, row: Row, limit: float, *, at_least: bool = False) -> Row:
    """Whether a figure holds what was asked for."""
    value = float(row[name] if row[name] is not None else "nan")  # type: ignore[arg-type]
    holds = value >= limit if at_least else value <= limit
    return {"figure": name, "measured": value, "asked": f"{'≥' if at_least else '≤'} {limit:g}", "holds": str(holds)}


def _round(value: Any) -> float | None:
    return None if np.isnan(value) else round(float(value), 1)


if __name__ == "__main__":
    sys.exit(main())
