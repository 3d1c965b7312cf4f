"""WebRTC without a framework: an avatar as two tracks of aiortc.

    tracks = await AvatarTracks.load(AsyncClient("127.0.0.1:8001"), "ava")
    connection.addTrack(tracks.video)
    connection.addTrack(tracks.audio)
    prefer_h264(connection)  # before the offer or answer is made
    tracks.say(sound, 24_000)

Needs the extra ``webrtc``: ``pip install 'talksplat-client[webrtc]'``.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from fractions import Fraction
from typing import Never, Self

import av
import numpy as np
import numpy.typing as npt
from aiortc import MediaStreamTrack, RTCPeerConnection, RTCRtpSender
from aiortc.mediastreams import AUDIO_PTIME, VIDEO_TIME_BASE, MediaStreamError
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from ._asyncio import AsyncClient
from ._exceptions import TalksplatError
from ._frame import Frame
from ._live import LiveStream, Moment

SAMPLE_RATE = 48_000  # Hz; Opus knows no other
PACKET = round(AUDIO_PTIME * SAMPLE_RATE)  # samples
KEPT_FRAMES = 2  # of a video track that is taken too slowly; older ones are left out


class AvatarTracks(LiveStream[Never]):
    """An avatar that rests, and speaks what it is given: `say`, `finish`, `interrupt`, `listening`; from `load`.

    The sound is the clock of both tracks: whoever takes it, at whatever pace, has the frames keep up with it, and
    frames that are not taken in time are left out. Where no sound is wanted, an ``aiortc.contrib.media.MediaBlackhole``
    takes it. Both tracks end with `close`, with the connection that has them (aiortc stops them), and when the server
    is lost: `say` then raises why.

    Attributes:
        audio: 20 ms at a time, mono.
        video: frames in yuv420p (BT.601, limited range), with the pts of their sound.
    """

    audio: AudioTrack
    video: VideoTrack

    @classmethod
    async def load(
        cls,
        client: AsyncClient,
        avatar: str,
        *,
        size: int | None = None,  # height and width of a frame in pixels; None: the avatar's own
    ) -> Self:
        """Load the avatar.

        Raises:
            UnknownAvatarError, and the other errors of `AsyncClient.preload`.
        """
        tracks = await cls.open(client, avatar, sample_rate=SAMPLE_RATE, lead=0.0, size=size, format="jpeg")
        tracks.video = VideoTrack()
        tracks.audio = AudioTrack(tracks.moments(), tracks.video, SAMPLE_RATE // tracks.fps)
        tracks.audio.once("ended", tracks.close)  # by whomever: else nobody would look, and the server draw on
        return tracks

    async def close(self) -> None:
        """End the stream and its tracks."""
        if self.close in self.audio.listeners("ended"):
            self.audio.remove_listener("ended", self.close)
        await super().close()
        await self.audio.end()


class AudioTrack(MediaStreamTrack):
    """The sound of `AvatarTracks`; silence at rest."""

    kind = "audio"

    def __init__(
        self,
        moments: AsyncGenerator[Moment, None],
        video: VideoTrack,
        frame: int,  # samples
    ) -> None:
        super().__init__()
        self._moments, self._video, self._frame = moments, video, frame
        self._coming: asyncio.Future[Moment | None] | None = None  # the next moment, which outlives a cancelled `recv`
        self._packets: deque[npt.NDArray[np.int16]] = deque()  # of the frame that is shown
        self._due = 0.0  # when the next is, on the event loop's clock
        self._pts = 0

    async def recv(self) -> av.AudioFrame:
        """The next 20 ms, when they are due. It may be cancelled, and called again: nothing is lost.

        Raises:
            MediaStreamError: the track has ended.
        """
        if self.readyState != "live":
            raise MediaStreamError
        if not self._packets:
            await self._advance()
        await asyncio.sleep(max(0.0, self._due - asyncio.get_running_loop().time()))
        samples = self._packets.popleft()
        packet = av.AudioFrame.from_ndarray(samples[None], "s16", "mono")
        packet.sample_rate, packet.time_base, packet.pts = SAMPLE_RATE, Fraction(1, SAMPLE_RATE), self._pts
        self._due += AUDIO_PTIME
        self._pts += samples.size
        return packet

    def stop(self) -> None:
        """End both tracks."""
        super().stop()
        self._video.stop()

    async def end(self) -> None:
        """End both tracks, once the moments have ended."""
        self.stop()
        if self._coming is not None:
            await asyncio.wait([self._coming])

    async def _advance(self) -> None:
        """The next frame."""
        if self._coming is None:
            self._coming = asyncio.ensure_future(anext(self._moments, None))
        try:
            moment = await asyncio.shield(self._coming)  # a cancelled generator would be at its end
        except TalksplatError as error:
            self.stop()
            raise MediaStreamError from error
        self._coming = None
        if moment is None:
            self.stop()
            raise MediaStreamError
        sound = np.zeros(self._frame, np.int16) if moment.sound is None else moment.sound
        self._packets.extend(np.split(sound, range(PACKET, self._frame, PACKET)))
        self._due = moment.due
        self._video.show(moment.frame, Fraction(self._pts, SAMPLE_RATE))


class VideoTrack(MediaStreamTrack):
    """The frames of `AvatarTracks`."""

    kind = "video"

    def __init__(self) -> None:
        super().__init__()
        self._frames: deque[tuple[Frame, Fraction]] = deque(maxlen=KEPT_FRAMES)
        self._changed = asyncio.Event()
        self._reformatter = VideoReformatter()  # one for all frames, since making it costs more than using it

    async def recv(self) -> av.VideoFrame:
        """The next frame, when its sound begins.

        Raises:
            MediaStreamError: the track has ended.
        """
        while not self._frames:
            if self.readyState != "live":
                raise MediaStreamError
            self._changed.clear()
            await self._changed.wait()
        frame, seconds = self._frames.popleft()
        try:
            decoded = frame._decoded()
        except TalksplatError as error:
            raise MediaStreamError from error
        picture = self._reformatter.reformat(
            decoded, format="yuv420p", dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.MPEG, threads=1
        )
        picture.pts, picture.time_base = round(seconds / VIDEO_TIME_BASE), VIDEO_TIME_BASE
        return picture

    def show(
        self,
        frame: Frame,
        seconds: Fraction,  # of sound before it
    ) -> None:
        """This frame from now on."""
        self._frames.append((frame, seconds))
        self._changed.set()

    def stop(self) -> None:
        """End the track."""
        super().stop()
        self._changed.set()


def prefer_h264(connection: RTCPeerConnection) -> None:
    """Have a connection send video as H.264 if the other side can; to be called before its offer or answer is made."""
    known = RTCRtpSender.getCapabilities("video").codecs
    preferred = sorted(known, key=lambda codec: codec.mimeType != "video/H264")
    for transceiver in connection.getTransceivers():
        if transceiver.kind == "video":
            transceiver.setCodecPreferences(preferred)
