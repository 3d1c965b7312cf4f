"""The extra ``media``: sound out of any file or a microphone. PyAV and sounddevice are imported late."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ._audio import Samples, to_mono
from ._exceptions import MediaError
from ._extras import import_package


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
    av = import_package("av", "reading media files")
    name = getattr(source, "name", source if isinstance(source, (str, Path)) else "the input")
    try:
        container = av.open(source if hasattr(source, "read") else str(source))
    except OSError as error:  # PyAV's errors for files are OSErrors too
        raise MediaError(f"{name} can't be read: {error.strerror or error}") from error
    except (av.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"{name} is no audio or video file: {reason}") from error
    if not container.streams.audio:
        container.close()
        raise MediaError(f"{name} has no sound")
    stream = container.streams.audio[0]
    seconds = float(stream.duration * stream.time_base) if stream.duration else None
    return Recording(stream.sample_rate, seconds, _decode(av, container, stream, name))


def _decode(av: Any, container: Any, stream: Any, name: object) -> Iterator[Samples]:
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
        sounddevice = import_package("sounddevice", "the microphone")
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
