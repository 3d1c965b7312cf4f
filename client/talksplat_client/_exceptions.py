"""What can go wrong, as types a caller can catch. gRPC's own exceptions never reach the caller."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._state import StreamState


_ENSEMBLE = re.compile(r"^in ensemble '\w+', ")  # which step failed says nothing to a caller
_UNTRUSTED = re.compile(r"CERTIFICATE_VERIFY_FAILED: ([^:]+)")


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


class OverloadedError(TalksplatError):
    """The server is full, or the tenant has as many streams or requests as it may have.

    A new stream is refused at once; one that already has frames asks again for `Timeout.recovery`.

    Attributes:
        retry_after: seconds after which it is worth asking again; None where the server does not say.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UnauthenticatedError(TalksplatError):
    """The API key is missing or unknown."""


class PermissionDeniedError(TalksplatError):
    """The API key is known, but may not do this."""


class TlsError(TalksplatError):
    """The connection can't be secured: the certificate is not trusted or for another name, or there is no TLS."""


class ChunkExpiredError(TalksplatError):
    """A chunk was too old to be rendered; a stream skips it, and this never leaves the package."""


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
    """A package of an extra is needed and missing; the message says how to install it."""

    def __init__(self, what: str, package: str, extra: str = "media") -> None:
        super().__init__(f"{what} needs the package {package}: pip install 'talksplat-client[{extra}]'")


def from_status(
    code: str,  # name of the gRPC status
    details: str,
    url: str,  # of the replica that was asked
    retry_after: float | None = None,  # seconds
) -> TalksplatError:
    """The error for a gRPC status."""
    details = _ENSEMBLE.sub("", details)
    if "Stub process" in details:  # of any code; the server's supervisor puts it right in seconds
        return ServerUnavailableError(f"a part of the server at {url} has died: {details}")
    if "shared memory pool" in details:  # its /dev/shm is full: this chunk may fit at another replica, or later
        return ServerUnavailableError(f"the server at {url} has no memory left: {details}")
    if code == "UNAVAILABLE" and (reason := _tls_failure(details)):
        return TlsError(f"no secure connection to {url}: {reason}")
    if code == "UNAVAILABLE" and "http1.x server" in details:  # so does nginx refuse who comes without TLS
        return ServerUnavailableError(f"no talksplat server answers at {url} without TLS: see --tls, --ca, Tls()")
    if code == "UNAVAILABLE":
        return ServerUnavailableError(f"no talksplat server answers at {url}: {details.rpartition(': ')[2]}")
    if code == "RESOURCE_EXHAUSTED":
        return OverloadedError(f"the server at {url} has no room: {details}", retry_after)
    if code == "UNAUTHENTICATED":
        return UnauthenticatedError(f"the server at {url} does not know the API key: {details}")
    if code == "PERMISSION_DENIED":
        return PermissionDeniedError(f"the server at {url} does not allow this: {details}")
    if code == "CANCELLED" and "beyond its deadline" in details:
        return ChunkExpiredError(details)
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


def _tls_failure(details: str) -> str | None:
    """What gRPC has against the other side's certificate, if that is why it did not connect."""
    if found := _UNTRUSTED.search(details):
        return f"its certificate is not trusted ({found[1]})"
    if "Hostname Verification Check failed" in details:
        return "its certificate is for another name"
    if "WRONG_VERSION_NUMBER" in details:
        return "it does not speak TLS"
    return None
