"""The embedded server that benchmarks run against: real models, free ports, the project's avatars."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from talksplat import avatar as bundle
from talksplat.server import Ports, Server, ServerError


@contextlib.contextmanager
def serving(avatar: str | None = None) -> Iterator[Server]:
    """A server that has ``avatar``, or any.

    Raises:
        ServerError: it can't be started, or has no such avatar.
    """
    with Server(ports=Ports.free()) as server:
        found = bundle.available(server.avatars)
        if not found or avatar not in (None, *found):
            raise ServerError(f"There is no avatar {avatar or ''} in {server.avatars}: fit one or copy a bundle there.")
        yield server
