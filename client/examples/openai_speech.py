"""Any voice with OpenAI's ``audio/speech``: ``python openai_speech.py "Hello." out.mp4``. Extras ``media``, ``llm``.

Whatever answers ``POST /v1/audio/speech``, OpenAI or a server of your own (OPENAI_BASE_URL, OPENAI_API_KEY), gives PCM
when asked for ``response_format="pcm"``: int16, mono, 24 kHz. It goes straight into `animate`, and frames come while it
is still being spoken. In an agent, hand the same packets to `AvatarSession`, `TalksplatVideoService` or `AvatarTracks`.
"""

import sys
from collections import deque
from collections.abc import Iterator

from openai import OpenAI

from talksplat_client import Client, Mp4Writer

RATE = 24_000  # Hz, of the API's PCM


def main(text: str, path: str, url: str = "127.0.0.1:8001", avatar: str = "ava") -> None:
    """Write a film in which the avatar says the text."""
    speech, heard = OpenAI().audio.speech.with_streaming_response, deque[bytes]()
    with (
        speech.create(model="tts-1", voice="alloy", input=text, response_format="pcm") as voice,
        Client(url) as client,
        Mp4Writer(path, sample_rate=RATE) as film,
    ):

        def packets() -> Iterator[bytes]:
            for packet in voice.iter_bytes(RATE // 5):
                heard.append(packet)
                yield packet

        for frame in client.animate(packets(), avatar=avatar, sample_rate=RATE):
            film.write(frame)
            while heard:
                film.write_audio(heard.popleft())


if __name__ == "__main__":
    main(*sys.argv[1:])
