"""`talksplat-server up` as a process of its own, to be broken."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from talksplat.server import ROOT, NotServingError, Ports, Server

PATIENCE = 60  # seconds; a recovery takes about 2 on a quiet machine


def stop_at_once(command: subprocess.Popen[bytes]) -> None:
    """Have it end and clean up, without the seconds that Triton takes to go in order: that has tests of its own."""
    if command.poll() is None:
        command.terminate()
        for child in psutil.Process(command.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "triton" in child.name():
                    child.kill()
        command.wait(30)


class Up:
    """The command and the server that it supervises; a context manager, which stops it.

    Args:
        avatars: the folder of the bundles.
        run_dir: of the log, and of what the command says.
        prefix: a command that runs it.
        environment: on top of this process's.
    """

    def __init__(
        self,
        avatars: Path,
        run_dir: Path,
        *,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.ports = Ports.free()
        command = [sys.executable, "-m", "talksplat.cli", "up", "--avatars", str(avatars), "--run-dir", str(run_dir)]
        command += [f"--{name}-port={port}" for name, port in vars(self.ports).items()]
        run_dir.mkdir(parents=True, exist_ok=True)
        self.output = run_dir / "up.txt"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [*prefix, *command], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
            )
        self.probe = Server(avatars=avatars, ports=self.ports)  # never started: it sends canaries
        try:
            self.wait_until_serving()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        stop_at_once(self.process)

    def text(self) -> str:
        return self.output.read_text()

    def tritonserver(self) -> psutil.Process:
        return next(child for child in psutil.Process(self.process.pid).children() if "triton" in child.name())

    def stub(self, model: str) -> psutil.Process:
        """The process of one model."""
        (stub,) = [child for child in self.tritonserver().children() if f"/{model}/" in " ".join(child.cmdline())]
        return stub

    def serves(self, timeout: float) -> bool:
        try:
            self.probe.canary(timeout)
        except NotServingError:
            return False
        return True

    def wait_until_serving(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while not ("Serving" in self.text() and self.serves(2)):
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.1)

    def wait_for_another(self, broken: psutil.Process) -> None:
        """Until a broken tritonserver is replaced by one that serves."""
        deadline = time.monotonic() + PATIENCE
        while broken.is_running() or not self.serves(2):
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.1)
