"""Value objects of a client's behaviour."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, fields
from pathlib import Path

from ._exceptions import InvalidRequestError

DEFAULT_URL = "127.0.0.1:8001"  # Triton's gRPC port on this machine


@dataclass(frozen=True)
class Timeout:
    """How long to wait, in seconds.

    A server that has never answered is given up at once; one that was there is looked for during ``recovery``.
    """

    connect: float = 2.0  # for the first answer
    chunk: float = 5.0  # for one chunk of frames, each attempt
    utterance: float = 60.0  # for a transcript, a whole utterance or a preload, each attempt
    recovery: float = 15.0  # from a request's first failure until it is given up

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0 and not (field.name == "recovery" and value == 0):
                raise ValueError(f"Timeout.{field.name} is {value!r} s, expected more than 0")


@dataclass(frozen=True)
class Limits:
    """How much may be under way at once."""

    in_flight: int = 3  # chunks of one stream that are requested and not yet taken

    def __post_init__(self) -> None:
        if self.in_flight < 1:
            raise ValueError(f"Limits.in_flight is {self.in_flight!r}, expected 1 or more")


@dataclass(frozen=True)
class Retry:
    """Pauses between attempts, in seconds: ``first``, then ``factor`` times longer each, at most ``longest``."""

    first: float = 0.05
    factor: float = 2.0
    longest: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.first <= self.longest:
            raise ValueError(
                f"Retry.first is {self.first!r} s, expected more than 0 and at most longest={self.longest!r}"
            )
        if not self.factor >= 1:
            raise ValueError(f"Retry.factor is {self.factor!r}, expected 1 or more")


@dataclass(frozen=True)
class Tls:
    """Encryption, and whose certificates are believed.

    Args:
        ca: PEM file with the certificate of an authority, or the server's own where that is self-signed; None: the
            public authorities that gRPC brings along.
    """

    ca: Path | str | None = None

    def roots(self) -> bytes | None:
        """The certificates of `ca`.

        Raises:
            InvalidRequestError: the file can't be read or holds no certificate.
        """
        if self.ca is None:
            return None
        try:
            pem = Path(self.ca).read_bytes()
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode())
        except OSError as error:  # ssl's errors are OSErrors too
            reason = (
                "holds no PEM certificate" if isinstance(error, ssl.SSLError) else f"can't be read: {error.strerror}"
            )
            raise InvalidRequestError(f"the CA file {self.ca} {reason}") from error
        except ValueError as error:
            raise InvalidRequestError(f"the CA file {self.ca} holds no PEM certificate") from error
        return pem
