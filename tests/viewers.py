"""Viewers of marked avatars: every frame says in its pixels whose it is and which, so none can be lost unseen.

A plate carries its own number, as black and white fields in its topmost rows, and its avatar's colour, in its lowest
ones. The face stays clear of both.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from make_avatar import COLORS, make_avatar

from talksplat import avatar as bundle
from talksplat import clock
from talksplat.attention import plate_index
from talksplat_client import Client, Timeout, Tls

SIZE = 64  # pixels a side
PLATES = 120  # 240 frames forth and back, 9.6 s: longer than any fault, so that no two frames of it look alike
FIELD = SIZE // 8  # eight fields in a row: the bits of a number
PATIENCE = 60  # seconds
LAG = 1.0  # seconds that a stream may be behind its audio in peace, on a slow machine
COLOURS = {f"marked-{name}": np.multiply(colour, 255) for name, colour in COLORS.items()}
MARKED = list(COLOURS)  # the avatars

thorough = pytest.mark.skipif("FAULTS_JSON" not in os.environ, reason="one of its kind will do; `make faults` runs all")


def write_marked_avatar(root: Path, avatar_id: str) -> Path:
    """One of `MARKED`; returns the bundle's folder."""
    avatar = make_avatar(avatar_id, size=SIZE, plates=PLATES)
    canonical = avatar.canonical.copy()
    canonical[:3] *= 0.4
    bases = avatar.bases.copy()
    bases[:3] //= 4
    return bundle.write(
        replace(
            avatar,
            canonical=canonical,
            bases=bases,
            plates=[_plate(avatar_id, number) for number in range(PLATES)],
            viewmats=np.repeat(avatar.viewmats[:1], PLATES, axis=0),
        ),
        root,
    )


def _plate(avatar_id: str, number: int) -> bytes:
    pixels = np.full((SIZE, SIZE, 3), 128, np.uint8)
    bits = [255 * (number >> bit & 1) for bit in range(8)]
    pixels[:FIELD] = np.repeat(bits, FIELD)[None, :, None]
    pixels[-FIELD:] = COLOURS[avatar_id]
    return bytes(simplejpeg.encode_jpeg(pixels, quality=95))


def read_mark(jpeg: bytes) -> tuple[str, int]:
    """Avatar and number of the plate."""
    pixels = simplejpeg.decode_jpeg(jpeg, "RGB").astype(np.float32)
    colour = pixels[-FIELD // 2 :].mean((0, 1))
    avatar_id = min(COLOURS, key=lambda name: float(np.abs(COLOURS[name] - colour).sum()))
    levels = pixels[:FIELD].reshape(FIELD, 8, FIELD, 3).mean((0, 2, 3))
    return avatar_id, int(sum(1 << bit for bit, level in enumerate(levels) if level > 128))


@dataclass(frozen=True)
class Verdict:
    """What several viewers have seen together."""

    streams: int
    frames: int
    lost: int
    doubled: int
    foreign: int  # of another avatar
    misplaced: int  # of another moment
    longest_gap_s: float  # between two frames of a stream, since the fault


class Viewer:
    """Listens to one stream that speaks in real time, and notes every frame."""

    def __init__(self, client: Client, avatar: str, seed: int) -> None:
        self.avatar, self.seed = avatar, seed
        self.seen: list[tuple[float, int, str, int]] = []  # when, and frame, avatar and plate
        self.error: Exception | None = None
        self.samples = 0  # given so far
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(client,), daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """End the audio, and wait for the frames of all of it."""
        self._stopped.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), f"The stream of {self.avatar} hangs."
        if self.error is not None:
            raise self.error

    @property
    def lag(self) -> float:
        """Seconds of audio that have no frame yet."""
        return self.samples / clock.SAMPLE_RATE - len(self.seen) / clock.FPS

    def _watch(self, client: Client) -> None:
        try:
            for frame in client.animate(self._speak(), avatar=self.avatar, seed=self.seed):
                self.seen.append((time.monotonic(), frame.index, *read_mark(frame.data)))
        except Exception as error:
            self.error = error

    def _speak(self) -> Iterator[npt.NDArray[np.float32]]:
        began = time.monotonic()
        while not self._stopped.wait(max(0.0, began + self.samples / clock.SAMPLE_RATE - time.monotonic())):
            yield _voice(self.samples, clock.SAMPLES_PER_FRAME)
            self.samples += clock.SAMPLES_PER_FRAME


class Viewers:
    """One viewer an avatar; a context manager."""

    def __init__(
        self,
        urls: Sequence[str],
        avatars: Sequence[str] = MARKED,
        *,
        api_key: str | None = None,
        tls: Tls | None = None,
    ) -> None:
        self._client = Client(urls, api_key=api_key, tls=tls, timeout=Timeout(recovery=PATIENCE))
        self._viewers = [Viewer(self._client, avatar, seed) for seed, avatar in enumerate(avatars)]
        self._fault = 0.0

    def __enter__(self) -> Self:
        self.wait_until_all_see()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def fault(self) -> None:
        """Something breaks now: from here on gaps count."""
        self._fault = time.monotonic()

    def wait_until_all_see(self) -> None:
        """Until every viewer has seen a frame since the fault and is up to date."""
        deadline = time.monotonic() + PATIENCE
        while not all(
            viewer.seen and viewer.seen[-1][0] > self._fault and viewer.lag < LAG for viewer in self._viewers
        ):
            for viewer in self._viewers:
                if viewer.error is not None:
                    raise viewer.error
            assert time.monotonic() < deadline, [viewer.lag for viewer in self._viewers]
            time.sleep(0.05)

    def verdict(self) -> Verdict:
        """End the streams; what was seen of them."""
        for viewer in self._viewers:
            viewer.finish()
        return Verdict(
            streams=len(self._viewers),
            frames=sum(len(viewer.seen) for viewer in self._viewers),
            lost=sum(len(_expected(viewer) - {index for _, index, _, _ in viewer.seen}) for viewer in self._viewers),
            doubled=sum(len(viewer.seen) - len({index for _, index, _, _ in viewer.seen}) for viewer in self._viewers),
            foreign=sum(avatar != viewer.avatar for viewer in self._viewers for _, _, avatar, _ in viewer.seen),
            misplaced=sum(
                plate != plate_index(index, viewer.seed, PLATES)
                for viewer in self._viewers
                for _, index, _, plate in viewer.seen
            ),
            longest_gap_s=max(_longest_gap(viewer, self._fault) for viewer in self._viewers),
        )


def _expected(viewer: Viewer) -> set[int]:
    return set(range(-(-viewer.samples // clock.SAMPLES_PER_FRAME)))


def _longest_gap(viewer: Viewer, since: float) -> float:
    times = [since, *(at for at, *_ in viewer.seen if at > since)]
    return float(np.diff(times).max(initial=0))


def _voice(first: int, count: int) -> npt.NDArray[np.float32]:  # [count]
    """Samples of a buzz in syllables, from the sample ``first`` on."""
    t = np.arange(first, first + count) / clock.SAMPLE_RATE
    tone = sum(np.sin(2 * np.pi * 110 * k * t) / k for k in range(1, 20))
    return np.asarray(0.25 * tone * (0.5 - 0.5 * np.cos(2 * np.pi * 4 * t)), np.float32)
