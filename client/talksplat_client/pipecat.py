"""Pipecat: gives a pipeline's voice a face.

    face = TalksplatVideoService(AsyncClient("127.0.0.1:8001"), "ava")
    pipeline = Pipeline([transport.input(), stt, user, llm, tts, face, transport.output(), assistant])

Needs the extra ``pipecat``: ``pip install 'talksplat-client[pipecat]'``. The transport wants the parameters
``audio_out_enabled``, ``video_out_enabled``, ``video_out_is_live``, ``video_out_framerate`` 25, and the avatar's width
and height.
"""

from __future__ import annotations

import asyncio
import contextlib

import numpy as np
from pipecat.frames.frames import (
    CancelFrame,
    EndFrame,
    Frame,
    InterruptionFrame,
    OutputImageRawFrame,
    StartFrame,
    SystemFrame,
    TTSAudioRawFrame,
    TTSStoppedFrame,
    UserStartedSpeakingFrame,
    UserStoppedSpeakingFrame,
)
from pipecat.processors.frame_processor import FrameDirection, FrameProcessorSetup
from pipecat.services.ai_service import AIService
from pipecat.services.settings import ServiceSettings

from ._asyncio import AsyncClient
from ._exceptions import TalksplatError
from ._live import LiveStream, Moment

BUFFER_SECONDS = 0.04  # of sound, for the transport; of pictures too, which it may show at once


class TalksplatVideoService(AIService):
    """Takes the sound of a speech synthesiser, gives frames with it; rests between, listens while a user speaks.

    Each `OutputImageRawFrame` is followed by the `TTSAudioRawFrame` that belongs to it; both have the same pts. All
    other frames stay where they were between the sounds. An interruption drops what was not spoken yet.

    Where there is no face (an unknown avatar, a server that is lost), the voice goes on without one: an error frame
    goes upstream, whose ``exception`` is the TalksplatError, and the service is no longer usable.

    Args:
        client: of the talksplat server.
        avatar: its id.
        size: height and width of the frames in pixels; None: the avatar's own.
        name: of the processor.
    """

    def __init__(self, client: AsyncClient, avatar: str, *, size: int | None = None, name: str | None = None) -> None:
        super().__init__(settings=ServiceSettings(model=None), name=name)
        self._client, self._avatar, self._size = client, avatar, size
        self._sample_rate = 0  # Hz, of the pipeline
        self._stream: LiveStream[Frame] | None = None
        self._task: asyncio.Task[None] | None = None

    async def setup(self, setup: FrameProcessorSetup) -> None:  # type: ignore[override]  # as Pipecat's own
        """See `AIService.setup`."""
        await super().setup(setup)
        self._sample_rate = setup.audio_out_sample_rate

    async def start(self, frame: StartFrame) -> None:
        """Load the avatar."""
        await super().start(frame)
        try:
            self._stream = await LiveStream.open(
                self._client,
                self._avatar,
                sample_rate=self._sample_rate,
                lead=BUFFER_SECONDS,
                size=self._size,
                format="raw",
            )
        except TalksplatError as error:
            await self._lose(error)

    async def stop(self, frame: EndFrame) -> None:
        """Say what is left, then rest no more."""
        await super().stop(frame)
        if self._stream is not None and self._task is not None:
            self._stream.finish()
            self._stream.mark(frame)
            await self._task
        await self._close()

    async def cancel(self, frame: CancelFrame) -> None:
        """Stop at once."""
        await super().cancel(frame)
        await self._close()

    async def cleanup(self) -> None:
        """See `AIService.cleanup`."""
        await super().cleanup()  # type: ignore[no-untyped-call]
        await self._close()

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """See `AIService.process_frame`."""
        await super().process_frame(frame, direction)
        if self._stream is not None and isinstance(frame, InterruptionFrame):
            await self._interrupt(self._stream)
        if self._stream is None or direction is FrameDirection.UPSTREAM:
            await self.push_frame(frame, direction)
        elif isinstance(frame, SystemFrame):
            if isinstance(frame, (UserStartedSpeakingFrame, UserStoppedSpeakingFrame)):
                self._stream.listening = float(isinstance(frame, UserStartedSpeakingFrame))
            await self.push_frame(frame, direction)
            if isinstance(frame, StartFrame):
                self._task = self.create_task(self._show(self._stream))
        elif isinstance(frame, TTSAudioRawFrame):
            self._stream.say(np.frombuffer(frame.audio, np.int16).reshape(-1, frame.num_channels), frame.sample_rate)
        else:
            if isinstance(frame, TTSStoppedFrame):
                self._stream.finish()
            self._stream.mark(frame)

    async def _show(self, stream: LiveStream[Frame]) -> None:
        base = self.get_clock().get_time() - round(1e9 * asyncio.get_running_loop().time())  # ns
        try:
            async with contextlib.aclosing(stream.moments()) as moments:
                async for each in moments:
                    if isinstance(each, EndFrame):
                        return
                    frames = self._outputs(stream, each, base) if isinstance(each, Moment) else [each]
                    for frame in frames:
                        await self.push_frame(frame)
        except TalksplatError as error:
            await self._lose(error)
            for mark in await stream.interrupt():
                if not isinstance(mark, EndFrame):  # `stop` has it
                    await self.push_frame(mark)

    def _outputs(self, stream: LiveStream[Frame], moment: Moment, base: int) -> list[Frame]:
        outputs: list[Frame] = [OutputImageRawFrame(moment.frame.data, (stream.size, stream.size), "RGB")]
        if moment.sound is not None:
            outputs.append(TTSAudioRawFrame(moment.sound.tobytes(), stream.sample_rate, 1))
        for output in outputs:
            output.pts = base + round(1e9 * moment.due)
        return outputs

    async def _interrupt(self, stream: LiveStream[Frame]) -> None:
        for mark in await stream.interrupt():
            if not mark.interruptible:
                stream.mark(mark)

    async def _lose(self, error: TalksplatError) -> None:
        self._stream = None
        await self.push_error(str(error), exception=error, force_treat_as_permanent=True)

    async def _close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.close()
        task, self._task = self._task, None
        if task is not None:
            await self.cancel_task(task)
