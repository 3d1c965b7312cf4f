"""The other end of a WebRTC connection, in this process."""

from __future__ import annotations

import asyncio
import contextlib
import time

import av
import numpy as np
from aiortc import MediaStreamTrack, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError
from presence import Sound


class Viewer:
    """What came: pictures, and sounds with the time at which each did."""

    def __init__(self) -> None:
        self.connection = RTCPeerConnection()
        self.pictures: list[av.VideoFrame] = []
        self.sounds: list[tuple[float, Sound]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.connection.on("track", lambda track: self._tasks.append(asyncio.create_task(self._take(track))))

    async def offer(self) -> dict[str, str]:
        """Of one who wants to see and hear."""
        for kind in ("audio", "video"):
            self.connection.addTransceiver(kind, direction="sendrecv")
        await self.connection.setLocalDescription(await self.connection.createOffer())
        return {"sdp": self.connection.localDescription.sdp, "type": self.connection.localDescription.type}

    async def accept(self, answer: dict[str, str]) -> None:
        """Connect."""
        await self.connection.setRemoteDescription(RTCSessionDescription(answer["sdp"], answer["type"]))

    async def close(self) -> None:
        await self.connection.close()
        await asyncio.wait_for(asyncio.gather(*self._tasks), 10)

    async def _take(self, track: MediaStreamTrack) -> None:
        with contextlib.suppress(MediaStreamError):
            while True:
                frame = await track.recv()
                if isinstance(frame, av.VideoFrame):
                    self.pictures.append(frame)
                elif isinstance(frame, av.AudioFrame):
                    self.sounds.append((time.monotonic(), frame.to_ndarray().astype(np.int16)))
