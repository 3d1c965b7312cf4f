"""Conversations through the real server, with demo/speech.wav for the person; a scripted endpoint for the model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import runpy
import time
import wave
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from talksplat.server import Server
from talksplat_client import AsyncClient, InvalidRequestError, UnknownAvatarError, read_audio, sentences
from talksplat_client.converse import (
    AHEAD_SECONDS,
    ChatModel,
    Event,
    Failed,
    Interrupted,
    Message,
    Moment,
    Resumed,
    Scripted,
    Sentence,
    Turn,
    TurnBegan,
    TurnEnded,
    _whole,
    converse,
)

Each = TypeVar("Each")

RATE = 16_000
GREETING = 1.9  # seconds of demo/speech.wav: "Hello, and welcome.", up to the middle of the pause after it
DEADLINE = 60.0  # generous: seconds


def greeting() -> npt.NDArray[np.int16]:
    with wave.open(str(Path(__file__).parents[2] / "demo" / "speech.wav")) as file:
        assert file.getframerate() == RATE
        return np.frombuffer(file.readframes(round(GREETING * RATE)), np.int16)


def silence(seconds: float) -> npt.NDArray[np.int16]:
    return np.zeros(round(seconds * RATE), np.int16)


def hum() -> npt.NDArray[np.int16]:
    """What the models take for speech, but for no word."""
    time = np.arange(round(0.6 * RATE)) / RATE
    phase = 2 * np.pi * 150 * time + 0.25 * np.sin(2 * np.pi * 5 * time)
    tone = sum(np.sin(number * phase) / number**2 for number in range(1, 8))
    return np.asarray(8000 * tone * np.clip(20 * time, 0, 1) * np.clip(20 * (time[-1] - time), 0, 1), np.int16)


async def live(*sounds: npt.NDArray[np.int16]) -> AsyncGenerator[npt.NDArray[np.int16], None]:
    """As from a microphone."""
    loop = asyncio.get_running_loop()
    start, given = loop.time(), 0
    for sound in sounds:
        for begin in range(0, len(sound), 640):
            given += 640
            await asyncio.sleep(max(0.0, start + given / RATE - loop.time()))
            yield sound[begin : begin + 640]


class Microphone:
    """Hears `sound`, the greeting, whenever the test says so, and silence otherwise, until it is off."""

    def __init__(self) -> None:
        self.speaks = asyncio.Event()
        self.sound = greeting()
        self.off = False

    async def packets(self) -> AsyncGenerator[npt.NDArray[np.int16], None]:
        while not self.off:
            sound = self.sound if self.speaks.is_set() else silence(0.04)
            self.speaks.clear()
            async for packet in live(sound):
                yield packet


async def collected(events: AsyncGenerator[Event, None]) -> list[Event]:
    async with asyncio.timeout(DEADLINE), contextlib.aclosing(events):
        return [event async for event in events]


def only(kind: type[Each], events: Sequence[object]) -> list[Each]:
    return [event for event in events if isinstance(event, kind)]


async def test_a_rate_of_no_voice_is_refused() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(InvalidRequestError, match="speak_rate"):
            await anext(converse(client, silence(1), avatar="ava", speak_rate=24_000))


async def test_who_speaks_is_answered_and_frames_come_all_the_while(server: Server) -> None:
    async with AsyncClient(server.grpc_url) as client:
        talk = converse(client, live(silence(0.5), greeting(), silence(1.5)), avatar="red", format="raw", size=64)
        events = await collected(talk)
    told = [type(event).__name__ for event in events if not isinstance(event, Moment)]
    assert told == ["TurnBegan", "TurnEnded", "Sentence", "Turn", "Sentence"]
    [began], [ended], [turn] = only(TurnBegan, events), only(TurnEnded, events), only(Turn, events)
    assert "welcome" in ended.text.lower()
    assert 0.5 <= began.at < ended.at < 0.5 + GREETING
    assert [event.text for event in only(Sentence, events)] == [
        "Hello!",
        "I answer from a script, since no language model is connected.",
    ]
    assert turn.text == ended.text
    assert min(turn.end_of_speech, turn.recognition, turn.reply, turn.voice, turn.first_frame) >= 0
    moments = only(Moment, events)
    assert [moment.frame.index for moment in moments] == list(range(len(moments)))
    spoken = [moment for moment in moments if moment.sound is not None]
    assert all(moment.sound is not None and len(moment.sound) == RATE // 25 for moment in spoken)
    assert sum(moment.frame.speech > 0.5 for moment in spoken) > len(spoken) / 2
    assert events.index(turn) == events.index(spoken[0]) + 1


async def test_who_interrupts_silences_the_avatar_and_what_was_heard_is_remembered(server: Server) -> None:
    asked: list[list[Message]] = []

    async def respond(messages: Sequence[Message], /) -> AsyncIterator[str]:
        asked.append(list(messages))
        yield "I answer from a script, since no language model is connected. You are welcome. " * 3

    microphone = Microphone()
    microphone.speaks.set()
    told: list[Event] = []
    spoke = stopped = 0.0  # when
    after: list[Moment] = []  # the interruption
    async with AsyncClient(server.grpc_url) as client, asyncio.timeout(DEADLINE):
        talk = converse(client, microphone.packets(), avatar="red", respond=respond, format="raw", size=64)
        async with contextlib.aclosing(talk) as events:
            spoken = 0
            async for event in events:
                if isinstance(event, Moment):
                    spoken += event.sound is not None
                    if spoken == 25:
                        microphone.speaks.set()
                        spoke = time.monotonic()
                    if only(Interrupted, told) and not only(Sentence, told[told.index(only(Interrupted, told)[0]) :]):
                        after.append(event)
                    continue
                told.append(event)
                stopped = time.monotonic() if isinstance(event, Interrupted) else stopped
                if len(only(TurnEnded, told)) == 2:
                    break
    names = [type(event).__name__ for event in told]
    assert names[:5] == ["TurnBegan", "TurnEnded", "Sentence", "Turn", "Interrupted"]
    assert names[-2:] == ["TurnBegan", "TurnEnded"]
    assert 0 < stopped - spoke < 5  # the greeting begins with half a second of silence; bench has the figure
    assert after
    assert all(moment.sound is None for moment in after)  # not one frame more of the old answer
    [interrupted] = only(Interrupted, told)
    assert interrupted.said.endswith(" \u2014")
    assert interrupted.said.startswith("I answer from")
    assert [(each.role, each.content) for each in asked[-1]][1] == ("assistant", interrupted.said)
    assert [each.role for each in asked[-1]] == ["user", "assistant", "user"]


async def test_a_noise_silences_the_avatar_and_then_it_goes_on_where_it_was(server: Server) -> None:
    asked = made = 0
    made_at = dict[type, int]()
    answer = np.random.default_rng(0).integers(-9000, 9000, round(2.5 * RATE)).astype(np.int16)

    async def respond(messages: Sequence[Message], /) -> AsyncIterator[str]:
        nonlocal asked
        asked += 1
        yield "One two three. Four."

    async def speak(sentence: str) -> AsyncIterator[npt.NDArray[np.int16]]:
        nonlocal made
        for piece in np.array_split(answer if "One" in sentence else answer[:8000], 10):
            await asyncio.sleep(0.1)  # not all of it is there when it is interrupted
            made += 1
            yield piece

    microphone, events, asked_before = Microphone(), list[Event](), 0
    microphone.speaks.set()
    async with AsyncClient(server.grpc_url) as client, asyncio.timeout(DEADLINE):
        talk = converse(client, microphone.packets(), avatar="red", respond=respond, speak=speak, format="raw", size=64)
        async with contextlib.aclosing(talk) as each:
            async for event in each:
                events.append(event)
                made_at.setdefault(type(event), made)
                if isinstance(event, Turn):
                    microphone.sound, asked_before = hum(), asked
                    microphone.speaks.set()
                microphone.off = microphone.off or isinstance(event, Resumed)
    told = [type(event).__name__ for event in events if not isinstance(event, Moment)]
    assert told == [
        *("TurnBegan", "TurnEnded", "Sentence", "Turn"),
        *("Interrupted", "TurnBegan", "TurnEnded", "Resumed", "Sentence"),
    ]
    begin, end = (
        next(n for n, event in enumerate(events) if isinstance(event, kind)) for kind in (Interrupted, Resumed)
    )
    held = only(Moment, events[begin:end])
    assert held
    assert all(moment.sound is None for moment in held)
    heard = np.concatenate([moment.sound for moment in only(Moment, events) if moment.sound is not None])
    np.testing.assert_array_equal(heard[: len(answer) + 8000], np.concatenate([answer, answer[:8000]]))  # each once
    assert asked == asked_before
    assert made_at[Resumed] <= made_at[Interrupted] + 1 < made  # no more of the voice is asked for meanwhile


async def test_whoever_is_slow_to_take_events_misses_no_turn_and_late_texts_are_asked_once(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is taken for as long as it takes to end a turn and to interrupt its answer."""
    recognise, asked = AsyncClient.transcribe, list[list[str]]()

    async def late(client: AsyncClient, audio: npt.NDArray[np.float32]) -> str:
        text = await recognise(client, audio)
        await asyncio.sleep(0.5)
        return text

    async def respond(messages: Sequence[Message], /) -> AsyncIterator[str]:
        asked.append([message.role for message in messages])
        yield "You are welcome."

    over = asyncio.Event()

    async def sound() -> AsyncIterator[npt.NDArray[np.int16]]:
        async for packet in live(greeting(), silence(1.5), greeting(), silence(1.5)):
            yield packet
        over.set()

    monkeypatch.setattr(AsyncClient, "transcribe", late)
    events: list[Event] = []
    async with AsyncClient(server.grpc_url) as client, asyncio.timeout(DEADLINE):
        talk = converse(client, sound(), avatar="red", respond=respond, format="raw", size=64)
        async with contextlib.aclosing(talk) as each:
            async for event in each:
                if isinstance(event, TurnBegan) and not events:
                    await over.wait()
                events += [] if isinstance(event, Moment) else [event]
    names = [type(event).__name__ for event in events]
    assert names == ["TurnBegan", "TurnEnded", "Interrupted", "TurnBegan", "TurnEnded", "Sentence", "Turn"]
    assert asked == [["user"], ["user", "user"]]


async def test_an_answer_without_an_end_is_not_made_long_before_it_is_heard(server: Server) -> None:
    made = 0  # sentences of the latest guess

    async def respond(messages: Sequence[Message], /) -> AsyncIterator[str]:
        nonlocal made
        made = 0
        while True:
            yield "And so on. "

    async def hum(sentence: str) -> AsyncIterator[npt.NDArray[np.float32]]:
        nonlocal made
        made += 1
        yield np.full(RATE, 0.1, np.float32)  # a second

    async with AsyncClient(server.grpc_url) as client, asyncio.timeout(DEADLINE):
        sound = live(greeting(), silence(0.4))
        talk = converse(client, sound, avatar="red", respond=respond, speak=hum, format="raw", size=64)
        async with contextlib.aclosing(talk) as events:
            spoken = 0
            async for event in events:
                spoken += isinstance(event, Moment) and event.sound is not None
                if spoken == 50:
                    break
    assert AHEAD_SECONDS < made <= AHEAD_SECONDS + 3


async def test_a_responder_or_a_voice_that_fails_ends_the_turn_and_not_the_conversation(server: Server) -> None:
    async def respond(messages: Sequence[Message], /) -> AsyncIterator[str]:
        if len(messages) == 1:
            raise ConnectionError("no model")
        yield "Hello!"

    turns = [greeting(), silence(0.8)]
    async with AsyncClient(server.grpc_url) as client:
        talk = converse(client, live(*turns, *turns), avatar="red", respond=respond, format="raw", size=64)
        events = await collected(talk)
        [failed] = only(Failed, events)
        assert isinstance(failed.error, ConnectionError)
        assert [type(each).__name__ for each in events if not isinstance(each, Moment)] == [
            *("TurnBegan", "TurnEnded", "Failed", "TurnBegan", "TurnEnded", "Sentence", "Turn"),
        ]

        async def mute(sentence: str) -> AsyncIterator[npt.NDArray[np.float32]]:
            if sentence:
                raise InvalidRequestError(f"can't say {sentence!r}")
            yield np.zeros(1, np.float32)

        events = await collected(converse(client, live(*turns), avatar="red", speak=mute, format="raw", size=64))
        assert isinstance(only(Failed, events)[0].error, InvalidRequestError)
        assert not only(Sentence, events)


async def test_any_voice_will_do_at_its_own_rate(server: Server) -> None:
    async def hum(sentence: str) -> AsyncIterator[npt.NDArray[np.int16]]:
        for _ in range(5):
            yield np.full(2400, 8000, np.int16)

    async with AsyncClient(server.grpc_url) as client:
        sound = live(greeting(), silence(0.8))
        events = await collected(
            converse(client, sound, avatar="red", speak=hum, speak_rate=24_000, format="raw", size=64)
        )
    heard = np.concatenate([each.sound for each in only(Moment, events) if each.sound is not None])
    assert int((heard == 8000).sum()) == 2 * 5 * 2400  # two sentences, nothing lost


async def test_the_example_films_the_answer_to_a_recording(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = runpy.run_path(str(Path(__file__).parents[2] / "client" / "examples" / "converse.py"))
    with wave.open(str(tmp_path / "question.wav"), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(greeting().tobytes())
    await example["main"](str(tmp_path / "talk.mp4"), str(tmp_path / "question.wav"), server.grpc_url, "red")
    assert "TurnEnded(text='Hello, and welcome" in capsys.readouterr().out
    film = read_audio(tmp_path / "talk.mp4")
    sound = np.concatenate(list(film.packets))
    assert film.seconds is not None
    assert film.seconds > GREETING + 3  # the question and its answer
    assert np.abs(sound[: film.sample_rate]).max() < 0.01  # it says nothing meanwhile
    assert np.abs(sound).max() > 0.1


async def test_what_is_wrong_with_avatar_or_audio_is_raised(server: Server) -> None:
    async def broken() -> AsyncIterator[npt.NDArray[np.int16]]:
        yield silence(0.2)
        raise OSError("the microphone is gone")

    async with AsyncClient(server.grpc_url) as client:
        with pytest.raises(UnknownAvatarError):
            await collected(converse(client, live(silence(1)), avatar="nobody"))
        with pytest.raises(OSError, match="microphone is gone"):
            await collected(converse(client, broken(), avatar="red", format="raw", size=64))
    assert [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("talksplat")] == []


# Language models: a scripted endpoint of OpenAI's kind, over real HTTP.


class ScriptedEndpoint:
    """Speaks the API's event stream; what it says, and what it does wrong, the test says."""

    def __init__(self, parts: Sequence[str], *, status: int = 200, endless: bool = False) -> None:
        self.parts, self.status, self.endless = parts, status, endless
        self.requests: list[dict[str, object]] = []
        self.closed = asyncio.Event()  # by the client, before the answer ended

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(
            int(line.split(":")[1]) for line in head.splitlines() if line.lower().startswith("content-length")
        )
        self.requests.append({"head": head, **json.loads(await reader.readexactly(length))})
        kind = "text/event-stream" if self.status == 200 else "application/json"
        writer.write(f"HTTP/1.1 {self.status} X\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n".encode())
        if self.status != 200:
            writer.write(b'{"error": {"message": "no such model"}}')
        for part in self.parts:
            piece = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"}
            choice = {"index": 0, "delta": {"content": part}, "finish_reason": None}
            writer.write(f"data: {json.dumps({**piece, 'choices': [choice]})}\n\n".encode())
        await writer.drain()
        if self.endless:
            await reader.read()  # until the client closes
            self.closed.set()
        elif self.status == 200:
            writer.write(b"data: [DONE]\n\n")
        writer.close()


async def test_a_language_model_is_asked_with_all_that_was_said_and_spoken_as_it_writes(server: Server) -> None:
    endpoint = ScriptedEndpoint(["You are", " welc", "ome. He", "llo!"])
    async with AsyncClient(server.grpc_url) as client, endpoint.serving() as url:
        model = ChatModel("small", url=url, key="secret", prompt="Be brief.")
        talk = converse(client, live(greeting(), silence(0.8)), avatar="red", respond=model, format="raw", size=64)
        events = await collected(talk)
    assert [event.text for event in only(Sentence, events)] == ["You are welcome.", "Hello!"]
    assert endpoint.requests[-1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": only(TurnEnded, events)[0].text},
    ]
    assert "Bearer secret" in str(endpoint.requests[-1]["head"])


async def test_a_model_that_refuses_is_an_error_and_one_that_is_no_longer_wanted_is_hung_up_on() -> None:
    question = [Message("user", "Hello?")]
    async with ScriptedEndpoint([], status=404).serving() as url:
        with pytest.raises(Exception, match="no such model"):
            [part async for part in ChatModel("small", url=url, key="k")(question)]
    endpoint = ScriptedEndpoint(["One. ", "Two. ", "Three"], endless=True)
    async with endpoint.serving() as url, asyncio.timeout(DEADLINE):
        whole = _whole(ChatModel("small", url=url, key="k")(question))
        assert [await anext(whole), await anext(whole)] == ["One.", "Two."]  # while it still writes
        assert not endpoint.closed.is_set()
        await whole.aclose()
        await endpoint.closed.wait()


async def test_a_slow_model_is_waited_for_while_the_avatar_is_at_rest_and_can_be_interrupted(server: Server) -> None:
    closed = asyncio.Event()

    async def respond(messages: Sequence[Message], /) -> AsyncIterator[str]:
        try:
            await asyncio.sleep(DEADLINE)
            yield "Too late."
        finally:
            closed.set()

    microphone = Microphone()
    microphone.speaks.set()
    async with AsyncClient(server.grpc_url) as client, asyncio.timeout(DEADLINE):
        talk = converse(client, microphone.packets(), avatar="red", respond=respond, format="raw", size=64)
        async with contextlib.aclosing(talk) as events:
            moments = 0
            async for event in events:
                assert not isinstance(event, Sentence)
                if isinstance(event, TurnEnded):
                    closed.clear()  # guesses that were given up
                    microphone.speaks.set()
                moments += isinstance(event, Moment)
                if isinstance(event, Interrupted):
                    assert event.said == ""
                    break
    assert closed.is_set()
    assert moments > 10


# Pure


async def parts_of(text: str, cuts: Sequence[int]) -> AsyncIterator[str]:
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        yield text[begin:end]


PARTS = ["Yes.", "Dr. Who came!", "A b c?", "no", "\u201cSo\u2026\u201d", "\n", "\u2014", "..."]


@given(st.lists(st.sampled_from(PARTS), max_size=8), st.sampled_from([" ", "  ", "\n"]), st.data())
def test_a_text_that_comes_in_parts_has_the_sentences_of_the_whole(
    said: list[str], between: str, data: st.DataObject
) -> None:
    text = between.join(said)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))

    async def work() -> list[str]:
        return [sentence async for sentence in _whole(parts_of(text, cuts))]

    assert asyncio.run(work()) == sentences(text)


async def answered(messages: Sequence[Message], respond: Callable[..., AsyncIterator[str]]) -> str:
    return "".join([part async for part in respond(messages)])


async def test_the_script_says_that_it_is_one_in_its_first_answer() -> None:
    for text in ("Hello.", "Thank you.", "Who are you?", "A large latte.", "Goodbye.", "Hm."):
        assert "script" in await answered([Message("user", text)], Scripted())
    later = [Message("user", "Hello."), Message("assistant", "Hello!"), Message("user", "Thank you.")]
    assert await answered(later, Scripted()) == "You are welcome."
