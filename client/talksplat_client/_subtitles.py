"""What is said and when, as SRT or WebVTT.

The recogniser gives text without times. So speech is cut at its pauses, which the frames' probability of speech shows,
and each stretch is recognised by itself: its begin and its end are measured. Where a stretch needs more than one cue,
the times between them are estimates, in proportion to the letters.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ._audio import Samples, Tape
from ._disclosure import Disclosure
from ._files import Writer
from ._frame import Frame
from ._turns import EndOfSpeech

LINE, LINES = 42, 2  # letters of a line, lines of a cue: what people read with ease
PAUSE = 0.4  # seconds of silence at which speech is cut
LONG = 5.0  # seconds after which a shorter pause will do
SHORT_PAUSE = 0.16
AROUND = 0.2  # seconds that the recogniser hears before and after a stretch


@dataclass(frozen=True)
class Cue:
    """One subtitle."""

    begin: float  # seconds
    end: float
    text: str  # its lines


class SubtitleWriter(Writer):
    """Subtitles of the sound that goes with the frames. See `Writer` for arguments and errors.

    Args:
        path: of the file or pipe.
        format: ``srt`` or ``vtt``.
        transcribe: what is said in samples of the sound's rate, such as `Client.transcribe`.
    """

    def __init__(self, path: str | Path, *, format: str, transcribe: Callable[[Samples], str], **options: Any) -> None:
        self.format = format  # type: ignore[misc]  # one class writes both
        disclosure = options.pop("disclosure", Disclosure())
        options["disclosure"] = replace(disclosure, credentials=None)  # nobody signs text
        super().__init__(path, **options)
        self._transcribe = transcribe
        self._speech = EndOfSpeech.load().speech
        self._tape = Tape()
        self._begin: int | None = None  # first frame of the stretch
        self._last = 0  # frame that was speech
        self.cues: list[Cue] = []

    def _write_audio(self, samples: Samples) -> None:
        """That of a frame must come before the frame after the next pause."""
        self._tape.append(samples)

    def _open(self) -> None:
        if not self._piped:
            self._part.touch()

    def _write(self, frame: Frame) -> None:
        if frame.speech > self._speech:
            self._begin = frame.index if self._begin is None else self._begin
            self._last = frame.index
        elif self._begin is None:
            self._tape.forget(round((frame.index / self._fps - AROUND) * self._sample_rate))
        else:
            pause = SHORT_PAUSE if frame.index - self._begin > LONG * self._fps else PAUSE
            if frame.index - self._last >= pause * self._fps:
                self._recognise(self._begin)

    def _recognise(self, first: int) -> None:
        begin, end = first / self._fps, (self._last + 1) / self._fps
        heard = (round(max(begin - AROUND, 0) * self._sample_rate), round((end + AROUND) * self._sample_rate))
        self.cues += cues(self._transcribe(self._tape.read(*heard)), begin, end)
        self._begin = None

    def _finish(self) -> None:
        if self._begin is not None:
            self._recognise(self._begin)
        data = _FORMS[self.format](self.cues, self._disclosure.description).encode()
        if self._piped:
            stream = self._sink()
            stream.write(data)
            stream.flush()
        else:
            self._part.write_bytes(data)
            self._part.replace(self._path)


def cues(text: str, begin: float, end: float) -> list[Cue]:
    """A stretch's text as cues of at most `LINES` lines; a text without letters has none."""
    lines = textwrap.wrap(" ".join(text.split()), LINE)
    parts = ["\n".join(lines[first : first + LINES]) for first in range(0, len(lines), LINES)]
    shares = [0, *itertools.accumulate(map(len, parts))]
    times = [begin + (end - begin) * share / (shares[-1] or 1) for share in shares]
    return [Cue(a, b, part) for part, (a, b) in zip(parts, itertools.pairwise(times), strict=True)]


def _srt(written: list[Cue], about: str) -> str:
    return "\n".join(f"{number}\n{_times(cue, ',')}\n{cue.text}\n" for number, cue in enumerate(written, 1))


def _vtt(written: list[Cue], about: str) -> str:
    def blocks() -> Iterator[str]:
        yield "WEBVTT\n"
        yield f"NOTE\n{about}\n"
        for cue in written:
            text = cue.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
            yield f"{_times(cue, '.')}\n{text}\n"

    return "\n".join(blocks())


_FORMS = {"srt": _srt, "vtt": _vtt}


def _times(cue: Cue, point: str) -> str:
    def clock(seconds: float) -> str:
        minutes, milliseconds = divmod(round(1000 * seconds), 60_000)
        return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"

    return f"{clock(cue.begin)} --> {clock(cue.end)}"
