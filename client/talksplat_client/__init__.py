"""Thin client of talksplat: stream speech in, get the frames of a talking head back.

    with talksplat_client.Client("127.0.0.1:8001") as client:
        for frame in client.animate(packets, avatar="ava", sample_rate=48_000):
            show(frame.data, at=frame.pts)

`AsyncClient` is its asyncio twin. Files, microphones and sample rates other than the server's need the extra
``media``: ``pip install 'talksplat-client[media]'``.
"""

from ._asyncio import AsyncClient, AsyncStream
from ._audio import Pcm
from ._blocking import Client, Stream
from ._clock import Clock
from ._config import Limits, Retry, Timeout, Tls
from ._disclosure import Credentials, Disclosure
from ._exceptions import (
    DeadlineExceededError,
    InvalidAudioError,
    InvalidRequestError,
    InvalidStateError,
    MediaError,
    MissingExtraError,
    OverloadedError,
    PermissionDeniedError,
    ServerError,
    ServerUnavailableError,
    TalksplatError,
    TlsError,
    UnauthenticatedError,
    UnknownAvatarError,
)
from ._files import Mp4Writer, Writer, file_writer
from ._frame import AvatarInfo, Frame, Health, Preloaded, Utterance
from ._media import Recording, microphone, read_audio
from ._speaking import sentences
from ._state import StreamState

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "AvatarInfo",
    "Client",
    "Clock",
    "Credentials",
    "DeadlineExceededError",
    "Disclosure",
    "Frame",
    "Health",
    "InvalidAudioError",
    "InvalidRequestError",
    "InvalidStateError",
    "Limits",
    "MediaError",
    "MissingExtraError",
    "Mp4Writer",
    "OverloadedError",
    "Pcm",
    "PermissionDeniedError",
    "Preloaded",
    "Recording",
    "Retry",
    "ServerError",
    "ServerUnavailableError",
    "Stream",
    "StreamState",
    "TalksplatError",
    "Timeout",
    "Tls",
    "TlsError",
    "UnauthenticatedError",
    "UnknownAvatarError",
    "Utterance",
    "Writer",
    "file_writer",
    "microphone",
    "read_audio",
    "sentences",
]
