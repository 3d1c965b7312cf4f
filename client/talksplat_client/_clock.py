"""How samples, frames and chunks relate. The server says so; nothing of it is written down here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Self

from ._exceptions import ServerError


@dataclass(frozen=True)
class Clock:
    """A request carries one window: left context, chunk, look-ahead."""

    sample_rate: int  # Hz
    fps: int
    chunk_frames: int
    left_context: int  # samples
    look_ahead: int  # samples
    max_utterance_seconds: int  # of one request for a transcript or a whole utterance

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> Self:
        """From the parameters of the model ``animate``.

        Raises:
            ServerError: one is missing or makes no sense.
        """
        try:
            clock = cls(**{field.name: int(parameters[field.name]) for field in fields(cls)})
        except KeyError as error:
            raise ServerError(f"the server's model 'animate' says nothing about {error}: is it talksplat's?") from None
        except ValueError as error:
            raise ServerError(f"a clock parameter of the server's model 'animate' is no number: {error}") from None
        needed = (clock.sample_rate, clock.fps, clock.chunk_frames, clock.max_utterance_seconds)
        if min(asdict(clock).values()) < 0 or 0 in needed or clock.sample_rate % clock.fps:
            raise ServerError(f"the server's clock makes no sense: {clock}")
        return clock

    @property
    def samples_per_frame(self) -> int:
        """Samples of one frame."""
        return self.sample_rate // self.fps

    @property
    def chunk(self) -> int:
        """Samples of one chunk."""
        return self.chunk_frames * self.samples_per_frame

    def rate(self, sample_rate: int | None) -> int:
        """A caller's sample rate, which is the server's unless stated."""
        return self.sample_rate if sample_rate is None else sample_rate

    def window(self, chunk: int) -> tuple[int, int]:
        """First sample, and the one after the last, of the window of the chunk with this number."""
        start = chunk * self.chunk
        return start - self.left_context, start + self.chunk + self.look_ahead
