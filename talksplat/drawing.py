"""Who draws the frames of an `Animator`: the CPU, a frame a thread, or a GPU, many frames at a time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import simplejpeg

from talksplat import splat

UInt8 = npt.NDArray[np.uint8]

MOST_FRAMES = 32  # drawn at a time on a GPU: eight chunks

# jobs and the quality of each one's JPEG (None: RGB) -> JPEG, or RGB [H, W, 3] that is still to be encoded
Pictures: TypeAlias = Callable[[Sequence[splat.Job], Sequence[int | None]], Sequence[bytes | UInt8]]


class Drawer(Protocol):
    """Makes pictures of jobs, for many threads at once."""

    threads: int  # that it is worth calling from at a time

    def picture(
        self,
        job: splat.Job,
        quality: int | None,  # of JPEG, 1 to 100; None: RGB, row by row
    ) -> bytes:
        """Draw one frame; the caller waits for it."""
        ...

    def close(self) -> None:
        """Let go of what it holds, once nobody calls it any more."""
        ...


class CpuDrawer:
    """Each thread draws its own frame, into its own buffer."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._buffers = threading.local()

    def picture(self, job: splat.Job, quality: int | None) -> bytes:
        """See `Drawer`."""
        image: UInt8 | None = getattr(self._buffers, "image", None)
        if image is None or image.shape != job.plate.shape:
            image = self._buffers.image = np.empty(job.plate.shape, np.uint8)
        splat.render_onto([replace(job, out=image)], threads=1)
        return _encoded(image, quality)

    def close(self) -> None:
        """Nothing to do."""


class _Wanted(NamedTuple):
    job: splat.Job
    quality: int | None
    picture: Future[bytes | UInt8]


class GatheringDrawer:
    """Draws on a device whatever frames are wanted by the time it is free, of any requests and avatars, in one go.

    It never waits for company. Frames are taken in the order in which they were asked for, `MOST_FRAMES` at the most;
    meanwhile as many others may gather. Where a batch fails, its frames are drawn one by one, so that only the bad one
    gets the error.

    Args:
        pictures: draws, in one thread of its own; as `talksplat.splat.cuda.Renderer.pictures`.
    """

    threads = 2 * MOST_FRAMES

    def __init__(self, pictures: Pictures) -> None:
        self._pictures = pictures
        self._wanted: queue.SimpleQueue[_Wanted | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)
        self._thread.start()

    def picture(self, job: splat.Job, quality: int | None) -> bytes:
        """See `Drawer`. What the device has not encoded is encoded by the thread that waits for it."""
        wanted = _Wanted(job, quality, Future())
        self._wanted.put(wanted)
        picture = wanted.picture.result()
        return picture if isinstance(picture, bytes) else _encoded(picture, quality)

    def close(self) -> None:
        """End the thread."""
        self._wanted.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._wanted.get()) is not None:
            batch = [first]
            while len(batch) < MOST_FRAMES and not self._wanted.empty():
                if (another := self._wanted.get()) is None:
                    self._wanted.put(None)
                    break
                batch.append(another)
            self._draw(batch)

    def _draw(self, batch: Sequence[_Wanted]) -> None:
        try:
            pictures = self._pictures([each.job for each in batch], [each.quality for each in batch])
        except BaseException as error:
            if len(batch) == 1:
                batch[0].picture.set_exception(error)
                return
            for each in batch:
                self._draw([each])
            return
        for each, picture in zip(batch, pictures, strict=True):
            each.picture.set_result(picture)


def _encoded(image: UInt8, quality: int | None) -> bytes:
    if quality is None:
        return image.tobytes()
    return bytes(simplejpeg.encode_jpeg(image, quality, "RGB", "420", fastdct=True))
