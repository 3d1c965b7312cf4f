"""LiveKit Agents: gives an agent's voice a face.

    avatar = AvatarSession(AsyncClient("127.0.0.1:8001"), "ava")
    await avatar.start(session, room=ctx.room)  # before session.start
    await session.start(agent, room=ctx.room)

Needs the extra ``livekit``: ``pip install 'talksplat-client[livekit]'``. An `AvatarRunner` of your own, in another
process say, takes a `VideoGenerator`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, Never, Self

import numpy as np
from livekit import rtc
from livekit.agents import AgentSession, ErrorEvent
from livekit.agents.utils import aio
from livekit.agents.voice import avatar as agents

from ._asyncio import AsyncClient
from ._exceptions import TalksplatError
from ._live import LiveStream, Moment

SAMPLE_RATE = 24_000  # Hz; what LiveKit's voices have
BUFFER_SECONDS = 0.1  # of sound, that AvatarRunner keeps
GIVEN_UP_SECONDS = 0.3  # a frame so late has AVSynchronizer count anew

logger = logging.getLogger(__name__)


class VideoGenerator(agents.VideoGenerator):
    """Frames of an avatar, at rest or beside the sound that they speak; from `open`.

    Sound may come at any sample rate, mono or in channels, which are averaged. It comes out mono, at that of `options`.

    Attributes:
        options: for `AvatarRunner`.
        av_sync: of the runner, once there is one: `clear_buffer` empties it, so that silence is immediate.
    """

    def __init__(self, stream: LiveStream[agents.AudioSegmentEnd]) -> None:
        self.options = agents.AvatarOptions(stream.size, stream.size, stream.fps, stream.sample_rate, 1)
        self.av_sync: rtc.AVSynchronizer | None = None
        self._stream = stream
        self._next: float | None = None  # when AVSynchronizer means to show the next frame, on the event loop's clock
        self._taken = asyncio.Event()  # the consumer is done with what it was given
        self._taken.set()
        self._cleared = 0  # how often

    @classmethod
    async def open(
        cls,
        client: AsyncClient,
        avatar: str,
        *,
        sample_rate: int = SAMPLE_RATE,  # Hz, of the sound that comes out
        size: int | None = None,  # height and width of a frame in pixels; None: the avatar's own
    ) -> Self:
        """Load the avatar.

        Raises:
            UnknownAvatarError, and the other errors of `AsyncClient.preload`.
        """
        return cls(
            await LiveStream.open(client, avatar, sample_rate=sample_rate, lead=BUFFER_SECONDS, size=size, format="raw")
        )

    @property
    def listening(self) -> float:
        """How much the face listens while it is at rest, 0 to 1: see `Stream.listening`. May be set at any time."""
        return self._stream.listening

    @listening.setter
    def listening(self, share: float) -> None:
        self._stream.listening = share

    async def push_audio(self, frame: rtc.AudioFrame | agents.AudioSegmentEnd) -> None:
        """Speak this, after what was pushed before.

        Raises:
            TalksplatError: the one that has ended the frames.
        """
        if isinstance(frame, agents.AudioSegmentEnd):
            self._stream.finish()
            self._stream.mark(frame)
        else:
            self._stream.say(np.frombuffer(frame.data, np.int16).reshape(-1, frame.num_channels), frame.sample_rate)

    async def clear_buffer(self) -> None:
        """Stop speaking: throw away what was pushed and has not come out. Returns when it is silent."""
        self._cleared += 1
        await self._stream.interrupt()
        if self.av_sync is not None:
            await self.av_sync.clear_queue()
            with contextlib.suppress(TimeoutError):  # what is just being pushed would be heard after it
                await asyncio.wait_for(self._taken.wait(), BUFFER_SECONDS)
            await self.av_sync.clear_queue()
            self._count()

    async def __aiter__(self) -> AsyncIterator[rtc.VideoFrame | rtc.AudioFrame | agents.AudioSegmentEnd]:
        """Frames and sound, without end.

        Raises:
            TalksplatError: see `AsyncClient.idle`.
        """
        async with contextlib.aclosing(self._stream.moments()) as moments:
            async for each in moments:
                cleared = self._cleared
                for output in self._outputs(each) if isinstance(each, Moment) else [each]:
                    if self._cleared != cleared:
                        break  # its picture was waiting for room, and its sound would be heard after all
                    self._taken.clear()
                    yield output
                    self._taken.set()
                if self._next is None:  # it begins to count with the first, which waits until the track is published
                    self._count()

    async def aclose(self) -> None:
        """End the frames."""
        await self._stream.close()

    def _count(self) -> None:
        """AVSynchronizer has nothing to show but the frame at hand."""
        self._next = asyncio.get_running_loop().time() + 1 / self.options.video_fps

    def _outputs(self, moment: Moment) -> list[rtc.VideoFrame | rtc.AudioFrame]:
        """The frame and its sound."""
        side = self.options.video_width
        picture = rtc.VideoFrame(side, side, rtc.VideoBufferType.RGB24, moment.frame.data)
        outputs: list[rtc.VideoFrame | rtc.AudioFrame] = [picture] * (1 + self._missing(moment))
        if moment.sound is not None:
            sound = moment.sound
            outputs.append(rtc.AudioFrame(sound.tobytes(), self.options.audio_sample_rate, 1, sound.size))
        return outputs

    def _missing(self, moment: Moment) -> int:
        """How often a frame is to be shown again.

        AVSynchronizer counts frames, and hurries after those that came late, while their sound does not.
        """
        if self._next is None:
            return 0
        late = moment.due - self._next
        count = max(0, round(late * self.options.video_fps)) if late < GIVEN_UP_SECONDS else 0
        begin = self._next if late < GIVEN_UP_SECONDS else moment.due
        self._next = begin + (1 + count) / self.options.video_fps
        return count


class AvatarSession(agents.AvatarSession[Never]):
    """Gives an agent a face in the agent's own process: tracks of its picture and its voice in the agent's room.

    If the server is lost for good, the agent goes on without a voice, and its session emits an ``error`` event whose
    ``error`` is the TalksplatError and whose ``source`` is this.

    Args:
        client: of the talksplat server.
        avatar: its id.
        sample_rate: of the sound in the room, Hz.
        size: height and width of the picture in pixels; None: the avatar's own.
    """

    def __init__(
        self,
        client: AsyncClient,
        avatar: str,
        *,
        sample_rate: int = SAMPLE_RATE,
        size: int | None = None,
    ) -> None:
        super().__init__()
        self._client, self._avatar, self._sample_rate, self._size = client, avatar, sample_rate, size
        self._generator: VideoGenerator | None = None
        self._voice: agents.QueueAudioOutput | None = None
        self._runner: agents.AvatarRunner | None = None
        self._watching: asyncio.Task[None] | None = None

    @property
    def avatar_identity(self) -> str:
        """The participant that shows the avatar: the agent itself."""
        return "" if self._room is None else self._room.local_participant.identity

    @property
    def provider(self) -> str:
        """Who animates it."""
        return "talksplat"

    @property
    def listening(self) -> float:
        """See `VideoGenerator.listening`; 0 before `start`."""
        return 0.0 if self._generator is None else self._generator.listening

    @listening.setter
    def listening(self, share: float) -> None:
        if self._generator is not None:
            self._generator.listening = share

    async def start(self, agent_session: AgentSession[Any], room: rtc.Room) -> None:
        """Show the avatar, and have the agent speak through it. Call it before `AgentSession.start`.

        Raises:
            UnknownAvatarError, and the other errors of `AsyncClient.preload`: nothing was changed.
        """
        generator = await VideoGenerator.open(
            self._client, self._avatar, sample_rate=self._sample_rate, size=self._size
        )
        await super().start(agent_session, room)
        self._voice = voice = agents.QueueAudioOutput(sample_rate=self._sample_rate, wait_playback_start=True)
        self._generator = generator
        self._runner = agents.AvatarRunner(room, audio_recv=voice, video_gen=generator, options=generator.options)
        generator.av_sync = self._runner.av_sync
        await self._runner.start()
        self._watching = asyncio.create_task(self._watch(self._runner, agent_session))
        agent_session.output.replace_audio_tail(voice)

    async def aclose(self) -> None:
        """Take the face away, and with it the voice; the agent stays in its room."""
        self._silence()
        if self._watching is not None:
            await aio.cancel_and_wait(self._watching)
        if self._generator is not None:
            await self._generator.aclose()
        if self._runner is not None:
            await self._runner.aclose()
        self._watching = self._generator = self._runner = None
        if self._room is not None:  # the base class would remove the avatar's participant, which is the agent's
            self._room.off("connection_state_changed", self._on_connection_state_changed)
            self._room = None
        await super().aclose()

    def _silence(self) -> None:
        """The agent has no voice from now on, and nobody waits for what will never be heard."""
        voice, self._voice = self._voice, None
        if voice is None or self._agent_session is None:
            return
        self._agent_session.output.audio = None
        for _ in range(voice._pending_playback_count):
            voice.on_playback_finished(playback_position=0.0, interrupted=True)

    async def _watch(self, runner: agents.AvatarRunner, agent_session: AgentSession[Any]) -> None:
        try:
            await runner.wait_for_complete()
        except TalksplatError as error:
            logger.error("the avatar is lost: %s", error)
            self._silence()
            agent_session.emit("error", ErrorEvent(error=error, source=self))
