"""Who may use what: tenants, the hashes of their API keys, their avatars and their limits.

All of it is one TOML file, which holds no key::

    streams = 12  # at a time, of the whole machine

    [tenants.acme]
    keys = ["<SHA-256 of an API key, 64 hexadecimal digits>"]
    avatars = ["ava"]  # or ["*"]: all of them
    streams = 4
    requests_per_second = 60

The edge tells tenants by their keys and holds them to their limits; the models, which the edge tells the tenant's name
in the header `HEADER`, let each have its own avatars only. A key is 256 random bits, so that a plain hash of it is
enough: nothing shorter than trying them all finds it.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import os
import re
import secrets
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from talksplat.avatar import check_id

HEADER = "x-talksplat-tenant"
FILE_VARIABLE = "TALKSPLAT_TENANTS"  # path of the file, for the models; without it everybody may do everything
CANARY_VARIABLE = "TALKSPLAT_CANARY"  # name that the server's own canaries use, new at each start
EVERY_AVATAR = "*"

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_HASH = re.compile(r"[0-9a-f]{64}")
_LOOK_SECONDS = 1.0  # between two looks at the file

_log = logging.getLogger(__name__)


class TenantsError(ValueError):
    """A tenants file can't be used; the message says where it is wrong and what was expected."""


@dataclass(frozen=True)
class Tenant:
    """One tenant."""

    name: str
    keys: frozenset[str]  # SHA-256 of its API keys, hexadecimal
    avatars: frozenset[str]  # ids, or "*" for all
    streams: int  # at a time
    requests_per_second: float

    def may_use(self, avatar_id: str) -> bool:
        """Whether an avatar of this id is the tenant's, should there be one."""
        return EVERY_AVATAR in self.avatars or avatar_id in self.avatars


@dataclass(frozen=True)
class Tenants:
    """All tenants of a server.

    ``canary`` is the name that the server's own canaries use: it may use every avatar, has no key, and is no tenant's.
    """

    streams: int  # at a time, of all tenants together
    by_name: Mapping[str, Tenant]
    canary: str | None = field(default=None, repr=False)

    @classmethod
    def read(cls, path: Path, *, canary: str | None = None) -> Tenants:
        """Read the file ``path``.

        Raises:
            TenantsError: it is missing, no TOML, or says something that can't be meant.
        """
        try:
            return cls.parse(path.read_text(), canary=canary)
        except (OSError, UnicodeDecodeError) as error:
            raise TenantsError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from error
        except TenantsError as error:
            raise TenantsError(f"{path}: {error}") from error

    @classmethod
    def parse(cls, text: str, *, canary: str | None = None) -> Tenants:
        """Read the file's text; raises TenantsError as `read` does."""
        try:
            document = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise TenantsError(f"this is no TOML: {error}") from error
        _expect_fields(document, {"streams", "tenants"}, "the file")
        tables = document["tenants"]
        if not isinstance(tables, dict):
            raise TenantsError(f"tenants is {tables!r}, expected a table for each tenant, such as [tenants.acme]")
        tenants = {name: _tenant(name, table) for name, table in tables.items()}
        owners: dict[str, str] = {}
        for tenant in tenants.values():
            for each in tenant.keys:
                if (owner := owners.setdefault(each, tenant.name)) != tenant.name:
                    raise TenantsError(f"{owner} and {tenant.name} have the same key, {each[:8]}...")
        return cls(_whole(document, "streams", "the file"), tenants, canary)

    def of_key(self, key: str) -> Tenant | None:
        """Whose API key this is. Every known hash is compared, in constant time, whether or not one was found."""
        presented, owner = hash_of(key), None
        for tenant in self.by_name.values():
            for known in tenant.keys:
                if hmac.compare_digest(known, presented):
                    owner = tenant
        return owner

    def knows(self, tenant: str) -> bool:
        """Whether there is a tenant of this name; the canary is none, but is let in."""
        return tenant in self.by_name or self._is_canary(tenant)

    def may_use(self, tenant: str, avatar_id: str) -> bool:
        """Whether an avatar of this id is the tenant's; nothing is a tenant's that there is not."""
        found = self.by_name.get(tenant)
        return self._is_canary(tenant) if found is None else found.may_use(avatar_id)

    def others(self, tenant: str, avatar_id: str) -> list[str]:
        """The names of the other tenants that may use an avatar."""
        return sorted(each.name for each in self.by_name.values() if each.name != tenant and each.may_use(avatar_id))

    def _is_canary(self, tenant: str) -> bool:
        return self.canary is not None and hmac.compare_digest(tenant.encode(), self.canary.encode())


class TenantsFile:
    """The tenants of a file as it is now: a change is seen within a second, a broken one is logged and not followed.

    Raises:
        TenantsError: the file is broken from the start.
    """

    def __init__(self, path: Path, *, canary: str | None = None) -> None:
        self._path, self._canary = path, canary
        self._seen = _stamp(path)
        self._tenants = Tenants.read(path, canary=canary)
        self._next_look = time.monotonic() + _LOOK_SECONDS

    @classmethod
    def of_environment(cls) -> TenantsFile | None:
        """The file that the environment names; None: everybody may do everything."""
        path = os.environ.get(FILE_VARIABLE)
        return cls(Path(path), canary=os.environ.get(CANARY_VARIABLE)) if path else None

    @property
    def tenants(self) -> Tenants:
        """The last that the file held and that were sound."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _LOOK_SECONDS
            if (stamp := _stamp(self._path)) != self._seen:
                self._seen = stamp
                try:
                    self._tenants = Tenants.read(self._path, canary=self._canary)
                except TenantsError as error:
                    _log.error("The tenants stay as they were: %s.", error)
        return self._tenants


def key() -> tuple[str, str]:
    """A new API key, and its hash for the file."""
    made = secrets.token_urlsafe(32)
    return made, hash_of(made)


def hash_of(key: str) -> str:
    """What of a key may be written down: its SHA-256, hexadecimal."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def check_name(name: str) -> None:
    """Raise TenantsError if ``name`` can't be a tenant's."""
    if not _NAME.fullmatch(name):
        raise TenantsError(
            f"{name!r} is no tenant's name: expected 1 to 63 of a-z, 0-9, '-', '_', beginning with a letter or digit"
        )


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _tenant(name: str, table: Any) -> Tenant:
    where = f"tenants.{name}"
    check_name(name)
    if not isinstance(table, dict):
        raise TenantsError(f"{where} is {table!r}, expected a table")
    _expect_fields(table, {"keys", "avatars", "streams", "requests_per_second"}, where)
    keys, avatars = _strings(table, "keys", where), _strings(table, "avatars", where)
    for each in keys:
        if not _HASH.fullmatch(each):  # which is not shown: it may be the key itself
            raise TenantsError(f"{where}.keys has one that is no SHA-256: expected 64 of 0-9 and a-f, not the key")
    for avatar_id in avatars - {EVERY_AVATAR}:
        try:
            check_id(avatar_id)
        except ValueError as error:
            raise TenantsError(f"{where}.avatars: {error}") from error
    rate = table["requests_per_second"]
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise TenantsError(f"{where}.requests_per_second is {rate!r}, expected a number above 0")
    return Tenant(name, keys, avatars, _whole(table, "streams", where), float(rate))


def _expect_fields(table: Mapping[str, Any], expected: set[str], where: str) -> None:
    if unknown := sorted(table.keys() - expected):
        raise TenantsError(f"{where} has the unknown {', '.join(unknown)}; expected {', '.join(sorted(expected))}")
    if missing := sorted(expected - table.keys()):
        raise TenantsError(f"{where} lacks {', '.join(missing)}")


def _strings(table: Mapping[str, Any], name: str, where: str) -> frozenset[str]:
    values = table[name]
    if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
        raise TenantsError(f"{where}.{name} is no list of strings")
    if len(set(values)) < len(values):
        raise TenantsError(f"{where}.{name} has the same entry twice")
    return frozenset(values)


def _whole(table: Mapping[str, Any], name: str, where: str) -> int:
    value = table[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise TenantsError(f"{name} of {where} is {value!r}, expected a whole number of at least 1")
    return value
