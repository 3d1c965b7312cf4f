"""What the tests of faults share: marked avatars, and a table of what each fault cost."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest
from supervised import Up
from viewers import MARKED, Verdict, write_marked_avatar

from talksplat.bench import _report
from talksplat.server import Server

RECOVERY = 30.0  # seconds at most, on a slow machine that does other things; the figure itself is in the table

Judge: TypeAlias = Callable[[str, Verdict], None]


@pytest.fixture(scope="session")
def marked_avatars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all marked avatars."""
    folder = tmp_path_factory.mktemp("marked")
    for avatar_id in MARKED:
        write_marked_avatar(folder, avatar_id)
    return folder


@pytest.fixture(scope="session")
def up(marked_avatars: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A supervised server, to be broken; whole again after each test."""
    with Up(marked_avatars, tmp_path_factory.mktemp("up")) as up:
        yield up


@pytest.fixture(scope="module")
def marked(marked_avatars: Path, server: Server) -> Iterator[Path]:
    """The first of the marked avatars, all of which the shared server has meanwhile."""
    folders = [server.avatars / avatar_id for avatar_id in MARKED]
    for folder in folders:
        shutil.copytree(marked_avatars / folder.name, folder)
    yield folders[0]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def rows() -> Iterator[list[_report.Row]]:
    """A row a fault; `make faults` has them printed and written to FAULTS_JSON."""
    rows: list[_report.Row] = []
    yield rows
    if path := os.environ.get("FAULTS_JSON"):
        _report.report("faults", rows, Path(path))


@pytest.fixture
def judge(rows: list[_report.Row]) -> Judge:
    """Notes what a fault cost, and requires that it cost no frame and ended."""

    def judge(fault: str, verdict: Verdict) -> None:
        seen = vars(verdict).copy()
        rows.append({"fault": fault, "recovery_s": round(seen.pop("longest_gap_s"), 2), **seen})
        assert (verdict.lost, verdict.doubled, verdict.foreign, verdict.misplaced) == (0, 0, 0, 0)
        assert verdict.longest_gap_s < RECOVERY

    return judge
