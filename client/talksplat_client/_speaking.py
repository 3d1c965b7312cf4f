"""Text to speak: what tells its sentences apart, and which piece of which is asked for next."""

from __future__ import annotations

import re
from collections import deque

from ._audio import Samples
from ._exceptions import ServerError

# Marks that end a sentence, with the quotes and brackets that they stand in, before a space; or a new line.
_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)|\n")  # noqa: RUF001  (a quote, not a grave)
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'])(?:mr|mrs|ms|dr|prof|st|vs|etc|e\.g|i\.e|no|jr|sr|approx|[a-z](?:\.[a-z])*)\.$", re.IGNORECASE
)
_NAMELESS = re.compile(r"\b(?:etc|I)\.$")  # also ends sentences


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order, each with its mark, without the spaces around it.

    What ends with ``.``, ``!`` or ``?`` before a space is a sentence, unless it is an abbreviation such as ``Dr.`` or
    an initial; so is a line. What has neither letter nor digit is left out. Of a text that still grows all but the last
    one are whole.
    """
    found, begin = [], 0
    for mark in _END.finditer(text):
        sentence = text[begin : mark.end()].strip()
        goes_on = text[mark.end() :].lstrip(" ")[:1]
        short = _ABBREVIATION.search(sentence) and not (_NAMELESS.search(sentence) and goes_on.isupper())
        if mark[0] != "\n" and goes_on not in ("", "\n") and (short or (goes_on.islower() and mark[0] == ".")):
            continue
        found.append(sentence)
        begin = mark.end()
    found.append(text[begin:].strip())
    return [sentence for sentence in found if any(letter.isalnum() for letter in sentence)]


class Recital:
    """Which piece of a text's speech is next."""

    def __init__(self, text: str) -> None:
        self._sentences = deque(sentences(text))
        self._start = 0

    def next(self) -> tuple[str, int] | None:
        """A sentence, and the first sample wanted of it; None where all has come."""
        return (self._sentences[0], self._start) if self._sentences else None

    def came(self, piece: Samples, samples: int) -> None:
        """A piece of the sentence that has so many samples.

        Raises:
            ServerError: it is empty or too long.
        """
        self._start += len(piece)
        if not len(piece) or self._start > samples:
            raise ServerError(f"the server sent {len(piece)} samples up to {self._start} of {samples} of a sentence")
        if self._start == samples:
            self._sentences.popleft()
            self._start = 0
