import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from talksplat import clock, framing


@given(st.integers(1, 5 * clock.CHUNK_SAMPLES))
def test_every_sample_lies_in_its_chunk_and_in_its_neighbours_context(samples: int) -> None:
    audio = np.arange(1, samples + 1, dtype=np.float32)
    windows = framing.windows(audio)
    assert windows.shape == (-(-samples // clock.CHUNK_SAMPLES), clock.WINDOW)
    chunks = windows[:, clock.LEFT_CONTEXT : clock.LEFT_CONTEXT + clock.CHUNK_SAMPLES].reshape(-1)
    np.testing.assert_array_equal(chunks[:samples], audio)
    assert not chunks[samples:].any()
    for earlier, later in itertools.pairwise(windows):
        np.testing.assert_array_equal(later[: -clock.CHUNK_SAMPLES], earlier[clock.CHUNK_SAMPLES :])
    assert not windows[0, : clock.LEFT_CONTEXT].any()


@pytest.mark.parametrize(
    ("audio", "reason"),
    [
        (np.zeros(0, np.float32), "1 to 480000 samples"),
        (np.zeros(framing.MAX_SAMPLES + 1, np.float32), "1 to 480000 samples"),
        (np.zeros((2, 3), np.float32), r"\[2, 3\]"),
        (np.array([0, np.nan], np.float32), "NaN"),
    ],
)
def test_audio_that_cannot_be_cut_is_refused(audio: np.ndarray, reason: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(framing.RequestError, match=reason):
        framing.windows(audio)
