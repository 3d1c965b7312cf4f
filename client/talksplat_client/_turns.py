"""When a turn begins and ends: what is said informs it, not silence alone. No I/O; the page's turns.js decides alike.

The values are in conversation.json.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal, Self, TypeAlias

TurnEvent: TypeAlias = Literal["begin", "recognise", "resume", "end"]


@dataclass(frozen=True)
class EndOfSpeech:
    """What decides that a person has begun or finished."""

    speech: float  # probability above which a frame is speech
    begin_seconds: float  # of speech that begin a turn, or interrupt the avatar
    run_in_seconds: float  # before a turn's first speech that are recognised with it
    recognise_seconds: float  # of silence after which what was said is recognised, as a guess
    finished_seconds: float  # of silence that end a turn whose text sounds finished
    unfinished_seconds: float  # or does not
    unfinished: str  # regular expression, of a text that does not sound finished

    @classmethod
    def load(cls) -> Self:
        """From conversation.json."""
        return cls(**conversation()["end_of_speech"])

    def silence_seconds(
        self,
        text: str,  # stripped
    ) -> float:
        """Of silence that end a turn in which this was said."""
        unfinished = re.search(self.unfinished, text, re.IGNORECASE | re.ASCII)
        return self.unfinished_seconds if unfinished else self.finished_seconds


@cache
def conversation() -> dict[str, Any]:
    """The content of conversation.json."""
    content: dict[str, Any] = json.loads(resources.files(__package__).joinpath("conversation.json").read_text())
    return content


class Turns:
    """Probabilities of speech in, frame by frame, what they mean out.

    ``begin``: somebody speaks; ``recognise``: find out what was said so far, and tell `recognised`; ``resume``: that
    was not all; ``end``: the turn is over.
    """

    def __init__(
        self,
        settings: EndOfSpeech,
        fps: int,
        longest: float,  # seconds after which a turn ends whatever is heard, once its text is known
    ) -> None:
        self._settings, self._fps = settings, fps
        self._longest = self._frames(longest)
        self._speech = 0  # frames of it in a row
        self._silence = 0  # frames of it since the last speech
        self._lasted = 0  # frames of the turn, since it began
        self._text: str | None = None  # that was recognised since the last speech
        self.in_turn = False  # somebody speaks, or may go on

    def push(self, probability: float) -> TurnEvent | None:
        """The next frame."""
        speaks = probability > self._settings.speech
        self._speech = self._speech + 1 if speaks else 0
        if not self.in_turn:
            self.in_turn = speaks and self._speech >= self._frames(self._settings.begin_seconds)
            return "begin" if self.in_turn else None
        if self._lasted >= self._longest:
            return None  # all that matters is its text
        recognise = self._frames(self._settings.recognise_seconds)
        resumes = speaks and self._silence >= recognise
        self._lasted += 1
        self._silence = 0 if speaks else self._silence + 1
        if speaks:
            self._text = None
        if self._silence == recognise or (self._silence < recognise and self._lasted >= self._longest):
            return "recognise"
        return "resume" if resumes else self._decide()

    def recognised(self, text: str) -> TurnEvent | None:
        """What was said up to the silence that lasts, or up to the turn's greatest length."""
        if not self.in_turn or not (self._silence or self._lasted >= self._longest):
            return None
        self._text = text.strip()
        return self._decide()

    def _decide(self) -> TurnEvent | None:
        if self._text is None:
            return None
        silence = self._frames(self._settings.silence_seconds(self._text))
        if self._silence < silence and self._lasted < self._longest:
            return None
        self.in_turn = False
        self._text = None
        self._silence = self._lasted = 0
        return "end"

    def _frames(self, seconds: float) -> int:
        return math.floor(seconds * self._fps + 0.5)  # as JavaScript rounds
