"""A recording as the fit reads it: square RGB frames and 16 kHz mono audio on the project's clock."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from talksplat import clock

Image = npt.NDArray[np.uint8]  # [H, W, 3] RGB
Float32 = npt.NDArray[np.float32]

MAX_SIZE = 512  # pixels a side that a recording is reduced to
MIN_SIZE = 64
ROUNDING = 5e-4  # seconds by which time stamps may be rounded
MAX_LOST = 1.0  # seconds at the end that may hold no frame that can be decoded
EVEN = 0.005  # seconds by which the frames of a constant rate may differ
GAP = 0.05  # seconds without a sample from which on they are made up for with silence


class RecordingError(ValueError):
    """The recording can't be used; the message says what was found and what was expected."""


@dataclass(frozen=True)
class Square:
    """The part of a recording's upright picture that its frames show, in pixels of that picture."""

    left: int
    top: int
    side: int


@dataclass(frozen=True)
class Recording:
    """A video file with its audio, read anew at every use: nothing is held in memory but the audio.

    Frames come at `clock.FPS` whatever the file's rate, constant or not (the frame shown at that instant), upright,
    cut to one fixed square and scaled to ``size`` x ``size`` pixels. Time 0 of frames and audio is the first frame.

    Raises:
        RecordingError: on construction, when the file can't be opened or holds no video that can be decoded.
    """

    path: Path
    audio_path: Path | None = None  # of a separate audio file, which begins with the first frame; else the video's own
    size: int = 0  # pixels a side, a multiple of 8; 0: the square's side, at most MAX_SIZE
    square: Square | None = None  # None: the largest, in the middle
    delay: float = 0.0  # seconds by which the sound lags the picture; `audio` makes up for it
    seconds: float = math.inf  # of the recording that are used, from the start

    def __post_init__(self) -> None:
        width, height = self.picture
        if self.square is None:
            side = min(width, height)
            object.__setattr__(self, "square", Square((width - side) // 2, (height - side) // 2, side))
        assert self.square is not None
        left, top, side = astuple(self.square)
        if min(left, top) < 0 or side < 1 or left + side > width or top + side > height:
            raise RecordingError(f"{self.square} is not inside the picture of {width} x {height} pixels.")
        size = self.size or min(side, MAX_SIZE) // 8 * 8
        if size < MIN_SIZE or size % 8:
            raise RecordingError(f"Frames of {size} pixels a side: expected a multiple of 8 from {MIN_SIZE}.")
        object.__setattr__(self, "size", size)

    @property
    def provenance(self) -> dict[str, Any]:
        """What a bundle says about the recording that it was fitted to."""
        assert self.square is not None
        return {
            "recording": self.path.name,
            "recording_sha256": self.sha256,
            "square": list(astuple(self.square)),
            "audio_delay_s": self.delay,
            "used_s": self.seconds,
        }

    @classmethod
    def as_fitted(cls, path: Path, audio_path: Path | None, size: int, provenance: Mapping[str, Any]) -> Recording:
        """The recording as an avatar was fitted to it, by the `provenance` in its bundle."""
        return cls(
            path,
            audio_path,
            size,
            Square(*provenance["square"]) if "square" in provenance else None,
            float(provenance.get("audio_delay_s", 0.0)),
            float(provenance.get("used_s", math.inf)),
        )

    @cached_property
    def picture(self) -> tuple[int, int]:
        """Width and height of the upright picture, in square pixels."""
        with self._decoded(None) as (stream, frames):
            frame = next(frames)
            width = round(frame.width * float(stream.sample_aspect_ratio or 1))
            return (frame.height, width) if frame.rotation % 180 else (width, frame.height)

    @cached_property
    def length(self) -> int:
        """How many frames there are."""
        return self.whole if self.seconds == math.inf else min(self.whole, round(self.seconds * clock.FPS))

    def frames(self, start: int = 0, stop: int | None = None, step: int = 1) -> Iterator[Image]:
        """Yield every ``step``-th of the frames ``start`` to ``stop`` (exclusive), [size, size, 3] RGB.

        Raises:
            RecordingError: the file breaks off.
        """
        assert self.square is not None
        scale = self.size / self.square.side
        top, left = round(self.square.top * scale), round(self.square.left * scale)
        stop = self.length if stop is None else min(stop, self.length)
        for frame in itertools.islice(self._shown(start, stop), 0, None, step):
            upright = self._upright(frame, scale)
            yield np.ascontiguousarray(upright[top : top + self.size, left : left + self.size])

    def pictures(self, step: int, longest: int) -> Iterator[Image]:
        """Yield every ``step``-th frame as the whole upright picture, reduced to ``longest`` pixels a side."""
        scale = min(longest / max(self.picture), 1.0)
        for frame in itertools.islice(self._shown(0, self.length), 0, None, step):
            yield self._upright(frame, scale)

    @cached_property
    def audio(self) -> Float32:
        """Mono samples at `clock.SAMPLE_RATE` in [-1, 1], [T], from the first frame on; gaps in the file are silent.

        Raises:
            RecordingError: there is no audio, or it can't be decoded.
        """
        path = self.audio_path or self.path
        pieces: list[Float32] = []
        begin = time = 0.0
        with _open(path) as container:
            stream = container.streams.best("audio")
            if stream is None:
                raise RecordingError(f"{path} holds no audio: name a file with --audio.")
            resampler = av.AudioResampler("flt", "mono", clock.SAMPLE_RATE)
            try:
                for frame in _decode(container, stream):
                    found = time if frame.time is None else float(frame.time)
                    if not pieces:
                        begin = time = found
                    elif found - time > GAP:
                        pieces.append(np.zeros(round((found - time) * clock.SAMPLE_RATE), np.float32))
                        time = found
                    time += frame.samples / frame.sample_rate
                    pieces += [piece.to_ndarray()[0] for piece in resampler.resample(frame)]
                if pieces:
                    pieces += [piece.to_ndarray()[0] for piece in resampler.resample(None)]
            except (av.FFmpegError, ValueError) as error:
                raise RecordingError(f"The sound of {path} breaks off after {time:.1f} s ({error}).") from error
        if not pieces:
            raise RecordingError(f"{path} holds no audio that can be decoded.")
        samples = np.concatenate(pieces)
        late = round((begin - (begin if self.audio_path else self._index.first) - self.delay) * clock.SAMPLE_RATE)
        samples = np.pad(samples, (late, 0)) if late > 0 else samples[-late:]
        return np.asarray(samples, np.float32)

    @property
    def whole(self) -> int:
        """How many frames there are with those that are not used."""
        return math.ceil((self._index.end - ROUNDING) * clock.FPS)

    @property
    def rate(self) -> float:
        """Different frames a second, on average."""
        return len(self._index.times) / self._index.end

    @property
    def is_even(self) -> bool:
        """Whether all frames last equally long."""
        return len(self._index.times) < 3 or float(np.ptp(np.diff(self._index.times))) < EVEN

    @property
    def lost(self) -> float:
        """Seconds at the end that the file promises and does not hold."""
        return self._index.lost

    def gaps(self, longer: float) -> list[tuple[float, float]]:
        """Where no new frame comes for ``longer`` seconds: begin and end."""
        times = np.append(self._index.times, self._index.end)
        at = np.flatnonzero(np.diff(times) > longer)
        return [(float(times[i]), float(times[i + 1])) for i in at if times[i] < self.seconds]

    @cached_property
    def sha256(self) -> str:
        """Of the video file and, where it is a separate one, of the audio file."""
        digest = hashlib.sha256()
        for path in filter(None, (self.path, self.audio_path)):
            with path.open("rb") as file:
                while data := file.read(1 << 20):
                    digest.update(data)
        return digest.hexdigest()

    # --- reading ---------------------------------------------------------------------------------------------------

    def _upright(self, frame: av.VideoFrame, scale: float) -> Image:
        width, height = (round(side * scale) for side in self.picture)
        turned = frame.rotation % 180 != 0
        scaled = frame.reformat(*((height, width) if turned else (width, height)), "rgb24", interpolation="AREA")
        image = np.asarray(scaled.to_ndarray(), np.uint8)
        return np.rot90(image, round(frame.rotation / 90) % 4) if frame.rotation else image

    def _shown(self, start: int, stop: int) -> Iterator[av.VideoFrame]:
        """The frame that is shown at each of the ticks ``start`` to ``stop`` of the clock, as decoded."""
        index, time = start, 0.0
        previous: Any = None  # frame
        for frame in self._decoded_from(start / clock.FPS):
            time = float(frame.time) - self._index.first
            # A frame is shown until the next one begins.
            while previous is not None and index < stop and index / clock.FPS < time - ROUNDING:
                yield previous
                index += 1
            if index >= stop:
                return
            previous = frame
        if min(self._index.times[-1], stop / clock.FPS) - time > MAX_LOST:
            raise RecordingError(f"{self.path} can't be decoded after {time:.1f} s: the file is damaged.")
        for _ in range(index, stop):
            yield previous

    def _decoded_from(self, time: float) -> Iterator[av.VideoFrame]:
        """Frames in the order of their time, the first one shown at ``time`` seconds or earlier."""
        key = self._index.key_before(time)
        if key is not None:
            with contextlib.suppress(av.FFmpegError), self._decoded(key) as (_, frames):
                first = next(frames)
                if float(first.time) - self._index.first <= time + ROUNDING:
                    yield first
                    yield from frames
                    return
        with self._decoded(None) as (_, frames):
            yield from frames

    @contextlib.contextmanager
    def _decoded(self, key: int | None) -> Iterator[tuple[av.VideoStream, Iterator[av.VideoFrame]]]:
        """The video stream and its frames, from the key frame with the decoding time ``key`` on or from the start."""
        with _open(self.path) as container:
            stream = _video(container, self.path)
            if key is not None:
                container.seek(key, stream=stream)
            yield stream, self._checked(_decode(container, stream))

    def _checked(self, frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
        """The same frames; an error where there is none, or where they are of different sizes."""
        size = None
        try:
            for frame in frames:
                size = size or (frame.width, frame.height)
                if size != (frame.width, frame.height):
                    raise RecordingError(
                        f"The picture of {self.path} changes from {size[0]} x {size[1]} to {frame.width} x "
                        f"{frame.height} pixels at {float(frame.time):.1f} s: expected one size."
                    )
                yield frame
        except av.FFmpegError as error:
            raise RecordingError(f"{self.path} can't be decoded ({error}).") from error
        if size is None:
            raise RecordingError(f"{self.path} holds no frame that can be decoded.")

    @cached_property
    def _index(self) -> _Index:
        return _Index.read(self.path)


@dataclass(frozen=True, eq=False)
class _Index:
    """When the frames of a file are shown, read from its packets without decoding them."""

    first: float  # seconds, of the first frame; all other times count from it
    times: npt.NDArray[np.float64]  # [P] of the frames, ascending
    end: float  # of the last frame
    lost: float  # seconds at the end that the file promises and does not hold
    key_times: npt.NDArray[np.float64]  # of the key frames, ascending
    key_stamps: list[int]  # their decoding times, in the stream's unit

    @classmethod
    def read(cls, path: Path) -> _Index:
        shown: list[float] = []
        keys: list[tuple[float, int]] = []
        last = 0.0  # of all streams
        with _open(path) as container:
            video = _video(container, path)
            with contextlib.suppress(av.FFmpegError):  # a file that breaks off
                for packet in container.demux([video, *container.streams.audio]):
                    stamp = packet.dts if packet.pts is None else packet.pts
                    if stamp is None or packet.is_discard:
                        continue
                    time = float(stamp * packet.time_base)
                    last = max(last, time + float((packet.duration or 0) * packet.time_base))
                    if packet.stream_index == video.index:
                        shown.append(time)
                        if packet.is_keyframe and packet.dts is not None:
                            keys.append((time, packet.dts))
            promised = (container.duration or 0) / av.time_base + (container.start_time or 0) / av.time_base
            usual = 1 / float(video.average_rate or clock.FPS)
        if not shown:
            raise RecordingError(f"{path} holds no frame.")
        times = np.sort(shown)
        first = float(times[0])
        keys.sort()
        return cls(
            first=first,
            times=times - first,
            end=float(times[-1] - first + (np.median(np.diff(times)) if len(times) > 1 else usual)),
            lost=max(promised - last, 0.0),
            key_times=np.array([time for time, _ in keys]) - first,
            key_stamps=[stamp for _, stamp in keys],
        )

    def key_before(self, time: float) -> int | None:
        """The decoding time of the last key frame that is shown at ``time`` or earlier; None for the first of all."""
        index = int(np.searchsorted(self.key_times, time + ROUNDING, "right")) - 1
        return self.key_stamps[index] if index > 0 else None


def _video(container: av.container.InputContainer, path: Path) -> av.VideoStream:
    stream = container.streams.best("video")
    if not isinstance(stream, av.VideoStream):
        raise RecordingError(f"{path} holds no video.")
    if stream.codec_context is None:
        raise RecordingError(f"The video in {path} is in a format that FFmpeg can't decode.")
    stream.thread_type = "SLICE"
    return stream


def _decode(container: av.container.InputContainer, stream: av.stream.Stream) -> Iterator[Any]:
    """Frames of a stream; what is damaged is left out."""
    for packet in container.demux(stream):
        with contextlib.suppress(av.error.InvalidDataError):
            yield from packet.decode()


@contextlib.contextmanager
def _open(path: Path) -> Iterator[av.container.InputContainer]:
    try:
        container = av.open(str(path))
    except (OSError, ValueError) as error:  # FFmpeg's errors are both
        if not path.exists():
            reason = "it does not exist"
        elif path.is_dir():
            reason = "it is a folder"
        else:
            reason = f"it is no video or sound file that FFmpeg reads, or it is cut off ({error})"
        raise RecordingError(f"{path} can't be opened: {reason}.") from error
    with container:
        yield container
