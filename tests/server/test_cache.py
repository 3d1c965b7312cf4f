import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from make_avatar import write_avatar

from talksplat import avatar as bundle
from talksplat import cache as cache_module
from talksplat.avatar import Avatar, BundleError, UnknownAvatarError
from talksplat.cache import AvatarCache

SIZE = 100


class Counted:
    """A cache of avatars that all count as `SIZE` bytes, and what it did."""

    def __init__(self, root: Path, max_bytes: int = 10 * SIZE) -> None:
        self.loads: list[str] = []
        self.dropped: list[str] = []
        self.cache = AvatarCache(root, self._load, lambda _: SIZE, max_bytes, self._drop)

    def _load(self, root: Path, avatar_id: str) -> Avatar:
        avatar = bundle.read(root, avatar_id)
        self.loads.append(avatar_id)
        return avatar

    def _drop(self, avatar: Avatar) -> None:
        self.dropped.append(avatar.id)

    def touch(self, avatar_id: str) -> Avatar:
        with self.cache.use(avatar_id) as avatar:
            return avatar


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("red", "green", "blue"):
        write_avatar(tmp_path, name)
    return tmp_path


@pytest.fixture
def always_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "CHECK_SECONDS", -1.0)


def test_an_avatar_is_read_once(root: Path) -> None:
    counted = Counted(root)
    assert counted.touch("red") is counted.touch("red")
    assert counted.loads == ["red"]


def test_the_least_recently_used_leaves_first(root: Path) -> None:
    counted = Counted(root, max_bytes=2 * SIZE)
    for name in ("red", "green", "red", "blue"):
        counted.touch(name)
    assert counted.cache.ids() == ["red", "blue"]
    assert counted.dropped == ["green"]
    assert counted.cache.counts.bytes == 2 * SIZE


def test_what_is_in_use_is_never_evicted(root: Path) -> None:
    counted = Counted(root, max_bytes=SIZE)
    with counted.cache.use("red"):
        counted.touch("green")
        counted.touch("blue")
        assert "red" in counted.cache.ids()
        assert counted.dropped == ["green"]
    assert counted.cache.ids() == ["blue"]


def test_an_avatar_above_the_budget_is_served_all_the_same(root: Path) -> None:
    counted = Counted(root, max_bytes=1)
    assert counted.touch("red").id == "red"
    assert counted.cache.ids() == ["red"]


@pytest.mark.usefixtures("always_look")
def test_a_replaced_bundle_is_noticed(root: Path) -> None:
    counted = Counted(root)
    with counted.cache.use("red") as old:
        write_avatar(root, "red", size=32)
        new = counted.touch("red")
        assert (old.width, new.width) == (64, 32)
    assert counted.loads == ["red", "red"]
    assert counted.dropped == ["red"]
    assert counted.cache.counts.bytes == SIZE


@pytest.mark.usefixtures("always_look")
def test_a_bundle_broken_on_disk_does_not_end_the_loaded_one(root: Path) -> None:
    counted = Counted(root)
    loaded = counted.touch("red")
    (root / "red" / "avatar.json").write_text("{}")
    assert counted.touch("red") is loaded
    with pytest.raises(BundleError, match="'red'"), counted.cache.use("red", strict=True):
        pass
    write_avatar(root, "red", size=32)
    assert counted.touch("red").width == 32


def test_a_refused_bundle_leaves_no_trace(root: Path) -> None:
    counted = Counted(root)
    plates = root / "red" / "plates.bin"
    sound = plates.read_bytes()
    plates.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    for _ in range(2):
        with pytest.raises(BundleError, match="damaged"):
            counted.touch("red")
    assert counted.cache.ids() == []
    plates.write_bytes(sound)
    assert counted.touch("red").id == "red"


@pytest.mark.usefixtures("always_look")
def test_an_avatar_that_was_deleted_is_unknown(root: Path) -> None:
    counted = Counted(root)
    counted.touch("red")
    shutil.rmtree(root / "red")
    with pytest.raises(UnknownAvatarError):
        counted.touch("red")
    assert counted.cache.ids() == []


def test_dropping_says_whether_it_was_loaded(root: Path) -> None:
    counted = Counted(root)
    counted.touch("red")
    assert counted.cache.drop("red")
    assert not counted.cache.drop("red")
    assert counted.dropped == ["red"]


def test_many_threads_get_the_right_avatars_within_the_budget(root: Path) -> None:
    counted = Counted(root, max_bytes=SIZE)
    wrong: list[str] = []

    def work(names: list[str]) -> None:
        for name in names * 20:
            with counted.cache.use(name) as avatar:
                if avatar.id != name:
                    wrong.append(name)

    orders = (["red", "green", "blue"], ["blue", "green", "red"], ["green", "red", "blue"])
    threads = [threading.Thread(target=work, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert counted.cache.counts.bytes == SIZE
    assert len(counted.loads) == len(counted.dropped) + 1


def test_what_is_in_use_is_parted_with_by_its_last_user(root: Path) -> None:
    counted = Counted(root)
    with counted.cache.use("red"):
        with counted.cache.use("red"):
            assert counted.cache.drop("red")
            assert counted.cache.ids() == []
            assert counted.touch("red").id == "red"
        assert counted.dropped == []
    assert counted.dropped == ["red"]
    assert counted.loads == ["red", "red"]


def test_an_avatar_that_was_never_there_is_refused_without_a_pause(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody can ask for one, and who else waits in the meantime has done nothing wrong."""
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it paused"))
    with pytest.raises(UnknownAvatarError):
        Counted(root).touch("nobody")


@pytest.mark.usefixtures("always_look")
def test_avatars_that_are_used_replaced_and_dropped_at_once_are_all_parted_with(root: Path) -> None:
    counted = Counted(root, max_bytes=SIZE)

    def use(names: list[str]) -> None:
        for name in names * 15:
            with counted.cache.use(name) as avatar:
                assert avatar.id == name

    def drop() -> None:
        for _ in range(30):
            counted.cache.drop("red")

    def replace() -> None:
        for _ in range(8):
            os.utime(root / "green" / "avatar.json")  # another version

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(use, ["red", "green"]), pool.submit(use, ["green", "red"])]
        for job in [*jobs, pool.submit(drop), pool.submit(replace)]:
            job.result()
    assert len(counted.loads) == len(counted.dropped) + len(counted.cache.ids())
