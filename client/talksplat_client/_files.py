"""Frames and their sound into files: MP4, WebM, animated WebP, pictures. PyAV is imported late.

Each writer is a context manager with `write` for frames and `write_audio` for sound. What it writes appears when the
block ends without an error, complete; else nothing is left behind. A pipe gets what is ready at once. Frames and sound
may come from two threads.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, ClassVar, Self

import numpy as np

from ._audio import Pcm, Samples, to_mono
from ._disclosure import Disclosure, draw_label, mp4_box, require_signable, with_xmp
from ._exceptions import MediaError, TalksplatError
from ._extras import import_package
from ._frame import Frame

STDOUT = "-"
SD_MATRIX = 5  # ITU-R BT.601 (625 lines), which JPEG uses too
SRGB_PRIMARIES, SRGB_TRANSFER = 1, 13
LIMITED_RANGE, FULL_RANGE = 1, 2
FRAGMENT = 1_000_000  # microseconds of an MP4 in a pipe

_NUMBER = re.compile(r"%0?\d*d")


class Writer(ABC):
    """Frames and their sound, in step with each other, into one place.

    Args:
        path: of the file, which is replaced if it exists; ``-`` is standard output, and what is there and no file is
            a pipe.
        sample_rate: of the sound, Hz.
        fps: frames a second.
        disclosure: how it says that it shows an avatar.

    Raises:
        MissingExtraError: PyAV is not installed.
        InvalidRequestError: content credentials were asked for, and the format takes none, or who signs can't.
        MediaError: on entering, that the place can't be written to; later, that the disk is full; on leaving, that
            there was no frame.
    """

    format: ClassVar[str]
    pipes = True  # can be written from front to back

    def __init__(
        self,
        path: str | Path,
        *,
        sample_rate: int,
        fps: int = 25,
        disclosure: Disclosure = Disclosure(),  # noqa: B008 (frozen)
    ) -> None:
        self._path = Path(path)
        self._piped = str(path) == STDOUT or (self._path.exists() and not (self._path.is_file() or self._path.is_dir()))
        self._fps, self._sample_rate = fps, sample_rate
        self._disclosure = disclosure
        self._part = self._path.with_name(f".{self._path.name}.{os.getpid()}.part")
        self._count = 0
        self._lock = threading.RLock()  # PyAV kills the process where two threads use one container
        if self._piped and not self.pipes:
            raise MediaError(f"{path} is a pipe, and {self.format} files can't be written into one: name a file")
        if disclosure.credentials is not None:
            if self._piped:
                raise MediaError(f"{path} is a pipe, and signing needs a whole file: name one")
            require_signable(self.format)
            disclosure.credentials.check()

    def __enter__(self) -> Self:
        try:
            with self._refusals():
                self._open()
        except BaseException:
            with contextlib.suppress(OSError):  # the place itself may be what is wrong
                self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            try:
                if kind is None:
                    if not self._count:
                        raise MediaError(f"{self._path} was not written: there are no frames")
                    with self._refusals():
                        self._finish()
            finally:
                self._discard()

    def write(self, frame: Frame) -> None:
        """The next frame.

        Raises:
            ServerError: it is no picture.
        """
        with self._lock, self._refusals():
            self._write(frame)
            self._count += 1

    def write_audio(self, packet: Pcm) -> None:
        """The next sound. Give it roughly in step with the frames."""
        samples = to_mono(packet)
        with self._lock, self._refusals():
            self._write_audio(samples)

    def _write_audio(self, samples: Samples) -> None:  # noqa: B027 (most pictures have no sound)
        """Take sound."""

    @abstractmethod
    def _open(self) -> None:
        """Begin, at the place where it is made."""

    @abstractmethod
    def _write(self, frame: Frame) -> None:
        """Take a frame."""

    @abstractmethod
    def _finish(self) -> None:
        """Make it appear."""

    def _discard(self) -> None:
        """Remove what has not appeared."""
        self._part.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """What the disk refuses, as an error with the name of the file that was wanted."""
        try:
            yield
        except (TalksplatError, BrokenPipeError):  # a pipe's reader may have enough
            raise
        except OSError as error:  # PyAV's, too
            raise MediaError(f"{self._path} can't be written: {error.strerror or error}") from error

    def _sink(self) -> BinaryIO:
        """The pipe."""
        return sys.stdout.buffer if str(self._path) == STDOUT else self._path.open("wb")

    def _sealed(self, part: Path, title: str) -> None:
        """Move a file to its place, with credentials if somebody signs."""
        target = self._path if part == self._part else part
        if self._disclosure.credentials is not None:
            signed = part.with_name(f"{part.name}.signed")
            try:
                self._disclosure.credentials.sign(part, signed, self.format, title, self._disclosure.description)
                os.replace(signed, part)
            finally:
                signed.unlink(missing_ok=True)
        if target != part:
            os.replace(part, target)

    def _picture(self, frame: Frame) -> Any:  # av.VideoFrame, YUV of full range
        """The frame as it is to be seen, with its label."""
        if frame.format == "jpeg":
            picture = frame._decoded()
        else:
            av = import_package("av", "encoding")
            picture = av.VideoFrame.from_ndarray(frame.to_array(), "rgb24")
            picture = picture.reformat(format="yuvj444p", dst_colorspace="ITU601", dst_color_range="JPEG")
        if self._disclosure.label:
            draw_label(
                tuple(
                    np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, -1)[:, : plane.width]
                    for plane in picture.planes
                )
            )
        return picture


class _Film(Writer):
    """What a container of FFmpeg holds."""

    video: ClassVar[tuple[str, Mapping[str, str]]]  # codec and its options
    audio: ClassVar[tuple[str, int, int] | None] = None  # codec, Hz, bits a second
    options: ClassVar[Mapping[str, str]] = {}
    pipe_options: ClassVar[Mapping[str, str]] = {}

    def __init__(self, path: str | Path, **options: Any) -> None:
        self._av = import_package("av", f"writing {self.format}")
        super().__init__(path, **options)
        self._samples = 0  # written so far
        self._early: list[Samples] = []  # sound that came before the first frame, which says how large the picture is
        self._video: Any = None
        self._audio: Any = None
        self._container: Any = None
        self._stream: BinaryIO | None = None  # the pipe

    def _write_audio(self, samples: Samples) -> None:
        if self.audio is None:
            return
        if self._video is None:
            self._early.append(samples)
        elif samples.size:
            frame = self._av.AudioFrame.from_ndarray(samples[None], "flt", "mono")
            frame.sample_rate, frame.pts = self._sample_rate, self._samples
            frame.time_base = Fraction(1, self._sample_rate)
            self._samples += samples.size
            self._container.mux(self._audio.encode(frame))

    def _open(self) -> None:
        if self._piped:
            self._stream = self._sink()
            place: str | _Forward = _Forward(self._stream)
            options = self.pipe_options
        else:
            self._part.touch()  # PyAV opens it much later
            place, options = str(self._part), self.options
        self._container = self._av.open(place, "w", format=self.format, options=dict(options))
        self._container.metadata.update(self._disclosure.tags)
        if self.audio is not None:
            codec, rate, bits = self.audio
            self._audio = self._add(codec, rate=rate, layout="mono", bit_rate=bits)

    def _add(self, codec: str, **options: Any) -> Any:
        try:
            return self._container.add_stream(codec, **options)
        except self._av.codec.codec.UnknownCodecError as error:
            raise MediaError(f"this PyAV has no encoder {codec}, which {self.format} files need") from error

    def _write(self, frame: Frame) -> None:
        picture = self._picture(frame)
        if self._video is None:
            self._start(picture.width, picture.height)
        picture = picture.reformat(format="yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG")
        picture.pts, picture.time_base = frame.index, Fraction(1, self._fps)
        self._container.mux(self._video.encode(picture))

    def _start(self, width: int, height: int) -> None:
        codec, options = self.video
        self._video = self._add(codec, rate=self._fps, options=dict(options))
        self._video.width, self._video.height, self._video.pix_fmt = width, height, "yuv420p"
        context = self._video.codec_context
        context.colorspace, context.color_range = SD_MATRIX, LIMITED_RANGE
        context.color_primaries, context.color_trc = SRGB_PRIMARIES, SRGB_TRANSFER
        early, self._early = self._early, []
        for samples in early:
            self._write_audio(samples)

    def _finish(self) -> None:
        for stream in filter(None, (self._video, self._audio)):
            self._container.mux(stream.encode(None))
        container, self._container = self._container, None
        container.close()
        if self._stream is not None:
            self._end(self._stream)
            self._stream.flush()
        else:
            self._describe()
            self._sealed(self._part, self._path.name)

    def _end(self, stream: BinaryIO) -> None:
        """Write what comes after the container."""

    def _describe(self) -> None:
        """Add to the finished file what FFmpeg does not write."""

    def _discard(self) -> None:
        if self._container is not None:
            with contextlib.suppress(OSError, self._av.FFmpegError):  # a full disk or a closed pipe refuses the trailer
                self._container.close()
        if self._stream is not None and self._stream is not sys.stdout.buffer:
            self._stream.close()
        super()._discard()


class Mp4Writer(_Film):
    """An MP4 that plays everywhere: H.264 in yuv420p, AAC, index in front; in a pipe, fragments of a second.

    See `Writer` for arguments and errors.
    """

    format = "mp4"
    video = ("libx264", {"preset": "veryfast", "crf": "18"})
    audio = ("aac", 48_000, 96_000)
    options: ClassVar = {"movflags": "+faststart"}
    pipe_options: ClassVar = {
        "movflags": "+frag_keyframe+delay_moov+default_base_moof",  # delayed: it says where picture and sound begin
        "frag_duration": str(FRAGMENT),
    }

    def _end(self, stream: BinaryIO) -> None:
        stream.write(mp4_box(self._disclosure.xmp))

    def _describe(self) -> None:
        with self._part.open("ab") as file:
            self._end(file)


class WebmWriter(_Film):
    """A WebM, for browsers: VP9 and Opus. See `Writer` for arguments and errors."""

    format = "webm"
    video = ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "6", "crf": "32", "b": "0", "row-mt": "1"})
    audio = ("libopus", 48_000, 64_000)
    pipe_options: ClassVar = {"live": "1"}


class WebpWriter(_Film):
    """An animated WebP, which repeats without end and has no sound. See `Writer` for arguments and errors."""

    format = "webp"
    pipes = False
    # libwebp_anim makes files a sixth smaller, and keeps 4 bytes a pixel of each frame in memory.
    video = ("libwebp", {"quality": "80", "compression_level": "2"})
    options: ClassVar = {"loop": "0"}

    def _describe(self) -> None:
        self._part.write_bytes(with_xmp(self.format, self._part.read_bytes(), self._disclosure.xmp))


class PicturesWriter(Writer):
    """Each frame as a picture, PNG or JPEG, in a folder of their own; in a pipe, one after the other.

    See `Writer` for arguments and errors.

    Args:
        path: with a place for the number, such as ``frames/%05d.png``. The folder must not exist, or be empty.
        format: ``png`` or ``jpeg``.
    """

    CODECS: ClassVar = {  # codec, pixels, options
        "png": ("png", "rgb24", {"compression_level": "2"}),
        "jpeg": ("mjpeg", "yuvj420p", {"qmin": "2", "qmax": "2"}),
    }

    def __init__(self, path: str | Path, *, format: str, **options: Any) -> None:
        self._av = import_package("av", "writing pictures")
        self.format = format  # type: ignore[misc]  # one class writes both
        super().__init__(path, **options)
        self._codec: Any = None
        self._folder, self._name = self._path.parent, self._path.name
        if not self._piped:
            if len(_NUMBER.findall(self._name)) != 1 or self._name.count("%") != 1:
                raise MediaError(f"{path} has no place for the frame's number: expected such as frames/%05d.{format}")
            if self._folder.is_dir() and any(self._folder.iterdir()):
                raise MediaError(f"{self._folder} is not empty: frames go into a folder of their own")
            self._part = self._folder.absolute().with_name(f".{self._folder.absolute().name}.{os.getpid()}.part")
        self._stream: BinaryIO | None = None

    def _open(self) -> None:
        if self._piped:
            self._stream = self._sink()
        else:
            self._part.mkdir()

    def _write(self, frame: Frame) -> None:
        if self.format == "jpeg" and frame.format == "jpeg" and not self._disclosure.label:
            data = frame.data  # as the server has made it
        else:
            data = self._encoded(self._picture(frame))
        data = with_xmp(self.format, data, self._disclosure.xmp)
        if self._stream is not None:
            self._stream.write(data)
            self._stream.flush()
            return
        file = self._part / (self._name % frame.index)
        file.write_bytes(data)
        self._sealed(file, file.name)

    def _encoded(self, picture: Any) -> bytes:
        codec, pixels, options = self.CODECS[self.format]
        if self._codec is None:
            self._codec = self._av.CodecContext.create(codec, "w")
            self._codec.width, self._codec.height, self._codec.pix_fmt = picture.width, picture.height, pixels
            self._codec.time_base = Fraction(1, self._fps)
            self._codec.options = options
            if self.format == "jpeg":
                self._codec.color_range = FULL_RANGE
        picture = picture.reformat(format=pixels, dst_color_range="JPEG")
        picture.pts, picture.time_base = self._count, Fraction(1, self._fps)
        [packet] = self._codec.encode(picture)
        return bytes(packet)

    def _finish(self) -> None:
        if self._stream is None:
            os.rename(self._part, self._folder)  # an empty folder gives way

    def _discard(self) -> None:
        if self._stream is not None and self._stream is not sys.stdout.buffer:
            self._stream.close()
        if not self._piped:
            shutil.rmtree(self._part, ignore_errors=True)


class _Forward:
    """A pipe as PyAV wants it: without `seek`, which sockets and pipes have and refuse."""

    def __init__(self, stream: BinaryIO) -> None:
        self.write = stream.write


FORMATS = {  # by ending
    ".mp4": "mp4",
    ".webm": "webm",
    ".webp": "webp",
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".srt": "srt",
    ".vtt": "vtt",
}
SUBTITLES = ("srt", "vtt")
_FILMS: dict[str, type[_Film]] = {kind.format: kind for kind in (Mp4Writer, WebmWriter, WebpWriter)}


def file_writer(
    path: str | Path,
    *,
    format: str | None = None,
    transcribe: Callable[[Samples], str] | None = None,
    **options: Any,
) -> Writer:
    """The writer for a path, by its ending; what is a folder, or ends with ``/``, gets numbered PNGs.

    Args:
        path: of the file, folder or pipe; see `Writer`.
        format: one of the values of `FORMATS`, where no ending says it.
        transcribe: for subtitles: what is said in samples of the sound's rate, such as `Client.transcribe`.
        options: the other arguments of `Writer`.

    Raises:
        MediaError: no ending that is known, or subtitles without `transcribe`; and what the writers raise.
    """
    from ._subtitles import SubtitleWriter  # which is a `Writer`

    place = Path(path)
    if str(path).endswith(os.sep) or place.is_dir():
        path = place = place / "%05d.png"
    format = FORMATS.get(place.suffix.lower(), format)
    if format in PicturesWriter.CODECS:
        return PicturesWriter(path, format=format, **options)
    if format in _FILMS:
        return _FILMS[format](path, **options)
    if format in SUBTITLES and transcribe is None:
        raise MediaError(f"{path} can't be written: subtitles need somebody who hears what is said, see `transcribe`")
    if format in SUBTITLES and transcribe is not None:
        return SubtitleWriter(path, format=format, transcribe=transcribe, **options)
    raise MediaError(f"{path} does not say its format: expected one of the endings {' '.join(FORMATS)}, or FOLDER/")


def encoders() -> dict[str, list[str]]:
    """The encoders that each format needs and the installed PyAV lacks.

    Raises:
        MissingExtraError: PyAV is not installed.
    """
    available = import_package("av", "writing files").codec.codecs_available
    needed = {form: [kind.video[0], *(kind.audio or ())[:1]] for form, kind in _FILMS.items()}
    needed |= {form: [codec] for form, (codec, *_) in PicturesWriter.CODECS.items()}
    return {form: [name for name in names if name not in available] for form, names in needed.items()}
