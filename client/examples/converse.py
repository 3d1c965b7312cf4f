"""Talk to an avatar: ``python converse.py talk.mp4 [question.wav]`` beside ``make serve``; headset, extra ``media``."""

import asyncio
import sys
import time
from collections.abc import Iterator

import numpy as np

from talksplat_client import AsyncClient, Mp4Writer, Pcm, Recording, microphone, read_audio
from talksplat_client.converse import Moment, converse


def live(sound: Recording) -> Iterator[Pcm]:
    """As if it were being said."""
    said = time.monotonic()
    for packet in sound.packets:
        said += packet.size / sound.sample_rate
        time.sleep(max(0.0, said - time.monotonic()))
        yield packet


async def main(film: str, question: str = "", url: str = "127.0.0.1:8001", avatar: str = "ava") -> None:
    """Write what the avatar does, print what is said."""
    sound = read_audio(question) if question else Recording(48_000, None, microphone())
    async with AsyncClient(url) as client:
        clock = await client.clock()
        with Mp4Writer(film, sample_rate=clock.sample_rate) as file:
            async for event in converse(client, live(sound), avatar=avatar, sample_rate=sound.sample_rate):
                if isinstance(event, Moment):
                    file.write(event.frame)
                    file.write_audio(np.zeros(clock.samples_per_frame) if event.sound is None else event.sound)
                else:
                    print(event)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
