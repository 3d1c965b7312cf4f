"""Cut an utterance into the windows that `animate` takes, one a chunk (see `talksplat.clock`)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from talksplat import clock

MAX_SAMPLES = clock.MAX_UTTERANCE_SECONDS * clock.SAMPLE_RATE


class RequestError(ValueError):
    """A request asks for what can't be done; the message is a sentence for its sender."""


def windows(
    audio: npt.NDArray[np.float32],  # [T] 16 kHz mono
) -> npt.NDArray[np.float32]:  # [ceil(T / CHUNK_SAMPLES), WINDOW]
    """Every chunk's window, in order; zeros stand for the time before the start and after the end.

    Raises:
        RequestError: the audio is empty, longer than `clock.MAX_UTTERANCE_SECONDS`, or not finite.
    """
    if audio.ndim != 1 or not 0 < len(audio) <= MAX_SAMPLES:
        raise RequestError(f"AUDIO has shape {list(audio.shape)}, expected 1 to {MAX_SAMPLES} samples.")
    if not np.isfinite(audio).all():
        raise RequestError("AUDIO holds NaN or infinity.")
    chunks = -(-len(audio) // clock.CHUNK_SAMPLES)
    padded = np.zeros((chunks - 1) * clock.CHUNK_SAMPLES + clock.WINDOW, np.float32)
    padded[clock.LEFT_CONTEXT : clock.LEFT_CONTEXT + len(audio)] = audio
    every = np.lib.stride_tricks.sliding_window_view(padded, clock.WINDOW)
    return every[:: clock.CHUNK_SAMPLES].copy()
