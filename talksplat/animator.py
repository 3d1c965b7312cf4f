"""From an avatar's coefficients or offsets to its frames: what the model `rasterizer` does.

A frame depends on its request alone: audio moves the face through coefficients (of the profile "huma2") or through
offsets of every Gaussian ("huma1"), and what else it does follows from the frame's index, a seed and how much it
listens (`talksplat.attention`). So any server renders any chunk, and the same chunk gives the same bytes wherever and
in whatever company it is rendered.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, Self, TypeVar, cast

import numpy as np
import numpy.typing as npt
import simplejpeg

from talksplat import avatar as bundle
from talksplat import clock, splat
from talksplat.attention import LID_STEPS, STILL, Eyes, Head, Pose, find_eyes, sway, voiced
from talksplat.avatar import AnyAvatar, Avatar, BundleError, Huma1Avatar
from talksplat.cache import AvatarCache, ByteCache, CacheCounts
from talksplat.drawing import CpuDrawer, Drawer
from talksplat.framing import RequestError
from talksplat.log import Fields
from talksplat.schedule import BusyError, DeadlineError, Due, Schedule

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
UInt8 = npt.NDArray[np.uint8]
T = TypeVar("T")

_log = logging.getLogger(__name__)

FORMATS = ("jpeg", "raw")
SPEECH_EDGES = (0.1, 0.5)  # below the first the face rests, above the second it follows the voice in full

MAX_FRAME_INDEX = 2**53  # as far as every client's numbers are exact

CHUNK_SECONDS = clock.CHUNK_FRAMES / clock.FPS
MAX_WAITING_BYTES = 256 << 20  # of chunks that were submitted and are not answered yet
CHUNK_BYTES = 4096  # about what a waiting chunk takes besides its motion
LOADING_THREADS = 4  # read bundles from the disk
MAX_TIMES = 4096  # render times kept until somebody takes them


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
    listening: int = 0  # how much the face listens at the chunk's end, 0 to 100,
    listening_before: int = 0  # and at its start; linear between
    deadline_ms: int | None = None  # a chunk that is older when its turn comes is not rendered

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise RequestError(f"The parameter format is {self.format!r}, expected one of {', '.join(FORMATS)}.")
        for name in ("quality", "size", "seed", "listening", "listening_before", "deadline_ms"):
            value, optional = getattr(self, name), name in ("size", "deadline_ms")
            if (value is not None or not optional) and (not isinstance(value, int) or isinstance(value, bool)):
                raise RequestError(f"The parameter {name} is {value!r}, expected a whole number.")
        if not 1 <= self.quality <= 100:
            raise RequestError(f"The parameter quality is {self.quality}, expected 1 to 100.")
        if self.size is not None and (self.size <= 0 or self.size % 8):
            raise RequestError(f"The parameter size is {self.size}, expected a multiple of 8.")
        for name in ("listening", "listening_before"):
            if not 0 <= getattr(self, name) <= 100:
                raise RequestError(f"The parameter {name} is {getattr(self, name)}, expected 0 to 100.")
        if self.deadline_ms is not None and self.deadline_ms < 1:
            raise RequestError(f"The parameter deadline_ms is {self.deadline_ms}, expected 1 or more.")

    def listening_at(self, number: int) -> float:
        """How much the face listens, 0 to 1, at the end of a frame of the chunk."""
        done = (number + 1) / clock.CHUNK_FRAMES
        return (self.listening_before + done * (self.listening - self.listening_before)) / 100

    @classmethod
    def parse(cls, parameters: Mapping[str, Any]) -> Self:
        """From a request's parameters, which may hold others too."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: parameters[name] for name in names if name in parameters})


@dataclass(frozen=True, eq=False)
class Chunk:
    """What one chunk's frames are drawn from. An idle one has neither motion nor speech: nobody speaks."""

    avatar: str
    motion: Float32 | None  # [4, 20] coefficients, or [4, 14, N] offsets of an avatar of the profile "huma1"
    speech: Float32 | None  # [4] probability
    frame_index: int  # of the first frame
    options: Options = Options()
    arrived: float = field(default_factory=lambda: time.monotonic())  # seconds; its age counts from here
    tenant: str = ""  # whose frames and dropped chunks are counted


def gate(
    speech: Float32,  # probability
) -> Float32:
    """How much of the motion counts: a smooth step, so that the lips rest in silence and never jump."""
    low, high = SPEECH_EDGES
    t = np.clip((speech - np.float32(low)) / np.float32(high - low), 0, 1)
    return t * t * (3 - 2 * t)


@dataclass(frozen=True)
class Counts:
    """What an `Animator` has done so far, by tenant, and what its caches have."""

    frames: Mapping[str, int]  # that were answered
    idle_frames: Mapping[str, int]  # those of them that show the face at rest
    dropped_chunks: Mapping[str, int]  # whose deadline had passed
    caches: Mapping[str, CacheCounts]  # "avatars", "plates" and "resting"


def _latest() -> deque[float]:
    return deque(maxlen=MAX_TIMES)


@dataclass(frozen=True)
class Times:
    """How long things took, in milliseconds: the latest `MAX_TIMES` of each.

    A chunk is due when it arrives, and a further one of the same request a chunk's duration after the one before.
    """

    render: deque[float] = field(default_factory=_latest)  # a frame, in its thread
    wait: deque[float] = field(default_factory=_latest)  # a chunk, from when it was due until it was begun
    chunk: deque[float] = field(default_factory=_latest)  # a chunk, from when it was due until its frames were there


class Animator:
    """Renders chunks on all cores, from avatars, plates and resting frames that it keeps in memory.

    Which chunk comes next: the one that is due first. A request's first chunk is due when it arrives, and each further
    one a chunk's duration later, when a viewer needs it. So live chunks, which are requests of one, are drawn in the
    order of their arrival; an utterance of 188 chunks lets every live one pass, gets as much as one live stream at the
    least, and all of the machine when nobody else wants it. The frames of a chunk are drawn by all threads at once.

    What waits is bounded: beyond `MAX_WAITING_BYTES` (some 60,000 chunks of the profile "huma2") chunks are refused.
    Before that, `Options.deadline_ms` rids the queue of what nobody wants any more, unrendered.

    Args:
        root: the folder of the avatar bundles.
        avatar_bytes: how much memory loaded avatars may take.
        plate_bytes: how much memory decoded plates may take.
        resting_bytes: how much memory frames of faces at rest may take, ready to be sent.
        threads: of the CPU that draw; by default one a core.
        drawer: who draws instead. The animator closes it.
    """

    def __init__(
        self,
        root: Path,
        *,
        avatar_bytes: int = 1 << 30,
        plate_bytes: int = 1 << 30,
        resting_bytes: int = 1 << 28,
        threads: int | None = None,
        drawer: Drawer | None = None,
    ) -> None:
        self._plates: ByteCache[UInt8] = ByteCache(lambda plate: plate.nbytes, plate_bytes)
        self._resting: ByteCache[bytes] = ByteCache(len, resting_bytes)
        self._avatars = AvatarCache(root, _Loaded.read, _Loaded.bytes_of, avatar_bytes, self._forget)
        self._drawer = drawer or CpuDrawer(threads or len(os.sched_getaffinity(0)))
        self._schedule = Schedule(self._drawer.threads, "render")
        self._loader = ThreadPoolExecutor(LOADING_THREADS, thread_name_prefix="load")
        self._numbers = itertools.count()  # of chunks
        self._waiting_bytes = 0
        self._frames: Counter[str] = Counter()
        self._idle_frames: Counter[str] = Counter()
        self._dropped_chunks: Counter[str] = Counter()
        self._times = Times()
        self._lock = threading.Lock()  # of the numbers above

    def close(self) -> None:
        """Refuse what is not begun, finish what is, and end the threads."""
        self._schedule.close()
        self._drawer.close()
        self._loader.shutdown()

    def render(self, chunks: Sequence[Chunk]) -> list[list[bytes] | Exception]:
        """The frames of every chunk, JPEG or raw RGB; for one that can't be rendered, the error in their place.

        The error is a RequestError, UnknownAvatarError, BundleError, DeadlineError or BusyError, or whatever else went
        wrong with that chunk.
        """
        return self.submit(chunks).result()

    def submit(self, chunks: Sequence[Chunk]) -> Future[list[list[bytes] | Exception]]:
        """Have the chunks of a request rendered: what `render` returns, as soon as the last of them is done.

        Returns at once, whatever has to be read first. The future always ends, and its callbacks run in a thread that
        renders: they should be short.
        """
        request = _Request(chunks)
        with self._lock:
            room = self._waiting_bytes + request.bytes <= MAX_WAITING_BYTES
            self._waiting_bytes += request.bytes
        request.future.add_done_callback(lambda _: self._answered(request))
        try:
            if not room:
                raise BusyError("too many chunks wait already")
            if all(request.take(name, self._avatars.use_at_once(name)) for name in request.missing()):
                self._enqueue(request)
            else:
                self._loader.submit(self._load, request)
        except Exception as error:
            request.fail(error)
        return request.future

    def counts(self) -> Counts:
        """Until now."""
        with self._lock:
            caches = {
                "avatars": self._avatars.counts,
                "plates": self._plates.counts,
                "resting": self._resting.counts,
            }
            return Counts(dict(self._frames), dict(self._idle_frames), dict(self._dropped_chunks), caches)

    def take_times(self) -> Times:
        """Since the last call."""
        with self._lock:
            times, self._times = self._times, Times()
        return times

    def preload(self, avatar_id: str) -> dict[str, Any]:
        """Load an avatar, or its newer version, and draw one frame so that nothing is done for the first time later.

        In the thread that calls it; those that render go on meanwhile. Of the profile "huma1", whose frames have no
        time to spare, all plates are decoded too, if there is room.

        Raises:
            UnknownAvatarError: there is none.
            BundleError: its bundle can't be read.
        """
        began = time.perf_counter()
        with self._avatars.use(avatar_id, strict=True) as loaded:
            avatar, cached = loaded.avatar, loaded.warm
            if not cached:
                size = (avatar.width, avatar.height)
                if isinstance(avatar, Huma1Avatar):
                    room = self._plates.max_bytes // (avatar.width * avatar.height * 3)
                    for index in range(min(room, len(avatar.plates))):
                        self._plate(loaded, index, *size)
                else:
                    size = (avatar.width // 8, avatar.height // 8)  # as good as a large one, and sooner there
                self._picture(_Frame(loaded, None, STILL, Pose(0, 0), size, Options()))
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
        return {
            "avatars": avatars,
            "avatar_bytes": self._avatars.counts.bytes,
            "plate_bytes": self._plates.counts.bytes,
            "resting_bytes": self._resting.counts.bytes,
        }

    def _answered(self, request: _Request) -> None:
        with self._lock:
            self._waiting_bytes -= request.bytes

    def _load(self, request: _Request) -> None:
        """Read the avatars that a request lacks, and go on with it."""
        try:
            for name in request.missing():
                try:
                    request.take(name, self._avatars.use(name))
                except Exception as error:
                    request.avatars[name] = error
            self._enqueue(request)
        except BaseException as error:
            request.fail(error)

    def _enqueue(self, request: _Request) -> None:
        now = time.monotonic()
        for place, chunk in enumerate(request.chunks):
            # who says that a chunk came long ago is not let past everybody for it
            arrived = min(max(chunk.arrived, now - CHUNK_SECONDS), now)
            due = (arrived + place * CHUNK_SECONDS, next(self._numbers))
            try:
                self._schedule.add(due, [partial(self._begin, request, place, due)])
            except BusyError as error:
                request.settle(place, error)

    def _begin(self, request: _Request, place: int, due: Due) -> None:
        """Look at a chunk whose turn has come, and have its frames drawn."""
        chunk = request.chunks[place]
        try:
            self._check_age(chunk)
            frames = _frames(chunk, request.avatars[chunk.avatar])
            wanted = chunk.arrived + place * CHUNK_SECONDS
            with self._lock:
                self._times.wait.append(_milliseconds_since(wanted))
            drawn: _Gathering[bytes] = _Gathering(len(frames), partial(self._drawn, request, place, wanted))
            self._schedule.add(
                due, [partial(self._draw, drawn, number, frame, chunk.tenant) for number, frame in enumerate(frames)]
            )
        except BaseException as error:
            request.settle(place, error)

    def _check_age(self, chunk: Chunk) -> None:
        limit, age = chunk.options.deadline_ms, 1e3 * (time.monotonic() - chunk.arrived)
        if limit is not None and age > limit:
            with self._lock:
                self._dropped_chunks[chunk.tenant] += 1
            raise DeadlineError(f"the chunk is {math.ceil(age)} ms old, beyond its deadline of {limit} ms")

    def _draw(self, drawn: _Gathering[bytes], number: int, frame: _Frame, tenant: str) -> None:
        began = time.perf_counter()
        try:
            picture: bytes | BaseException = self._picture(frame)
        except BaseException as error:
            picture = error
        with self._lock:
            self._times.render.append(1e3 * (time.perf_counter() - began))
            self._frames[tenant] += 1
            self._idle_frames[tenant] += frame.motion is None
        drawn.put(number, picture)

    def _drawn(self, request: _Request, place: int, wanted: float, outcome: list[bytes] | BaseException) -> None:
        with self._lock:
            self._times.chunk.append(_milliseconds_since(wanted))
        request.settle(place, outcome)

    def _picture(self, frame: _Frame) -> bytes:
        """One frame, JPEG or raw RGB; one at rest as it was drawn the last time, if it is still there."""
        if frame.motion is not None:
            return self._rendered(frame)
        key = (frame.pose, frame.size, frame.options.format, frame.options.quality)
        return self._resting.get(frame.loaded, key, lambda: self._rendered(frame))

    def _rendered(self, frame: _Frame) -> bytes:
        loaded, (width, height) = frame.loaded, frame.size
        behind = self._plate(loaded, frame.pose.plate, width, height)
        motion = np.zeros(loaded.motion_shape, np.float32) if frame.motion is None else frame.motion
        shapes, weights = loaded.posed(motion, frame.pose)
        viewmat = loaded.head.viewmat(frame.pose, frame.turn)
        job = splat.Job(shapes, weights, viewmat, loaded.intrinsics(width, height), behind)
        return self._drawer.picture(job, frame.options.quality if frame.options.format == "jpeg" else None)

    def _plate(self, loaded: _Loaded, index: int, width: int, height: int) -> UInt8:  # [height, width, 3] RGB
        return self._plates.get(loaded, (index, width, height), lambda: _decoded(loaded.avatar, index, width, height))

    def _forget(self, loaded: _Loaded) -> None:
        _log.info("released", extra=Fields(avatar=loaded.avatar.id))
        self._plates.forget(loaded)
        self._resting.forget(loaded)


def _milliseconds_since(moment: float) -> float:
    """Of the monotonic clock; 0 for what is still to come."""
    return max(0.0, 1e3 * (time.monotonic() - moment))


class _Gathering(Generic[T]):
    """Pieces that several threads make; whoever brings the last one hands over all, or the first error."""

    def __init__(self, count: int, done: Callable[[list[T] | BaseException], None]) -> None:
        self._pieces: list[T | BaseException | None] = [None] * count
        self._left = count
        self._done = done
        self._lock = threading.Lock()

    def put(self, place: int, piece: T | BaseException) -> None:
        """Bring the piece of a place, once."""
        with self._lock:
            self._pieces[place] = piece
            self._left -= 1
            left = self._left
        if not left:
            errors = [piece for piece in self._pieces if isinstance(piece, BaseException)]
            self._done(errors[0] if errors else cast(list[T], self._pieces))


class _Request:
    """Chunks that are answered together, and the avatars that they hold meanwhile."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self.chunks = chunks
        self.bytes = sum(CHUNK_BYTES + (0 if chunk.motion is None else chunk.motion.nbytes) for chunk in chunks)
        self.avatars: dict[str, _Loaded | Exception] = {}
        self.future: Future[list[list[bytes] | Exception]] = Future()
        self._results: list[list[bytes] | Exception] = [BusyError("it was not begun")] * len(chunks)
        self._left = len(chunks)
        self._in_use = contextlib.ExitStack()
        self._lock = threading.Lock()
        if not chunks:
            self.future.set_result([])

    def missing(self) -> set[str]:
        """The avatars that it does not hold yet."""
        return {chunk.avatar for chunk in self.chunks} - set(self.avatars)

    def take(self, name: str, use: contextlib.AbstractContextManager[_Loaded] | None) -> bool:
        """Hold an avatar to the end; whether there was one to be held."""
        if use is not None:
            self.avatars[name] = self._in_use.enter_context(use)
        return use is not None

    def settle(self, place: int, outcome: list[bytes] | BaseException) -> None:
        """Once for each chunk: its frames, or why there are none."""
        if isinstance(outcome, BaseException) and not isinstance(outcome, Exception):
            outcome = RuntimeError(f"the renderer was ended by {type(outcome).__name__}")
        with self._lock:
            self._results[place] = outcome
            self._left -= 1
            left = self._left
        if not left:
            try:
                self._in_use.close()
            finally:
                self.future.set_result(self._results)

    def fail(self, error: BaseException) -> None:
        """Settle all chunks, before any was begun."""
        for place in range(len(self.chunks)):
            self.settle(place, error)


@dataclass(frozen=True, eq=False)
class _Frame:
    """All that one frame depends on."""

    loaded: _Loaded
    motion: Float32 | None  # [20] or [14, N], gated; None at rest
    turn: Float64  # [3] of a head that speaks, see `Head.viewmat`
    pose: Pose
    size: tuple[int, int]  # width, height
    options: Options


@dataclass(eq=False)
class _Loaded:
    """An avatar in memory, ready to be drawn."""

    avatar: AnyAvatar
    warm: bool = False  # whether `preload` has drawn a frame of it

    @classmethod
    def read(cls, root: Path, avatar_id: str) -> Self:
        began = time.perf_counter()
        loaded = cls(bundle.read(root, avatar_id, AnyAvatar))
        _log.info("loaded", extra=Fields(avatar=avatar_id, milliseconds=1e3 * (time.perf_counter() - began)))
        return loaded

    @cached_property
    def head(self) -> Head:
        return Head(self.avatar.viewmats)

    @cached_property
    def eyes(self) -> Eyes | None:
        rest = np.zeros(self.motion_shape, np.float32)
        if isinstance(self.avatar, Huma1Avatar):
            awake, asleep = ((posed(self.avatar, rest, lids), rest[0, :0]) for lids in (0.0, 1.0))
        else:
            assert isinstance(self.avatar, Avatar)
            shapes = splat.Blendshapes(self.avatar.canonical, self.avatar.bases, self.avatar.basis_scales)
            awake, asleep = ((shapes, np.append(rest, np.float32(lids))) for lids in (0, 1))
        viewmat = self.avatar.viewmats[self.head.usual]
        return find_eyes(awake, asleep, viewmat, self.avatar.K, self.avatar.width, self.avatar.height)

    @cached_property
    def shapes(self) -> splat.Blendshapes:
        """Of the profile "huma2": its bases and, where it has eyes, two more that move them."""
        assert isinstance(self.avatar, Avatar)
        bases, scales = self.avatar.bases, self.avatar.basis_scales
        if self.eyes is not None:
            looks = np.zeros((bundle.ATTRIBUTES, 2, self.avatar.gaussians), np.int8)
            looks[:3] = self.eyes.shares
            look_scales = np.zeros((bundle.ATTRIBUTES, 2), np.float32)
            look_scales[:3] = self.eyes.scales()
            bases, scales = np.concatenate([bases, looks], 1), np.concatenate([scales, look_scales], 1)
        return splat.Blendshapes(self.avatar.canonical, bases, scales)

    @property
    def motion_name(self) -> str:
        return "OFFSETS" if isinstance(self.avatar, Huma1Avatar) else "COEFFICIENTS"

    @property
    def motion_shape(self) -> tuple[int, ...]:
        """Of one frame's motion."""
        return self.avatar.canonical.shape if isinstance(self.avatar, Huma1Avatar) else (bundle.COEFFICIENTS,)

    def posed(self, motion: Float32, pose: Pose) -> tuple[splat.Blendshapes, Float32]:
        """What the rasterizer draws for a gated motion and a pose."""
        lids = pose.lids / LID_STEPS
        if isinstance(self.avatar, Huma1Avatar):
            if self.eyes is not None:
                motion = motion.copy()
                motion[:3] += (self.eyes.scales() @ np.array(pose.look, np.float32))[:, None] * self.eyes.shares
            return posed(self.avatar, motion, lids), np.zeros(0, np.float32)
        looks = () if self.eyes is None else pose.look
        return self.shapes, np.array([*motion, lids, *looks], np.float32)

    def intrinsics(self, width: int, height: int) -> Float32:  # [3, 3]
        """Of the camera that sees the avatar at this size."""
        scale = np.array([width / self.avatar.width, height / self.avatar.height, 1], np.float32)
        return self.avatar.K * scale[:, None]

    def bytes_of(self) -> int:
        avatar = self.avatar
        arrays = [array for array in vars(avatar).values() if isinstance(array, np.ndarray)]
        shapes = avatar.bases.nbytes if isinstance(avatar, Avatar) else 0  # about what `shapes` adds
        return sum(array.nbytes for array in arrays) + sum(map(len, avatar.plates)) + shapes


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


def _decoded(avatar: AnyAvatar, index: int, width: int, height: int) -> UInt8:  # [height, width, 3] RGB
    """A plate; raises BundleError if it is no JPEG."""
    try:
        plate = simplejpeg.decode_jpeg(avatar.plates[index], "RGB", min_height=height, min_width=width)
    except ValueError as error:
        raise BundleError(f"plate {index} of avatar {avatar.id!r} can't be decoded: {error}") from error
    return _shrink(plate, width, height)


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


def _frames(chunk: Chunk, loaded: _Loaded | Exception) -> list[_Frame]:
    """What a chunk's frames are drawn from; raises RequestError where that can't be, or why the avatar is not there."""
    if isinstance(loaded, Exception):
        raise loaded
    if not 0 <= chunk.frame_index <= MAX_FRAME_INDEX:
        raise RequestError(f"FRAME_INDEX is {chunk.frame_index}, expected 0 to {MAX_FRAME_INDEX}.")
    options, seed = chunk.options, chunk.options.seed
    size = _output_size(loaded.avatar, options.size)
    frames = []
    for number, (motion, share) in enumerate(_motions(chunk, loaded)):
        index = chunk.frame_index + number
        spoken = voiced(share)
        pose = loaded.head.pose(index, seed, options.listening_at(number), spoken)
        turn = spoken * sway(index, seed) if spoken else STILL
        frames.append(_Frame(loaded, motion, turn, pose, size, options))
    return frames


def _motions(chunk: Chunk, loaded: _Loaded) -> list[tuple[Float32 | None, float]]:
    """The gated motion of each frame, None at rest, and how much of it counts.

    Raises RequestError for what no frame can be drawn from.
    """
    if chunk.motion is None or chunk.speech is None:
        return [(None, 0.0)] * clock.CHUNK_FRAMES
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
    return [
        (np.asarray(motion * share, np.float32) if share else None, float(share))
        for motion, share in zip(chunk.motion, gate(chunk.speech), strict=True)
    ]


def _output_size(avatar: AnyAvatar, size: int | None) -> tuple[int, int]:
    """Width and height of the frames."""
    if size is None:
        return avatar.width, avatar.height
    if avatar.width != avatar.height:
        raise RequestError(f"Avatar {avatar.id!r} is not square, so the parameter size can't be given for it.")
    if size > avatar.width:
        raise RequestError(f"The parameter size is {size}, above the {avatar.width} pixels of avatar {avatar.id!r}.")
    return size, size
