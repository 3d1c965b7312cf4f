"""The extra ``media``: sound out of any file or a microphone, MP4 files in. PyAV and sounddevice are imported late."""

from __future__ import annotations

import itertools
import os
import queue
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, BinaryIO, Self

from ._audio import Pcm, Samples, to_mono
from ._exceptions import MediaError, MissingExtraError
from ._frame import Frame

AAC_RATE = 48_000  # Hz, that everything plays
X264 = {"preset": "veryfast", "crf": "18"}
SD_MATRIX = 5  # ITU-R BT.601 (625 lines), which JPEG uses too
SRGB_PRIMARIES, SRGB_TRANSFER = 1, 13
LIMITED_RANGE = 1


@dataclass(frozen=True)
class Recording:
    """Sound that can be read once."""

    sample_rate: int  # Hz
    seconds: float | None  # where the file says so
    packets: Iterator[Samples]  # [T] mono, in [-1, 1]


def read_audio(source: str | Path | BinaryIO) -> Recording:
    """The sound of any audio or video file that FFmpeg reads, mixed down to mono, at its own sample rate.

    Raises:
        MediaError: the file is missing, no media file, or has no sound; while iterating: it is damaged.
        MissingExtraError: PyAV is not installed.
    """
    av = _import("av", "reading media files")
    name = getattr(source, "name", source if isinstance(source, (str, Path)) else "the input")
    try:
        container = av.open(source if hasattr(source, "read") else str(source))
    except OSError as error:  # PyAV's errors for files are OSErrors too
        raise MediaError(f"{name} can't be read: {error.strerror or error}") from error
    except (av.FFmpegError, ValueError) as error:
        raise MediaError(f"{name} is no audio or video file: {error}") from error
    if not container.streams.audio:
        container.close()
        raise MediaError(f"{name} has no sound")
    stream = container.streams.audio[0]
    seconds = float(stream.duration * stream.time_base) if stream.duration else None
    return Recording(stream.sample_rate, seconds, _decode(av, container, stream, name))


def _decode(av: ModuleType, container: Any, stream: Any, name: object) -> Iterator[Samples]:
    # mixed down by `to_mono`: FFmpeg's own mix of floats is louder than either channel, and clips
    floats = av.AudioResampler(format="fltp")
    with container:
        try:
            for frame in itertools.chain(container.decode(stream), [None]):
                for planes in floats.resample(frame):
                    yield to_mono(planes.to_ndarray().T)
        except av.FFmpegError as error:
            raise MediaError(f"{name} is damaged: {error}") from error


def microphone(
    sample_rate: int = 48_000,  # Hz
    packet_seconds: float = 0.02,
) -> Iterator[Samples]:  # [T] mono
    """Packets from the default microphone, until the iterator is closed.

    Raises:
        MediaError: there is no microphone, it refuses the sample rate, or the PortAudio library is missing.
        MissingExtraError: sounddevice is not installed.
    """
    try:
        sounddevice = _import("sounddevice", "the microphone")
    except OSError as error:
        raise MediaError("the microphone needs the library PortAudio (Debian, Ubuntu: libportaudio2)") from error
    packets: queue.SimpleQueue[Samples] = queue.SimpleQueue()

    def heard(block: Samples, count: int, time: object, status: object) -> None:
        packets.put(block[:, 0].copy())

    try:
        with sounddevice.InputStream(
            sample_rate, round(sample_rate * packet_seconds), channels=1, dtype="float32", callback=heard
        ):
            while True:
                yield packets.get()
    except sounddevice.PortAudioError as error:
        raise MediaError(f"the microphone can't be opened: {error}") from error


class Mp4Writer:
    """Frames and their sound into an MP4 that plays everywhere: H.264 in yuv420p, AAC, index in front.

    A context manager. The file appears when the block ends without an error, complete; else nothing is left behind.

    Args:
        path: of the file, which is replaced if it exists.
        sample_rate: of the sound, Hz.
        fps: frames a second.

    Raises:
        MissingExtraError: PyAV is not installed.
        MediaError: the folder can't be written to; on leaving, that there was no frame.
    """

    def __init__(self, path: str | Path, *, sample_rate: int, fps: int = 25) -> None:
        self._av = _import("av", "writing MP4")
        self._path = Path(path)
        self._part = self._path.with_name(f".{self._path.name}.{os.getpid()}.part")
        self._fps = fps
        self._sample_rate = sample_rate
        self._samples = 0  # written so far
        self._early: list[Samples] = []  # sound that came before the first frame, which says how large the picture is
        self._video: Any = None

    def __enter__(self) -> Self:
        try:
            self._part.touch()  # PyAV opens it much later
            self._container = self._av.open(str(self._part), "w", format="mp4", options={"movflags": "+faststart"})
        except OSError as error:
            raise MediaError(f"{self._path} can't be written: {error.strerror}") from error
        self._audio = self._container.add_stream("aac", rate=AAC_RATE, layout="mono", bit_rate=96_000)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            if self._container is not None:
                self._container.close()
            self._part.unlink(missing_ok=True)

    def write(self, frame: Frame) -> None:
        """The next frame.

        Raises:
            ServerError: it is no picture.
        """
        if frame.format == "jpeg":
            picture = frame._decoded()
        else:
            picture = self._av.VideoFrame.from_ndarray(frame.to_array(), "rgb24")
        if self._video is None:
            self._start(picture.width, picture.height)
        picture = picture.reformat(format="yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG")
        picture.pts, picture.time_base = frame.index, Fraction(1, self._fps)
        self._container.mux(self._video.encode(picture))

    def write_audio(self, packet: Pcm) -> None:
        """The next sound. Give it roughly in step with the frames."""
        samples = to_mono(packet)
        if self._video is None:
            self._early.append(samples)
        elif samples.size:
            frame = self._av.AudioFrame.from_ndarray(samples[None], "flt", "mono")
            frame.sample_rate, frame.pts = self._sample_rate, self._samples
            frame.time_base = Fraction(1, self._sample_rate)
            self._samples += samples.size
            self._container.mux(self._audio.encode(frame))

    def _start(self, width: int, height: int) -> None:
        self._video = self._container.add_stream("libx264", rate=self._fps, options=X264)
        self._video.width, self._video.height, self._video.pix_fmt = width, height, "yuv420p"
        context = self._video.codec_context
        context.colorspace, context.color_range = SD_MATRIX, LIMITED_RANGE
        context.color_primaries, context.color_trc = SRGB_PRIMARIES, SRGB_TRANSFER
        early, self._early = self._early, []
        for samples in early:
            self.write_audio(samples)

    def _finish(self) -> None:
        if self._video is None:
            raise MediaError(f"{self._path} was not written: there are no frames")
        for stream in (self._video, self._audio):
            self._container.mux(stream.encode(None))
        container, self._container = self._container, None
        container.close()
        os.replace(self._part, self._path)


def _import(package: str, purpose: str) -> ModuleType:
    try:
        return __import__(package)
    except ImportError:
        raise MissingExtraError(purpose, package) from None
