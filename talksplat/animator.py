"""From an avatar's coefficients or offsets to its frames: what the model `rasterizer` does.

A frame depends on its request alone: audio moves the face through coefficients (of the profile "huma2") or through
offsets of every Gaussian ("huma1"), and blink and plate follow from the frame's index and a seed. So any server renders
any chunk, and the same chunk gives the same bytes wherever and in whatever company it is rendered.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import simplejpeg

from talksplat import avatar as bundle
from talksplat import clock, splat
from talksplat.avatar import AnyAvatar, Avatar, BundleError, Huma1Avatar
from talksplat.cache import AvatarCache
from talksplat.framing import RequestError

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

FORMATS = ("jpeg", "raw")
SPEECH_EDGES = (0.1, 0.5)  # below the first the face rests, above the second it follows the voice in full

BLINK_SLOT = 100  # frames (4 s) that hold one blink each, at a place that differs by
BLINK_JITTER = 50  # frames: so two blinks are 2 to 6 s apart
BLINK_SHAPE = (0.35, 0.9, 1.0, 0.8, 0.45, 0.15)  # of the lids, frame by frame: they shut faster than they open

MAX_FRAME_INDEX = 2**53  # as far as every client's numbers are exact


@dataclass(frozen=True)
class Options:
    """How a chunk is to be drawn: the request parameters of the model `rasterizer`.

    Raises:
        RequestError: on construction, when one of them is not as it should be.
    """

    format: str = "jpeg"  # or "raw": RGB bytes, row by row
    quality: int = 85  # of JPEG, 1 to 100
    size: int | None = None  # pixels a side, a multiple of 8 up to the avatar's own
    seed: int = 0  # of blinks and of the plate that frame 0 stands on

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise RequestError(f"The parameter format is {self.format!r}, expected one of {', '.join(FORMATS)}.")
        for name in ("quality", "size", "seed"):
            value = getattr(self, name)
            if (value is not None or name != "size") and (not isinstance(value, int) or isinstance(value, bool)):
                raise RequestError(f"The parameter {name} is {value!r}, expected a whole number.")
        if not 1 <= self.quality <= 100:
            raise RequestError(f"The parameter quality is {self.quality}, expected 1 to 100.")
        if self.size is not None and (self.size <= 0 or self.size % 8):
            raise RequestError(f"The parameter size is {self.size}, expected a multiple of 8.")

    @classmethod
    def parse(cls, parameters: Mapping[str, Any]) -> Self:
        """From a request's parameters, which may hold others too."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: parameters[name] for name in names if name in parameters})


@dataclass(frozen=True, eq=False)
class Chunk:
    """What one chunk's frames are drawn from."""

    avatar: str
    motion: Float32  # [4, 20] coefficients, or [4, 14, N] offsets of an avatar of the profile "huma1"
    speech: Float32  # [4] probability
    frame_index: int  # of the first frame
    options: Options = Options()


def gate(
    speech: Float32,  # probability
) -> Float32:
    """How much of the motion counts: a smooth step, so that the lips rest in silence and never jump."""
    low, high = SPEECH_EDGES
    t = np.clip((speech - np.float32(low)) / np.float32(high - low), 0, 1)
    return t * t * (3 - 2 * t)


def blink(frame_index: int, seed: int = 0) -> float:
    """How far the lids are shut, 0 to 1: the weight of the basis `avatar.BLINK`."""
    slot, place = divmod(frame_index, BLINK_SLOT)
    since = place - _random(seed, slot) % (BLINK_JITTER + 1)
    return BLINK_SHAPE[since] if 0 <= since < len(BLINK_SHAPE) else 0.0


def plate_index(frame_index: int, seed: int, plates: int) -> int:
    """Which recorded frame lies behind: forth and back, from a place that the seed chooses.

    The first and the last stay for two frames, so that the head stops before it turns back.
    """
    place = (frame_index + _random(seed, -1)) % (2 * plates)
    return min(place, 2 * plates - 1 - place)


def _random(seed: int, number: int) -> int:
    """A whole number that looks random and is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=6).digest(), "little")


class Animator:
    """Renders chunks on all cores, from avatars and plates that it keeps in memory.

    Args:
        root: the folder of the avatar bundles.
        avatar_bytes: how much memory loaded avatars may take.
        plate_bytes: how much memory decoded plates may take.
        threads: that render; by default one a core.
    """

    def __init__(
        self, root: Path, *, avatar_bytes: int = 1 << 30, plate_bytes: int = 1 << 30, threads: int | None = None
    ) -> None:
        self._plates = _PlateCache(plate_bytes)
        self._avatars = AvatarCache(root, _Loaded.read, _Loaded.bytes_of, avatar_bytes, self._plates.forget)
        self._pool = ThreadPoolExecutor(threads or len(os.sched_getaffinity(0)), thread_name_prefix="render")
        self._buffers = threading.local()  # each thread's frame to draw into

    def render(self, chunks: Sequence[Chunk]) -> list[list[bytes] | Exception]:
        """The frames of every chunk, JPEG or raw RGB; for one that can't be rendered, the error in their place.

        The error is a RequestError, UnknownAvatarError or BundleError, or whatever else went wrong with that chunk.
        """
        drawn: list[list[Future[bytes]] | Exception] = []
        results: list[list[bytes] | Exception] = []
        with contextlib.ExitStack() as in_use:
            loaded: dict[str, _Loaded | Exception] = {}
            for chunk in chunks:
                if chunk.avatar not in loaded:
                    try:
                        loaded[chunk.avatar] = in_use.enter_context(self._avatars.use(chunk.avatar))
                    except Exception as error:
                        loaded[chunk.avatar] = error
                drawn.append(self._draw(chunk, loaded[chunk.avatar]))
            for frames in drawn:
                results.append(frames if isinstance(frames, Exception) else _outcome(frames))
        return results

    def preload(self, avatar_id: str) -> dict[str, Any]:
        """Load an avatar, or its newer version, and draw one frame so that nothing is done for the first time later.

        Of the profile "huma1", whose frames have no time to spare, all plates are decoded too, if there is room.

        Raises:
            UnknownAvatarError: there is none.
            BundleError: its bundle can't be read.
        """
        began = time.perf_counter()
        with self._avatars.use(avatar_id, strict=True) as loaded:
            avatar, cached = loaded.avatar, loaded.warm
            if not cached:
                size, rest = (avatar.width, avatar.height), np.zeros(loaded.motion_shape, np.float32)
                if isinstance(avatar, Huma1Avatar):
                    list(
                        self._pool.map(
                            lambda index: self._plates.get(loaded, index, *size), range(self._plates.room(loaded))
                        )
                    )
                self._pool.submit(self._frame, loaded, rest, 0.0, 0, size, Options()).result()
                loaded.warm = True
        return {
            "avatar": avatar_id,
            "loaded": True,
            "cached": cached,
            "profile": avatar.profile,
            "model": avatar.model,
            "width": avatar.width,
            "height": avatar.height,
            "gaussians": avatar.gaussians,
            "plates": len(avatar.plates),
            "milliseconds": round(1e3 * (time.perf_counter() - began), 2),
        }

    def unload(self, avatar_id: str) -> dict[str, Any]:
        """Forget an avatar; harmless when it is not loaded.

        Raises:
            UnknownAvatarError: there is none.
        """
        if not self._avatars.drop(avatar_id):
            bundle.version(self._avatars.root, avatar_id)
        return {"avatar": avatar_id, "loaded": False}

    def catalogue(self) -> dict[str, Any]:
        """Every avatar on disk, whether it is loaded, and the memory that loaded ones and decoded plates take."""
        loaded = set(self._avatars.ids())
        avatars = [{"id": name, "loaded": name in loaded} for name in bundle.available(self._avatars.root)]
        return {"avatars": avatars, "avatar_bytes": self._avatars.bytes, "plate_bytes": self._plates.bytes}

    def _draw(self, chunk: Chunk, loaded: _Loaded | Exception) -> list[Future[bytes]] | Exception:
        """Start drawing a chunk's frames."""
        if isinstance(loaded, Exception):
            return loaded
        avatar, options = loaded.avatar, chunk.options
        try:
            motion = _motion(chunk, loaded)
            width, height = _output_size(avatar, options.size)
        except RequestError as error:
            return error
        indices = range(chunk.frame_index, chunk.frame_index + clock.CHUNK_FRAMES)
        return [
            self._pool.submit(
                self._frame,
                loaded,
                frame_motion,
                blink(index, options.seed),
                plate_index(index, options.seed, len(avatar.plates)),
                (width, height),
                options,
            )
            for index, frame_motion in zip(indices, motion, strict=True)
        ]

    def _frame(
        self, loaded: _Loaded, motion: Float32, lids: float, plate: int, size: tuple[int, int], options: Options
    ) -> bytes:
        """One frame from its motion to bytes, in a thread of the pool: nothing of it waits for another frame."""
        avatar, (width, height) = loaded.avatar, size
        frame = self._frame_buffer(width, height)
        behind = self._plates.get(loaded, plate, width, height)
        shapes, weights = loaded.posed(motion, lids)
        job = splat.Job(shapes, weights, avatar.viewmats[plate], loaded.intrinsics(width, height), behind, frame)
        splat.render_onto([job], threads=1)
        if options.format == "raw":
            return frame.tobytes()
        return bytes(simplejpeg.encode_jpeg(frame, options.quality, "RGB", "420", fastdct=True))

    def _frame_buffer(self, width: int, height: int) -> UInt8:
        buffer: UInt8 | None = getattr(self._buffers, "frame", None)
        if buffer is None or buffer.shape[:2] != (height, width):
            buffer = self._buffers.frame = np.empty((height, width, 3), np.uint8)
        return buffer


@dataclass(eq=False)
class _Loaded:
    """An avatar in memory, ready to be drawn."""

    avatar: AnyAvatar
    warm: bool = False  # whether `preload` has drawn a frame of it

    @classmethod
    def read(cls, root: Path, avatar_id: str) -> Self:
        return cls(bundle.read(root, avatar_id, AnyAvatar))

    @cached_property
    def shapes(self) -> splat.Blendshapes:
        """Of the profile "huma2"."""
        assert isinstance(self.avatar, Avatar)
        return splat.Blendshapes(self.avatar.canonical, self.avatar.bases, self.avatar.basis_scales)

    @property
    def motion_name(self) -> str:
        return "OFFSETS" if isinstance(self.avatar, Huma1Avatar) else "COEFFICIENTS"

    @property
    def motion_shape(self) -> tuple[int, ...]:
        """Of one frame's motion."""
        return self.avatar.canonical.shape if isinstance(self.avatar, Huma1Avatar) else (bundle.COEFFICIENTS,)

    def posed(self, motion: Float32, lids: float) -> tuple[splat.Blendshapes, Float32]:
        """What the rasterizer draws for a gated motion and lids that are so far shut."""
        if isinstance(self.avatar, Huma1Avatar):
            return posed(self.avatar, motion, lids), np.zeros(0, np.float32)
        return self.shapes, np.append(motion, np.float32(lids))

    def intrinsics(self, width: int, height: int) -> Float32:  # [3, 3]
        """Of the camera that sees the avatar at this size."""
        scale = np.array([width / self.avatar.width, height / self.avatar.height, 1], np.float32)
        return self.avatar.K * scale[:, None]

    def bytes_of(self) -> int:
        avatar = self.avatar
        arrays = [array for array in vars(avatar).values() if isinstance(array, np.ndarray)]
        return sum(array.nbytes for array in arrays) + sum(map(len, avatar.plates))


def posed(
    avatar: Huma1Avatar,
    offsets: Float32,  # [14, N] gated
    lids: float,  # 0 open .. 1 shut
) -> splat.Blendshapes:
    """The Gaussians of one frame, as shapes without bases."""
    planes = avatar.canonical + offsets
    if lids:
        planes += np.float32(lids) * avatar.blink
    none = np.zeros((bundle.ATTRIBUTES, 0, avatar.gaussians), np.int8)
    return splat.Blendshapes(planes, none, np.zeros((bundle.ATTRIBUTES, 0), np.float32))


class _PlateCache:
    """Decoded plates, least recently used out first. Any thread may call anything."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._plates: OrderedDict[tuple[_Loaded, int, int, int], UInt8] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        return self._bytes

    def get(self, loaded: _Loaded, index: int, width: int, height: int) -> UInt8:
        """The plate as RGB [height, width, 3]; raises BundleError if it is no JPEG."""
        key = (loaded, index, width, height)
        with self._lock:
            if key in self._plates:
                self._plates.move_to_end(key)
                return self._plates[key]
        try:
            plate = simplejpeg.decode_jpeg(loaded.avatar.plates[index], "RGB", min_height=height, min_width=width)
        except ValueError as error:
            raise BundleError(f"plate {index} of avatar {loaded.avatar.id!r} can't be decoded: {error}") from error
        plate = _shrink(plate, width, height)
        with self._lock:
            if key not in self._plates:
                self._plates[key] = plate
                self._bytes += plate.nbytes
            while self._bytes > self._max_bytes and len(self._plates) > 1:
                self._bytes -= self._plates.popitem(last=False)[1].nbytes
        return plate

    def room(self, loaded: _Loaded) -> int:
        """How many plates of an avatar, at its own size, the budget holds."""
        avatar = loaded.avatar
        return min(len(avatar.plates), self._max_bytes // (avatar.width * avatar.height * 3))

    def forget(self, loaded: _Loaded) -> None:
        with self._lock:
            for key in [key for key in self._plates if key[0] is loaded]:
                self._bytes -= self._plates.pop(key).nbytes


def _shrink(image: UInt8, width: int, height: int) -> UInt8:
    """Bilinear, for what JPEG's own scaling by eighths leaves over: a factor below two."""
    if image.shape[:2] == (height, width):
        return image
    rows, columns = (_taps(old, new) for old, new in zip(image.shape[:2], (height, width), strict=True))
    mixed = image.astype(np.float32)
    for axis, (low, high, share) in ((0, rows), (1, columns)):
        share = np.expand_dims(share, tuple(other for other in range(3) if other != axis))
        mixed = mixed.take(low, axis) * (1 - share) + mixed.take(high, axis) * share
    return np.rint(mixed).astype(np.uint8)


def _taps(old: int, new: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], Float32]:
    """Between which two old pixels each new one lies, and how far along."""
    place = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
    low = place.astype(np.intp)
    return low, np.minimum(low + 1, old - 1), (place - low).astype(np.float32)


def _outcome(frames: Sequence[Future[bytes]]) -> list[bytes] | Exception:
    """A chunk's frames, or the first error; either way none of them is being drawn any more."""
    errors = [error for frame in frames if isinstance(error := frame.exception(), Exception)]
    return errors[0] if errors else [frame.result() for frame in frames]


def _motion(chunk: Chunk, loaded: _Loaded) -> Float32:  # [4, 20] or [4, 14, N]
    """The gated motion; raises RequestError for what no frame can be drawn from."""
    avatar = loaded.avatar
    if (chunk.motion.ndim == 3) != isinstance(avatar, Huma1Avatar):
        raise RequestError(
            f"Avatar {avatar.id!r} is of the profile {avatar.profile}, which moves by {loaded.motion_name}: "
            f"the model {avatar.model} animates it."
        )
    for name, array, shape in (
        (loaded.motion_name, chunk.motion, (clock.CHUNK_FRAMES, *loaded.motion_shape)),
        ("SPEECH", chunk.speech, (clock.CHUNK_FRAMES,)),
    ):
        if array.shape != shape:
            raise RequestError(f"{name} of a chunk has shape {list(array.shape)}, expected {list(shape)}.")
        if not np.isfinite(array).all():
            raise RequestError(f"{name} holds NaN or infinity; so did the audio, or it was far beyond [-1, 1].")
    if not 0 <= chunk.frame_index <= MAX_FRAME_INDEX:
        raise RequestError(f"FRAME_INDEX is {chunk.frame_index}, expected 0 to {MAX_FRAME_INDEX}.")
    return np.asarray(chunk.motion * gate(chunk.speech).reshape(-1, *(1 for _ in loaded.motion_shape)), np.float32)


def _output_size(avatar: AnyAvatar, size: int | None) -> tuple[int, int]:
    """Width and height of the frames."""
    if size is None:
        return avatar.width, avatar.height
    if avatar.width != avatar.height:
        raise RequestError(f"Avatar {avatar.id!r} is not square, so the parameter size can't be given for it.")
    if size > avatar.width:
        raise RequestError(f"The parameter size is {size}, above the {avatar.width} pixels of avatar {avatar.id!r}.")
    return size, size
