"""A bundle that is damaged on disk while its avatar speaks: the loaded one is served on, nobody else notices."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from viewers import MARKED, Verdict, Viewers, thorough, write_marked_avatar

from talksplat.cache import CHECK_SECONDS
from talksplat.server import Server
from talksplat_client import Client, TalksplatError, UnknownAvatarError

MANIFEST, PACK, GAUSSIANS = "avatar.json", "plates.bin", "gaussians.safetensors"


def truncate(folder: Path) -> None:
    for name in (MANIFEST, PACK):
        with (folder / name).open("r+b") as file:
            file.truncate((folder / name).stat().st_size // 2)


def zero(folder: Path) -> None:
    for name in (MANIFEST, GAUSSIANS):
        (folder / name).write_bytes(bytes((folder / name).stat().st_size))


def lose_a_file(folder: Path) -> None:
    (folder / PACK).unlink()
    (folder / MANIFEST).touch()


def write_half(folder: Path) -> None:
    """By something that does not write bundles in one step: a manifest, and the files of another version."""
    (folder / GAUSSIANS).write_bytes((folder / GAUSSIANS).read_bytes()[:1000])
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes() + b"\n")


@pytest.mark.parametrize(
    "damage", [truncate, write_half, *(pytest.param(each, marks=thorough) for each in (zero, lose_a_file))]
)
def test_a_damaged_bundle_costs_no_frame(
    server: Server, marked: Path, judge: Callable[[str, Verdict], None], damage: Callable[[Path], None]
) -> None:
    with Client(server.grpc_url) as client:
        client.preload(marked.name)
        with Viewers([server.grpc_url]) as viewers:
            viewers.fault()
            damage(marked)
            time.sleep(1.5 * CHECK_SECONDS)
            with pytest.raises(TalksplatError, match="can't be read"):
                client.preload(marked.name)
            viewers.wait_until_all_see()
            write_marked_avatar(server.avatars, marked.name)
            assert not client.preload(marked.name).cached
            time.sleep(1.5 * CHECK_SECONDS)
            viewers.wait_until_all_see()
            judge(f"bundle on disk: {damage.__name__.replace('_', ' ')}", viewers.verdict())


def test_a_deleted_bundle_ends_its_own_streams_only(
    server: Server, marked: Path, judge: Callable[[str, Verdict], None]
) -> None:
    with Viewers([server.grpc_url], MARKED[1:]) as viewers, Viewers([server.grpc_url], MARKED[:1]) as bereft:
        viewers.fault()
        shutil.rmtree(marked)
        time.sleep(2 * CHECK_SECONDS)
        with pytest.raises(UnknownAvatarError):
            bereft.verdict()
        viewers.wait_until_all_see()
        judge("bundle on disk: deleted, as others see it", viewers.verdict())
    write_marked_avatar(server.avatars, marked.name)
