"""The steps of a long piece of work: which are done, how far the one in hand is, what is left, what they took.

A work folder keeps what every step left, and ``steps.json``: for each step a digest of everything that it was made
from, and fingerprints of its files. A step is done again when either differs: neither a folder of other inputs nor a
damaged file goes into a result.
"""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from talksplat.files import replacing, sha256
from talksplat_export import bars

HASHED_BYTES = 64 << 20  # files up to this size are hashed, larger ones known by their size

Advance = Callable[[int], None]  # of how much of a step is done


class Steps:
    """The steps of one piece of work, in ``folder``.

    Args:
        plan: seconds that each step is expected to take, in order; only what they are relative to each other counts
            as soon as one has run.
    """

    def __init__(self, folder: Path, plan: Mapping[str, float], console: Console) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.console = folder, console
        self._plan = dict(plan)
        self._file = folder / "steps.json"
        self._spent, self._expected = 0.0, 0.0  # seconds of the steps that were run here
        self._records: dict[str, dict[str, Any]] = {}
        self._memory = 0  # bytes that earlier processes held at most
        with suppress(FileNotFoundError):
            try:
                kept = json.loads(self._file.read_text())
                self._records = {str(name): dict(record) for name, record in kept["steps"].items()}
                self._memory = int(kept["peak_memory_bytes"])
            except (ValueError, TypeError, KeyError, AttributeError):
                self._records = {}
                console.print(f"{self._file} is damaged: every step is done anew.")

    @staticmethod
    def key(*inputs: object) -> str:
        """A digest of what a step's result depends on, and of the release that makes it."""
        return hashlib.sha256(repr((version("talksplat-export"), *inputs)).encode()).hexdigest()

    @property
    def seconds(self) -> dict[str, float]:
        """What each step took, interrupts left out."""
        return {name: round(record["seconds"], 1) for name, record in self._records.items()}

    @property
    def peak_memory(self) -> int:
        """Bytes that this process held at most, or an earlier one that worked in the same folder."""
        return max(self._memory, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

    def is_done(self, name: str, key: str) -> bool:
        """Whether a step was finished with these very inputs, and its files are as it left them."""
        record = self._records.get(name)
        if record is None or record.get("key") != key or not record.get("finished"):
            return False
        marks = {_fingerprint(self.folder / file): mark for file, mark in record["files"].items()}
        if "" in marks:  # removed
            return False
        if any(found != mark for found, mark in marks.items()):
            self.console.print(f"{name}: what was left of it is damaged, it is done anew")
            return False
        return True

    @contextmanager
    def running(self, name: str, key: str, total: int, files: Sequence[str], kept: str = "") -> Iterator[Advance]:
        """Run a step inside this context, which shows its progress and notes its end.

        Args:
            total: what the function that is yielded counts up to.
            files: names of what it leaves, in the folder.
            kept: name of the file or folder with which it goes on after an interrupt; removed at its end, and before
                where it is from other inputs.
        """
        record = self._records.get(name)
        if record is None or record.get("key") != key or record.get("finished"):
            record = self._records[name] = {"key": key, "finished": False, "seconds": 0.0, "files": {}}
            self._remove(kept)
            self._write()
        earlier, began = float(record["seconds"]), time.monotonic()
        expected = self._plan.get(name, 0.0)
        try:
            with bars.shown(self.console, name, total, lambda share, spent: self._left(name, share, spent)) as advance:
                yield advance
        finally:
            record["seconds"] = earlier + time.monotonic() - began
            self._write()
        if not earlier:
            self._spent, self._expected = self._spent + record["seconds"], self._expected + expected
        record["files"] = {file: _fingerprint(self.folder / file) for file in files}
        record["finished"] = True
        self._write()
        self._remove(kept)

    def skipped(self, name: str) -> None:
        """Say that a step is done, or not needed, and count no time for it."""
        self.console.print(f"{name}: done before")
        self._plan[name] = 0.0

    def _left(self, name: str, share: float, spent: float) -> float:
        """Seconds left of all steps when ``share`` of the step ``name`` took ``spent``."""
        share = max(share, 1e-6)
        planned = self._plan.get(name, 0.0)
        expected = self._expected + share * planned
        pace = min(max((self._spent + spent) / expected, 0.2), 10.0) if expected > 0 else 1.0
        names = list(self._plan)
        later = names[names.index(name) + 1 :] if name in names else []
        return spent / share * (1 - share) + pace * sum(self._plan[step] for step in later)

    def _remove(self, kept: str) -> None:
        if kept:
            path = self.folder / kept
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _write(self) -> None:
        write(
            self._file,
            json.dumps({"steps": self._records, "peak_memory_bytes": self.peak_memory}, indent=1).encode(),
        )


def write(path: Path, data: bytes) -> None:
    """Write a file in one step."""
    with replacing(path) as partial:
        partial.write_bytes(data)


def _fingerprint(path: Path) -> str:
    """Of a file: its SHA-256, or the size of a large one; of a folder, those of its files; empty where none is."""
    if path.is_dir():
        return " ".join(_fingerprint(file) for file in sorted(path.iterdir()))
    try:
        size = path.stat().st_size
        return str(size) if size > HASHED_BYTES else sha256(path)
    except OSError:
        return ""
