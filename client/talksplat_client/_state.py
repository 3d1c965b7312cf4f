"""Where a stream is: all that another process needs to go on with it on any server."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import struct
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self, get_args

import numpy as np

from ._audio import Samples
from ._clock import Clock
from ._exceptions import InvalidRequestError, InvalidStateError

Format = Literal["jpeg", "raw"]

MAGIC = b"talksplat-stream"
VERSION = 3  # 1 had neither deadline nor id, 2 did not listen
_HEAD = struct.Struct("<16sHI")  # magic, version, bytes of the JSON that follows; then the samples, then SHA-256
_LISTENING = (("listening", 0, 1), ("listening_before", 0, 100), ("listening_after", 0, 100))  # least, most
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_DIGEST = hashlib.sha256().digest_size


def new_id() -> str:
    """A stream's id, which nobody can guess."""
    return secrets.token_urlsafe(12)


@dataclass(frozen=True, eq=False)
class StreamState:
    """A stream between two frames. The server keeps nothing, so this is the whole of it.

    The audio that was taken but not shown yet is inside (with the context that its frames need): go on with the
    audio that followed it. `position` says where that is in the source.

    Raises:
        InvalidRequestError: a value is out of range.
    """

    avatar: str
    clock: Clock  # of the server that the stream began on
    sample_rate: int  # of the stream's audio, Hz
    seed: int = 0  # of blinks and plates
    size: int | None = None  # height and width of the frames in pixels; None: the avatar's own
    format: Format = "jpeg"
    quality: int = 85  # of JPEG, 1 to 100
    model: str = "animate"  # of the server, that animates the avatar: `Preloaded.model`
    deadline: float | None = None  # seconds after which a chunk that is not being rendered is dropped; None: never
    id: str = field(default_factory=new_id)  # by which the edge counts streams; a resumed one keeps its place
    listening: float = 0.0  # how much the face is to listen, 0 to 1; it gets there within two chunks
    listening_before: int = 0  # how much it did at the start of the chunk that `frame` is in, percent
    listening_after: int = 0  # and does at its end, if `frame` is not the chunk's first
    frame: int = 0  # the next one
    start: int = 0  # position of `samples` in the source
    samples: Samples = field(default_factory=lambda: np.zeros(0, np.float32), repr=False)  # [T] mono, `sample_rate`

    def __post_init__(self) -> None:
        if not self.avatar:
            raise InvalidRequestError("the avatar's id is empty")
        if self.format not in get_args(Format):
            raise InvalidRequestError(f"the format is {self.format!r}, expected one of {', '.join(get_args(Format))}")
        for name, low, high in (("quality", 1, 100), ("seed", -(2**63), 2**63 - 1), ("size", 8, 4096), *_LISTENING):
            value = getattr(self, name)
            if not (value is None and name == "size") and not low <= value <= high:
                raise InvalidRequestError(f"{name} is {value!r}, expected {low} to {high}")
        if self.deadline is not None and not 0.001 <= self.deadline <= 3600:
            raise InvalidRequestError(f"the deadline is {self.deadline!r} s, expected 0.001 to 3600")
        if not _ID.fullmatch(self.id):
            raise InvalidRequestError(f"the stream's id is {self.id!r}, expected up to 64 of A-Z a-z 0-9 _ -")

    @property
    def position(self) -> float:
        """Seconds of the source that were taken: go on with what comes after them."""
        return (self.start + self.samples.size) / self.sample_rate

    def cut(self) -> Self:
        """The same without audio that was taken and not shown: what is given next begins at the next frame."""
        count = -(-self.frame * self.sample_rate // self.clock.fps) - self.start
        samples = self.samples[:count]
        return replace(self, samples=np.pad(samples, (0, count - samples.size)))

    def to_bytes(self) -> bytes:
        """About 90 kB, for `from_bytes`."""
        values = asdict(self)
        del values["samples"]
        header = json.dumps(values).encode()
        body = _HEAD.pack(MAGIC, VERSION, len(header)) + header + self.samples.astype("<f4").tobytes()
        return body + hashlib.sha256(body).digest()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Undo `to_bytes`.

        Raises:
            InvalidStateError: the bytes are foreign, damaged, or of a newer version.
        """
        if len(data) < _HEAD.size + _DIGEST or not data.startswith(MAGIC):
            raise InvalidStateError("these bytes are no stream state of talksplat")
        _, version, length = _HEAD.unpack_from(data)
        if version > VERSION:
            raise InvalidStateError(
                f"the stream state has version {version}, this client reads up to {VERSION}: update talksplat-client"
            )
        body, digest = data[:-_DIGEST], data[-_DIGEST:]
        if hashlib.sha256(body).digest() != digest:
            raise InvalidStateError("the stream state is damaged: its checksum differs")
        try:
            values: dict[str, Any] = json.loads(body[_HEAD.size : _HEAD.size + length])
            clock = Clock(**values.pop("clock"))
            samples = np.frombuffer(body, "<f4", offset=_HEAD.size + length).astype(np.float32)
            return cls(**values, clock=clock, samples=samples)
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidStateError(f"the stream state is malformed: {error}") from error
