"""Somebody speaks, an avatar answers: from sound to frames, and frames all the while.

    async with aclosing(converse(client, packets, avatar="ava", sample_rate=48_000)) as events:
        async for event in events:
            if isinstance(event, Moment):
                show(event.frame, event.sound)

What is said is recognised, answered and spoken as a guess while its end is still being confirmed; a guess is thrown
away when the person goes on. `_turns` decides when a turn ends. The microphone must not hear the avatar: a headset, or
the echo cancellation of the system or of a browser, is assumed; without one the avatar interrupts itself.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import numpy as np

from ._asyncio import AsyncClient, Audio, _async_packets
from ._audio import Pcm, Samples, Track, to_mono
from ._clock import Clock
from ._exceptions import InvalidRequestError, MissingExtraError
from ._live import LiveStream, Moment
from ._speaking import sentences
from ._state import Format
from ._turns import EndOfSpeech, TurnEvent, Turns, conversation

__all__ = [
    "ChatModel",
    "Event",
    "Failed",
    "Interrupted",
    "Message",
    "Moment",
    "Responder",
    "Resumed",
    "Scripted",
    "Sentence",
    "Turn",
    "TurnBegan",
    "TurnEnded",
    "converse",
]

Item = TypeVar("Item")

AHEAD_SECONDS = 30.0  # of an answer's sound that are made before they are heard: some answers have no end

PROMPT = (
    "You are a friendly talking avatar. What you write is spoken aloud: answer in one to three short sentences, "
    "in plain words, without lists, markup or emoji."
)


@dataclass(frozen=True)
class Message:
    """Something that was said."""

    role: Literal["user", "assistant"]
    content: str  # of an interrupted answer what was heard, with a dash after it


class Responder(Protocol):
    """Who answers: anything that takes what was said so far, the question last, and yields the answer's text."""

    def __call__(self, messages: Sequence[Message], /) -> AsyncIterator[str]:
        """Yield the text in parts of any length. It is closed when the answer is no longer wanted."""
        ...


@dataclass(frozen=True)
class TurnBegan:
    """The person speaks; the avatar listens."""

    at: float  # seconds of the sound: where they began


@dataclass(frozen=True)
class TurnEnded:
    """The person has finished."""

    text: str  # empty where it was only a noise, which nobody answers
    at: float  # seconds of the sound: where they ended


@dataclass(frozen=True)
class Sentence:
    """The avatar begins to say this; the moments that follow are its own."""

    text: str


@dataclass(frozen=True)
class Turn:
    """How long the person waited, in seconds; follows the answer's first `Moment`. The stages add up."""

    text: str  # what the person said
    end_of_speech: float  # from the last frame of speech until the silence was long enough
    recognition: float  # until the text was there, where that was later
    reply: float  # until the first sentence of the answer, if it was not there by then
    voice: float  # until its first sound
    first_frame: float  # until its first frame

    @property
    def answer(self) -> float:
        """All of it."""
        return self.end_of_speech + self.recognition + self.reply + self.voice + self.first_frame


@dataclass(frozen=True)
class Interrupted:
    """The person spoke while the avatar did, or was about to: it is silent, for good if a word is recognised."""

    said: str  # what was heard of the answer


@dataclass(frozen=True)
class Resumed:
    """What interrupted the avatar was only a noise: it goes on with its answer, after the last moment of it.

    With a ``lead``, moments that a player threw away when it was interrupted do not come again.
    """


@dataclass(frozen=True)
class Failed:
    """Recognition, responder or voice failed: the turn is over, the conversation goes on."""

    error: Exception


Event: TypeAlias = Moment | TurnBegan | TurnEnded | Sentence | Turn | Interrupted | Resumed | Failed


class Scripted:
    """Answers from the script of conversation.json, and says that it does."""

    def __init__(self, rules: Sequence[Mapping[str, str]] | None = None) -> None:
        self._rules: Sequence[Mapping[str, str]] = conversation()["script"] if rules is None else rules

    async def __call__(self, messages: Sequence[Message], /) -> AsyncIterator[str]:
        """What the first rule says whose expression is found."""
        text = messages[-1].content
        says = next((rule["says"] for rule in self._rules if re.search(rule["hears"], text, re.I | re.ASCII)), "")
        yield says
        first = not any(message.role == "assistant" for message in messages)
        if first and not re.search(r"\bscript\b", says, re.IGNORECASE):
            yield " " + sentences(conversation()["script"][-1]["says"])[-1]


class ChatModel:
    """Answers with a language model behind any endpoint of OpenAI's kind; needs the extra ``llm``.

    Args:
        model: its name there.
        url: of the endpoint, before ``/chat/completions``; None: the environment's, or OpenAI's own.
        key: None: that of the environment, ``OPENAI_API_KEY``.
        prompt: what the model is told beforehand.

    Raises:
        MissingExtraError: the package is not installed.
    """

    def __init__(self, model: str, *, url: str | None = None, key: str | None = None, prompt: str = PROMPT) -> None:
        try:
            from openai import AsyncOpenAI
        except ImportError:
            raise MissingExtraError("a language model", "openai", "llm") from None
        self._client = AsyncOpenAI(base_url=url, api_key=key, max_retries=1)
        self._model, self._prompt = model, prompt

    async def __call__(self, messages: Sequence[Message], /) -> AsyncIterator[str]:
        """The text as it is made. Errors are those of ``openai``."""
        said: list[Any] = [{"role": "system", "content": self._prompt}, *map(asdict, messages)]
        async with await self._client.chat.completions.create(model=self._model, messages=said, stream=True) as parts:
            async for part in parts:
                if part.choices and (text := part.choices[0].delta.content):
                    yield text


async def converse(
    client: AsyncClient,
    audio: Audio,  # what the person's microphone hears, as it comes
    *,
    avatar: str,
    sample_rate: int | None = None,  # Hz, of ``audio``; None: the server's
    respond: Responder | None = None,  # None: `Scripted`
    speak: Callable[[str], AsyncIterable[Pcm]] | None = None,  # a sentence -> its sound; None: the server's voice
    speak_rate: int | None = None,  # Hz, of that sound and of the moments'; None: the server's
    lead: float = 0.0,  # seconds by which moments of speech may come before they are due, for those who buffer sound
    size: int | None = None,  # height and width of the frames in pixels; None: the avatar's own
    format: Format = "jpeg",
) -> AsyncGenerator[Event, None]:
    """Talk with somebody.

    Moments come as time passes, one a frame, without end: at rest, listening, speaking. Their frames are numbered
    without a gap, but for the one that an interruption drops. The other events come between them. Whoever speaks for
    `EndOfSpeech.begin_seconds` while the avatar does interrupts it; if no word was in that, it goes on. When the audio
    ends, what was said is still answered.

    Yields:
        See the classes of `Event`.

    Raises:
        InvalidRequestError: ``speak_rate`` is given, and the voice is the server's.
        TalksplatError: the server is lost, the avatar unknown, or the audio not what was announced.
        Exception: whatever the audio raises.
    """
    if speak is None and speak_rate is not None:
        raise InvalidRequestError("speak_rate is that of another voice's sound, but there is no speak")
    clock = await client.clock()
    track = Track(clock.rate(sample_rate), clock.sample_rate, clock.samples_per_frame)
    live = await LiveStream[Any].open(
        client, avatar, sample_rate=clock.rate(speak_rate), lead=lead, size=size, format=format
    )
    talk = _Conversation(client, clock, track, live, respond or Scripted(), speak or client.synthesize)
    hearing = asyncio.create_task(talk.hear(audio), name="talksplat-ears")
    try:
        async with aclosing(live.moments()) as moments:
            async for each in moments:
                if isinstance(each, _Spoken):
                    talk.spoken(each.answer)
                    continue
                turn = talk.seen(each)  # before it is taken: what comes meanwhile may be another answer's
                yield each
                if turn is not None:
                    yield turn
        await hearing
    finally:
        await talk.close(hearing)


class _Answer:
    """To what the person has probably said. What it does is held back until that is sure."""

    def __init__(self) -> None:
        self.text: str | None = None  # what they have said, once that is known
        self.known = asyncio.Event()  # it is, or never will be
        self.task: asyncio.Task[None] | None = None
        self.replied = self.sounded = 0.0  # when its first sentence and its first sound were there
        self.waits: tuple[float, float, float] | None = None  # when speech, its silence and the turn ended
        self.shown = self.made = 0  # samples
        self.goes_on = asyncio.Event()  # more was shown, or may be
        self.sentences: list[tuple[str, int]] = []  # that are being said, each with the samples before it
        self.samples = 0  # of all of them, so far
        self._held: list[Callable[[], None]] | None = []
        self._silenced = False

    def do(self, action: Callable[[], None]) -> None:
        """Now, or when `release` is called."""
        if self._held is None:
            action()
        else:
            self._held.append(action)

    async def room(self, samples: int) -> None:
        """Wait until it may be heard, and fewer than so many samples are made and not shown."""
        while self._silenced or self.made - self.shown >= samples:
            self.goes_on.clear()
            await self.goes_on.wait()

    def silence(self) -> None:
        """Make no more of it, and say nothing, until `release` is called."""
        self._held, self._silenced = [], True

    def say_first(self, actions: Iterable[Callable[[], None]]) -> None:
        """When it goes on."""
        self._held = [*actions, *(self._held or [])]

    def release(self) -> None:
        """It is wanted."""
        held, self._held = self._held or [], None
        self._silenced = False
        self.goes_on.set()
        for action in held:
            action()

    def heard(self) -> str:
        """What was heard of it; of a sentence that was cut off as many words as it had time for, and a dash."""
        heard, ends = [], [*(begin for _, begin in self.sentences), self.samples][1:]
        for (sentence, begin), end in zip(self.sentences, ends, strict=True):
            words = sentence.split()
            count = int(len(words) * min(1.0, (self.shown - begin) / max(1, end - begin)))
            if self.shown >= end:
                heard.append(sentence)
            elif count > 0:
                heard.append(" ".join(words[:count]) + " —")
        return " ".join(heard)


@dataclass(frozen=True)
class _Spoken:
    """All of an answer is out."""

    answer: _Answer


class _Conversation:
    """What is heard, decided and answered.

    Args:
        track: of what the microphone hears.
        live: the face. What it is marked with comes out between its moments, when all that was said before is out.
    """

    def __init__(
        self,
        client: AsyncClient,
        clock: Clock,
        track: Track,
        live: LiveStream[Any],
        respond: Responder,
        speak: Callable[[str], AsyncIterable[Pcm]],
    ) -> None:
        self._client, self._clock, self._track, self._live = client, clock, track, live
        self._respond, self._speak = respond, speak
        self._settings = EndOfSpeech.load()
        self._turns = Turns(self._settings, clock.fps, clock.max_utterance_seconds)
        self._messages: list[Message] = []
        self._guess: _Answer | None = None  # to what may be all that the person says
        self._answer: _Answer | None = None  # that is wanted, and not out yet
        self._interrupted: _Answer | None = None  # by what may be only a noise
        self._tasks: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()  # there is more to hear
        self._came = 0.0  # when it came
        self._begin = self._end = 0  # samples: of what is to be recognised, of the last speech
        self._rests = asyncio.Event()  # there is no answer
        self._rests.set()

    async def hear(self, audio: Audio) -> None:
        """All of the audio; when its last turn is answered, the face goes."""
        tasks = [asyncio.create_task(each) for each in (self._read(audio), self._attend())]
        try:
            await asyncio.gather(*tasks)
            if self._turns.in_turn:
                if self._guess is None:
                    self._recognise(self._track.end)
                if self._guess is not None:
                    await self._guess.known.wait()
                self._end_turn()
            await self._rests.wait()
        finally:
            for task in tasks:
                task.cancel()
            await self._live.close()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self, hearing: asyncio.Task[None]) -> None:
        """End it, and all that is under way."""
        tasks = [hearing, *self._tasks]
        for task in tasks:
            task.cancel()
        await self._live.close()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, audio: Audio) -> None:
        async for packet in _async_packets(audio):
            self._track.push(to_mono(packet))
            self._came = _now()
            self._news.set()
        self._track.finish()
        self._news.set()

    async def _attend(self) -> None:
        """Find out which frames are speech, as they come, up to a chunk at a time."""
        clock, track, seen = self._clock, self._track, 0  # samples
        window = clock.left_context + clock.chunk + clock.look_ahead
        while True:
            heard = min(track.ready, track.end)
            frames = min(clock.chunk_frames, int(heard - seen) // clock.samples_per_frame)
            if frames:
                end = seen + frames * clock.samples_per_frame
                sound = track.read(end - window, end)
                for probability in (await self._client._detect(sound, end // clock.samples_per_frame))[-frames:]:
                    seen += clock.samples_per_frame
                    if probability > self._settings.speech:
                        self._end = seen
                    await self._take(self._turns.push(probability), seen)
                track.forget(min(self._begin, seen - window) if self._turns.in_turn else seen - window)
            elif heard < track.ready:
                return  # the audio has ended
            else:
                self._news.clear()
                await self._news.wait()

    async def _take(self, event: TurnEvent | None, position: int) -> None:
        """What the sound up to there means."""
        if event == "begin":
            began = position / self._clock.sample_rate - self._settings.begin_seconds
            self._begin = max(0, round((began - self._settings.run_in_seconds) * self._clock.sample_rate))
            self._live.listening = 1.0
            await self._interrupt()
            self._live.mark(TurnBegan(began))
        elif event == "recognise":
            self._recognise(position)
        elif event == "resume":
            self._drop()
        elif event == "end":
            self._end_turn()

    def _recognise(self, end: int) -> None:
        """Find out what was said up to there, and begin to answer it."""
        self._drop()
        self._guess = answer = _Answer()
        sound = self._track.read(self._begin, end)
        answer.task = asyncio.create_task(self._make(answer, sound), name="talksplat-answer")
        self._tasks.add(answer.task)
        answer.task.add_done_callback(self._tasks.discard)

    async def _make(self, answer: _Answer, sound: Samples) -> None:
        try:
            answer.text = (await self._client.transcribe(sound)).strip()
            answer.known.set()
            if answer.text:
                self._give_up()
            messages = [*self._messages, Message("user", answer.text)]
            if self._turns.recognised(answer.text) == "end":
                self._end_turn(self._settings.silence_seconds(answer.text))
            if answer.text:
                await self._reply(answer, messages)
        except Exception as error:
            answer.do(partial(self._live.mark, Failed(error)))
        answer.do(partial(self._finish, answer))
        if answer.text is None and answer is self._guess:  # nobody will know what was said
            self._turns = Turns(self._settings, self._clock.fps, self._clock.max_utterance_seconds)
            self._end_turn()
        answer.known.set()

    async def _reply(self, answer: _Answer, messages: Sequence[Message]) -> None:
        async with aclosing(_whole(self._respond(messages))) as reply:
            async for sentence in reply:
                answer.replied = answer.replied or _now()
                begins = True
                async with _closing(self._speak(sentence)) as packets:
                    async for packet in packets:
                        answer.sounded = answer.sounded or _now()
                        sound = to_mono(packet)
                        answer.made += sound.size
                        answer.do(partial(self._say, answer, sound, sentence if begins else None))
                        begins = False
                        await answer.room(round(AHEAD_SECONDS * self._live.sample_rate))

    def _say(self, answer: _Answer, sound: Samples, begins: str | None) -> None:
        if begins is not None:
            answer.sentences.append((begins, answer.samples))
            self._live.mark(Sentence(begins))
        answer.samples += sound.size
        self._live.say(sound, self._live.sample_rate)

    def _finish(self, answer: _Answer) -> None:
        self._live.finish()
        self._live.mark(_Spoken(answer))

    def _end_turn(self, silence: float | None = None) -> None:
        """The person has finished: the guess was right.

        Args:
            silence: seconds of it that were enough, if the text came later than that.
        """
        answer, self._guess = self._guess, None
        self._live.listening = 0.0
        if answer is None:
            return
        now = _now()
        last = self._came - (self._track.end - self._end) / self._clock.sample_rate
        answer.waits = (last, now if silence is None else min(now, last + silence), now)
        self._live.mark(TurnEnded(answer.text or "", self._end / self._clock.sample_rate))
        if answer.text:
            self._messages.append(Message("user", answer.text))
        if answer.text == "" and self._interrupted is not None:
            answer, self._interrupted = self._interrupted, None
            self._live.mark(Resumed())
        self._give_up()
        self._answer = answer
        self._rests.clear()
        answer.release()

    async def _interrupt(self) -> None:
        """Whatever the avatar says or is about to say: it is silent, and the rest is kept until it is sure why."""
        answer, self._answer = self._answer, None
        if answer is None:
            return
        self._interrupted = answer
        answer.silence()
        rest: list[Callable[[], None]] = []
        for each in await self._live.cut():
            if isinstance(each, np.ndarray):
                rest.append(partial(self._live.say, each, self._live.sample_rate))
            elif isinstance(each, _Spoken):
                rest.append(partial(self._finish, answer))
            elif isinstance(each, Sentence):
                rest.append(partial(self._live.mark, each))
            else:  # it has happened; only nobody was told yet
                self._live.mark(each)
        answer.say_first(rest)
        self._live.mark(Interrupted(answer.heard()))

    def _give_up(self) -> None:
        """What interrupted the avatar was no noise."""
        answer, self._interrupted = self._interrupted, None
        if answer is not None and answer.task is not None:
            answer.task.cancel()
            self._remember(answer)

    def _drop(self) -> None:
        """Give up the guess."""
        guess, self._guess = self._guess, None
        if guess is not None and guess.task is not None:
            guess.task.cancel()

    def seen(self, event: Event) -> Turn | None:
        """Something has come out; what is known with an answer's first moment."""
        answer = self._answer
        if answer is None or not isinstance(event, Moment) or event.sound is None:
            return None
        first, answer.shown = not answer.shown, answer.shown + event.sound.size
        answer.goes_on.set()
        if not first or answer.waits is None:
            return None
        last, silent, ended = answer.waits
        replied = max(ended, answer.replied)
        sounded = max(replied, answer.sounded)
        stages = (silent - last, ended - silent, replied - ended, sounded - replied, event.due - sounded)
        return Turn(answer.text or "", *stages)

    def spoken(self, answer: _Answer) -> None:
        """All of an answer is out."""
        if answer is self._answer:
            self._answer = None
            self._remember(answer)

    def _remember(self, answer: _Answer) -> None:
        if heard := answer.heard():
            self._messages.append(Message("assistant", heard))
        self._rests.set()


async def _whole(parts: AsyncIterable[str]) -> AsyncGenerator[str, None]:
    """The sentences of a text that comes in parts, each as soon as the next one begins."""
    text = ""
    async with _closing(parts):
        async for part in parts:
            text += part
            *whole, last = sentences(text) or [""]
            if whole:
                text = text[text.rindex(last) :]
            for sentence in whole:
                yield sentence
    for sentence in sentences(text):
        yield sentence


@asynccontextmanager
async def _closing(items: AsyncIterable[Item]) -> AsyncIterator[AsyncIterable[Item]]:
    """A generator is closed as soon as nobody takes from it; other iterables have nothing to close."""
    try:
        yield items
    finally:
        if isinstance(items, AsyncGenerator):
            await items.aclose()


def _now() -> float:
    return asyncio.get_running_loop().time()
