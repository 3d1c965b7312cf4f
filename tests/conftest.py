"""Fixtures that every room's tests share."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from make_avatar import COLORS, make_huma1_avatar, write_avatar

from talksplat import avatar as bundle
from talksplat.server import Ports, Server

ROOT = Path(__file__).resolve().parent.parent

os.environ["OMP_NUM_THREADS"] = "1"  # for torch, which comes later: small products are slower on several threads


hypothesis.settings.register_profile("talksplat", deadline=None)  # a timing belongs in a benchmark
hypothesis.settings.load_profile("talksplat")

TOGETHER = ("faults", "monitoring")  # folders whose tests share servers of their own
FIRST = ("faults", "web")  # folders that take longest: at the end one process would wait for them


@pytest.hookimpl(tryfirst=True)  # before xdist looks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs in one process, where there are several: a file, or a whole folder of `TOGETHER`; and what first."""
    items.sort(key=lambda item: item.path.parent.name not in FIRST)
    for item in items:
        folder = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group(folder if folder in TOGETHER else item.path.stem))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The project's recordings, which lie beside the checkout and are never part of it."""
    data = ROOT.parent / "shared" / "data"
    if not data.is_dir():
        pytest.skip("the recordings in ../shared/data are not on this machine")
    return data


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that a test starts end without the three seconds that Triton takes to go in order."""
    monkeypatch.setattr(Server, "stop", Server.kill)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The real server, started once: with the exported models, synthetic avatars and, once it is fitted, ava.

    The synthetic ones are those of `COLORS`, and two of the profile huma1, "violet" and "grey".
    """
    avatars = tmp_path_factory.mktemp("avatars")
    for avatar_id in COLORS:
        write_avatar(avatars, avatar_id)
    for avatar_id in ("violet", "grey"):
        bundle.write(make_huma1_avatar(avatar_id), avatars)
    if (ROOT / "avatars" / "ava").is_dir():
        shutil.copytree(ROOT / "avatars" / "ava", avatars / "ava")
    run_dir = tmp_path_factory.mktemp("server")
    with Server(avatars=avatars, ports=Ports.free(), run_dir=run_dir) as server:
        yield server
    kept = re.search(
        r"Timeout 1: Found [1-9]\d* model versions that have in-flight", (run_dir / "triton.log").read_text()
    )
    assert kept is None, "some request was never released"  # models may take longer to unload on a busy machine
