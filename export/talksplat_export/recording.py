"""A recording as the fit reads it: square RGB frames and 16 kHz mono audio on the project's clock."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from talksplat import clock

Image = npt.NDArray[np.uint8]  # [H, W, 3] RGB
MAX_SIZE = 512  # pixels a side that a recording is reduced to


class RecordingError(ValueError):
    """The recording can't be used; the message says what was found and what was expected."""


@dataclass(frozen=True)
class Recording:
    """A video file with its audio, read anew at every use: nothing is held in memory but the audio.

    Frames come at `clock.FPS` whatever the file's rate (the frame shown at that instant), cut to the largest
    centred square and scaled to ``size`` x ``size`` pixels.

    Raises:
        RecordingError: on construction, when the file can't be opened or holds no video.
    """

    path: Path
    audio_path: Path | None = None  # of a separate audio file; else the video's own track
    size: int = 0  # pixels a side, a multiple of 8; 0: the video's shorter side, at most MAX_SIZE

    def __post_init__(self) -> None:
        with _open(self.path) as container:
            if not container.streams.video:
                raise RecordingError(f"{self.path} holds no video.")
            stream = container.streams.video[0]
            native = min(stream.codec_context.width, stream.codec_context.height)
        size = self.size or min(native, MAX_SIZE) // 8 * 8
        if size < 64 or size % 8:
            raise RecordingError(f"Frames of {size} pixels a side: expected a multiple of 8 from 64.")
        object.__setattr__(self, "size", size)

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Image]:
        """Yield the frames ``start`` to ``stop`` (exclusive), [size, size, 3] RGB.

        Raises:
            RecordingError: the file breaks off or holds no frame at all.
        """
        for index, frame in enumerate(self._shown()):
            if stop is not None and index >= stop:
                return
            if index >= start:
                yield self._square(frame)

    def _shown(self) -> Iterator[av.VideoFrame]:
        """The frame that is shown at every tick of the clock, as decoded."""
        index, previous, first, time = 0, None, 0.0, 0.0
        with _open(self.path) as container:
            stream = container.streams.video[0]
            stream.thread_type = "SLICE"
            try:
                for frame in container.decode(stream):
                    time = float(frame.time or 0.0)
                    first = time if previous is None else first
                    # A frame is shown until the next one begins; half a millisecond absorbs rounded time stamps.
                    while previous is not None and index / clock.FPS < time - first - 5e-4:
                        yield previous
                        index += 1
                    previous = frame
                if previous is not None:
                    lasts = 1 / float(stream.average_rate or clock.FPS)
                    while index / clock.FPS < time - first + lasts - 5e-4:
                        yield previous
                        index += 1
            except av.FFmpegError as error:
                raise RecordingError(f"{self.path} breaks off after {index} frames ({error}).") from error
        if previous is None:
            raise RecordingError(f"{self.path} holds no frame that can be decoded.")

    @cached_property
    def length(self) -> int:
        """How many frames there are."""
        return sum(1 for _ in self._shown())

    @cached_property
    def audio(self) -> npt.NDArray[np.float32]:
        """Mono samples at `clock.SAMPLE_RATE` in [-1, 1], [T].

        Raises:
            RecordingError: there is no audio.
        """
        path = self.audio_path or self.path
        with _open(path) as container:
            if not container.streams.audio:
                raise RecordingError(f"{path} holds no audio: name a file with --audio.")
            resampler = av.AudioResampler("flt", "mono", clock.SAMPLE_RATE)
            pieces = []
            with contextlib.suppress(av.EOFError):
                for frame in container.decode(container.streams.audio[0]):
                    pieces += [piece.to_ndarray()[0] for piece in resampler.resample(frame)]
                pieces += [piece.to_ndarray()[0] for piece in resampler.resample(None)]
        if not pieces:
            raise RecordingError(f"{path} holds no audio that can be decoded.")
        return np.asarray(np.concatenate(pieces), np.float32)

    @cached_property
    def sha256(self) -> str:
        """Of the video file and, where it is a separate one, of the audio file."""
        digest = hashlib.sha256(self.path.read_bytes())
        if self.audio_path is not None:
            digest.update(self.audio_path.read_bytes())
        return digest.hexdigest()

    def _square(self, frame: av.VideoFrame) -> Image:
        image: Image = np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
        if frame.rotation:
            image = np.rot90(image, round(frame.rotation / 90) % 4)
        side = min(image.shape[:2])
        top, left = ((length - side) // 2 for length in image.shape[:2])
        image = np.ascontiguousarray(image[top : top + side, left : left + side])
        if side != self.size:
            scaled = av.VideoFrame.from_ndarray(image, format="rgb24")
            scaled = scaled.reformat(self.size, self.size, interpolation="AREA")
            image = np.asarray(scaled.to_ndarray(format="rgb24"), np.uint8)
        return image


@contextlib.contextmanager
def _open(path: Path) -> Iterator[av.container.InputContainer]:
    try:
        container = av.open(str(path))
    except (OSError, ValueError) as error:  # FFmpeg's errors are both
        reason = "it does not exist" if not path.exists() else str(error)
        raise RecordingError(f"{path} can't be opened: {reason}.") from error
    with container:
        yield container
