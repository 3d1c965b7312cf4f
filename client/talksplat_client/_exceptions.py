"""What can go wrong, as types a caller can catch. gRPC's own exceptions never reach the caller."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._state import StreamState


_ENSEMBLE = re.compile(r"^in ensemble '\w+', ")  # which step failed says nothing to a caller


class TalksplatError(Exception):
    """Base of all errors of this package.

    Attributes:
        state: where a stream was when the error ended it, for `Client.resume`; None outside streams.
    """

    state: StreamState | None = None
    retryable = False  # the same request may succeed on another replica, or a little later


class ServerUnavailableError(TalksplatError):
    """Nothing answers at the given addresses, or what answered is gone."""

    retryable = True


class DeadlineExceededError(TalksplatError):
    """A server is there, but did not answer in time."""

    retryable = True


class ServerError(TalksplatError):
    """The server failed at a sound request, or is not a talksplat server.

    Attributes:
        code: name of the gRPC status, such as ``INTERNAL``.
    """

    def __init__(self, message: str, code: str = "UNKNOWN") -> None:
        super().__init__(message)
        self.code = code


class UnknownAvatarError(TalksplatError):
    """The server has no avatar of that id."""


class InvalidRequestError(TalksplatError, ValueError):
    """An argument is out of range; raised here, or by the server where only it can know."""


class InvalidAudioError(TalksplatError, ValueError):
    """The audio is not what was announced: NaN, infinity, an unexpected dtype or shape."""


class InvalidStateError(TalksplatError, ValueError):
    """The bytes are no `StreamState`, are damaged or too new, or the state does not fit this server."""


class MediaError(TalksplatError):
    """A file or a sound device can't be read or written."""


class MissingExtraError(TalksplatError, ImportError):
    """A package of the extra ``media`` is needed and missing; the message says how to install it."""

    def __init__(self, what: str, package: str) -> None:
        super().__init__(f"{what} needs the package {package}: pip install 'talksplat-client[media]'")


def from_status(code: str, details: str, url: str) -> TalksplatError:
    """The error for a gRPC status: ``code`` is the status's name, ``url`` the replica that was asked."""
    details = _ENSEMBLE.sub("", details)
    if "Stub process" in details:  # of any code; the server's supervisor puts it right in seconds
        return ServerUnavailableError(f"a part of the server at {url} has died: {details}")
    if code == "UNAVAILABLE":
        return ServerUnavailableError(f"no talksplat server answers at {url}: {details.rpartition(': ')[2]}")
    if code == "CANCELLED":  # by the other side: a server that stops
        return ServerUnavailableError(f"the server at {url} dropped the request: {details}")
    if code == "DEADLINE_EXCEEDED":
        return DeadlineExceededError(f"the server at {url} did not answer in time")
    if code == "NOT_FOUND" and "unknown model" in details:
        return ServerError(f"{url} is no talksplat server: {details}", code)
    if code == "NOT_FOUND":
        return UnknownAvatarError(details)
    if code == "INVALID_ARGUMENT":
        return InvalidRequestError(details)
    return ServerError(f"the server at {url} failed ({code}): {details}", code)
