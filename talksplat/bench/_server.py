"""The embedded server that benchmarks run against: real models, free ports, the project's avatars."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from talksplat import avatar as bundle
from talksplat.server import ROOT, Ports, Server, ServerError


@contextlib.contextmanager
def serving(avatar: str | None = None, avatars: Path = ROOT / "avatars") -> Iterator[Server]:
    """A server of the bundles in ``avatars`` that has ``avatar``, or any.

    Raises:
        ServerError: it can't be started, or has no such avatar.
    """
    with Server(avatars=avatars, ports=Ports.free()) as server:
        found = bundle.available(server.avatars)
        if not found or avatar not in (None, *found):
            raise ServerError(f"There is no avatar {avatar or ''} in {server.avatars}: fit one or copy a bundle there.")
        yield server
