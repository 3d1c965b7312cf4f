"""What was loaded, decoded or drawn once and may be wanted again, kept within a budget of bytes."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from talksplat import avatar as bundle

T = TypeVar("T")

CHECK_SECONDS = 1.0  # how long a loaded bundle is served without a look at the disk

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheCounts:
    """What a cache has done so far, and holds now."""

    hits: int
    misses: int
    bytes: int


class ByteCache(Generic[T]):
    """Values that can be made anew, least recently used out first. Any thread may call anything.

    Args:
        size: the bytes that a value takes.
        max_bytes: of all together; exceeded only by a single value above it.
    """

    def __init__(self, size: Callable[[T], int], max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._size = size
        self._values: OrderedDict[tuple[object, Hashable], T] = OrderedDict()
        self._bytes = self._hits = self._misses = 0
        self._lock = threading.Lock()

    def get(self, owner: object, key: Hashable, make: Callable[[], T]) -> T:
        """The value of ``key`` among those of ``owner``; ``make`` makes it, perhaps in two threads at a time."""
        whole = (owner, key)
        with self._lock:
            if whole in self._values:
                self._values.move_to_end(whole)
                self._hits += 1
                return self._values[whole]
            self._misses += 1
        value = make()
        with self._lock:
            if whole not in self._values:
                self._values[whole] = value
                self._bytes += self._size(value)
            while self._bytes > self.max_bytes and len(self._values) > 1:
                self._bytes -= self._size(self._values.popitem(last=False)[1])
        return value

    def forget(self, owner: object) -> None:
        """Drop all that is an owner's."""
        with self._lock:
            for whole in [whole for whole in self._values if whole[0] is owner]:
                self._bytes -= self._size(self._values.pop(whole))

    @property
    def counts(self) -> CacheCounts:
        """Until now."""
        with self._lock:
            return CacheCounts(self._hits, self._misses, self._bytes)


@dataclass(eq=False)
class _Entry(Generic[T]):
    value: T
    version: object
    bytes: int
    checked: float = -math.inf  # when its bundle was last looked at
    users: int = 0


class AvatarCache(Generic[T]):
    """Avatars by id: loaded on first use, replaced when their bundle changes, least recently used out first.

    Any thread may call anything. A bundle that can't be read is refused each time it is asked for, until it is
    mended; where an older version is loaded, that one is served on.

    Args:
        root: the folder of the bundles.
        load: reads one avatar; raises UnknownAvatarError or BundleError.
        size: the bytes that a loaded avatar takes.
        max_bytes: of all together; exceeded only by avatars that are in use and by a single one above it.
        dropped: is told of every avatar that has left the cache and is no longer in use.
    """

    def __init__(
        self,
        root: Path,
        load: Callable[[Path, str], T],
        size: Callable[[T], int],
        max_bytes: int,
        dropped: Callable[[T], None] = lambda _: None,
    ) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self._load = load
        self._size = size
        self._dropped = dropped
        self._entries: OrderedDict[str, _Entry[T]] = OrderedDict()
        self._left: list[_Entry[T]] = []  # the cache, but not the hands of their users yet
        self._hits = self._misses = 0
        self._lock = threading.Lock()  # of the entries, held for moments
        # of one avatar each, as long as somebody has to do with it: while it is read nobody else reads it, and those
        # who want another one need not wait
        self._loading: weakref.WeakValueDictionary[str, threading.Lock] = weakref.WeakValueDictionary()

    @contextlib.contextmanager
    def use(self, avatar_id: str, *, strict: bool = False) -> Iterator[T]:
        """The avatar, which stays loaded until the block ends.

        Args:
            avatar_id: which.
            strict: look at the disk now, and raise if the bundle there is broken even where an older one is loaded.

        Raises:
            UnknownAvatarError: there is none.
            BundleError: its bundle can't be read.
        """
        entry = None if strict else self._acquire(avatar_id, CHECK_SECONDS)
        if entry is None:
            entry = self._refresh(avatar_id, strict)
        with self._held(entry) as value:
            yield value

    def use_at_once(self, avatar_id: str) -> contextlib.AbstractContextManager[T] | None:
        """As `use`, for those who can't wait: None where the disk would have to be looked at."""
        entry = self._acquire(avatar_id, CHECK_SECONDS)
        return None if entry is None else self._held(entry)

    def drop(self, avatar_id: str) -> bool:
        """Forget an avatar; whether it was loaded. Who uses it now keeps it to the end."""
        with self._turn(avatar_id):
            return self._drop(avatar_id)

    def ids(self) -> list[str]:
        """The loaded ones, least recently used first."""
        with self._lock:
            return list(self._entries)

    @property
    def counts(self) -> CacheCounts:
        """Until now; a miss is a bundle that was read."""
        with self._lock:
            return CacheCounts(self._hits, self._misses, sum(entry.bytes for entry in self._entries.values()))

    @contextlib.contextmanager
    def _held(self, entry: _Entry[T]) -> Iterator[T]:
        """What an entry holds, which was acquired, until the block ends."""
        try:
            yield entry.value
        finally:
            self._release(entry)

    def _turn(self, avatar_id: str) -> threading.Lock:
        with self._lock:
            return self._loading.setdefault(avatar_id, threading.Lock())

    def _acquire(self, avatar_id: str, max_age: float) -> _Entry[T] | None:
        """A loaded avatar, with one user more, if its bundle was looked at in the last ``max_age`` seconds."""
        with self._lock:
            entry = self._entries.get(avatar_id)
            if entry is None or time.monotonic() - entry.checked > max_age:
                return None
            self._entries.move_to_end(avatar_id)
            entry.users += 1
            self._hits += 1
            return entry

    def _release(self, entry: _Entry[T]) -> None:
        with self._lock:
            entry.users -= 1
        self._let_go()

    def _refresh(self, avatar_id: str, strict: bool) -> _Entry[T]:
        with self._turn(avatar_id):
            if not strict and (entry := self._acquire(avatar_id, CHECK_SECONDS)) is not None:
                return entry  # another thread was faster
            old = self._acquire(avatar_id, math.inf)  # so that nobody evicts it meanwhile
            try:
                new = self._newest(avatar_id, old, strict)
                with self._lock:
                    new.checked = time.monotonic()
                    new.users += 1
                    self._entries[avatar_id] = new
                    self._entries.move_to_end(avatar_id)
                    if old is not None and old is not new:
                        self._left.append(old)
            except bundle.UnknownAvatarError:
                self._drop(avatar_id)
                raise
            finally:
                if old is not None:
                    self._release(old)
        self._let_go()
        return new

    def _newest(self, avatar_id: str, old: _Entry[T] | None, strict: bool) -> _Entry[T]:
        """The version on disk: ``old`` if that is it, or if that one is broken and need not be told."""
        try:
            version = self._version(avatar_id, patient=old is not None)
            if old is not None and old.version == version:
                return old
            with self._lock:
                self._misses += 1
            value = self._load(self.root, avatar_id)
        except bundle.BundleError as error:
            if old is None or strict:
                raise
            _log.warning("the loaded version is served on, since %s", error)
            return old
        return _Entry(value, version, self._size(value))

    def _version(self, avatar_id: str, patient: bool) -> object:
        try:
            return bundle.version(self.root, avatar_id)
        except bundle.UnknownAvatarError:
            if not patient:
                raise
            time.sleep(0.01)  # a writer may be between moving the old bundle away and the new one in
            return bundle.version(self.root, avatar_id)

    def _drop(self, avatar_id: str) -> bool:
        with self._lock:
            entry = self._entries.pop(avatar_id, None)
            if entry is not None:
                self._left.append(entry)
        self._let_go()
        return entry is not None

    def _let_go(self) -> None:
        """Evict what is above the budget, and part with what has left and has no user any more."""
        with self._lock:
            excess = sum(entry.bytes for entry in self._entries.values()) - self.max_bytes
            for avatar_id in list(self._entries)[:-1]:  # the latest stays, whatever its size
                entry = self._entries[avatar_id]
                if excess <= 0:
                    break
                if entry.users == 0:
                    self._left.append(self._entries.pop(avatar_id))
                    excess -= entry.bytes
            unused = [entry for entry in self._left if entry.users == 0]
            self._left = [entry for entry in self._left if entry.users > 0]
        for entry in unused:
            self._dropped(entry.value)
