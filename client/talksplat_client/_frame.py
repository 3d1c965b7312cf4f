"""What comes back: frames, utterances, and what is known of avatars and servers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ._exceptions import ServerError
from ._extras import import_package
from ._state import Format


@dataclass(frozen=True)
class Frame:
    """One picture of the talking head."""

    index: int  # from the stream's start
    pts: float  # seconds; the frame belongs to the audio from then on
    speech: float  # probability that somebody speaks
    format: Format
    data: bytes = field(repr=False)  # JPEG, or RGB bytes of a square picture, row by row

    def to_array(self) -> npt.NDArray[np.uint8]:  # [H, W, 3] RGB
        """The pixels.

        Raises:
            MissingExtraError: the frame is a JPEG and PyAV is not installed.
            ServerError: the data are no picture.
        """
        if self.format == "jpeg":
            return np.asarray(self._decoded().to_ndarray(format="rgb24"), np.uint8)
        side = math.isqrt(len(self.data) // 3)
        if side * side * 3 != len(self.data):
            raise ServerError(f"frame {self.index} has {len(self.data)} bytes, no square RGB picture")
        return np.frombuffer(self.data, np.uint8).reshape(side, side, 3)

    def _decoded(self) -> Any:  # av.VideoFrame of the JPEG, in its own YUV
        av = import_package("av", "decoding a JPEG frame")
        try:
            [picture] = av.CodecContext.create("mjpeg", "r").decode(av.Packet(self.data))
        except (av.FFmpegError, ValueError) as error:
            raise ServerError(f"frame {self.index} is no JPEG: {error}") from error
        return picture


@dataclass(frozen=True)
class Utterance:
    """Up to half a minute of speech: its text and its frames."""

    text: str
    frames: list[Frame] = field(repr=False)


@dataclass(frozen=True)
class Health:
    """One replica.

    ``ready`` means that its rasterizer has just answered; ``detail`` says in words what was found.
    """

    url: str
    ready: bool
    detail: str


@dataclass(frozen=True)
class AvatarInfo:
    """One avatar of the server."""

    id: str
    loaded: bool  # in memory: its first frame needs no reading


@dataclass(frozen=True)
class Preloaded:
    """What `preload` found."""

    avatar: str
    model: str  # that animates it, for `Client.animate`
    cached: bool  # it was loaded already
    milliseconds: float  # that the server took
    width: int  # pixels
    height: int
