"""The exported VAD against the stock model, stepped by hand in numpy."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from talksplat import clock, framing
from talksplat_export import _wheels, feeds, vad
from talksplat_export._wheels import WeightsError

Float32 = npt.NDArray[np.float32]

STOCK_SHA256 = "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3"


@pytest.fixture(scope="module")
def probabilities(repository: Path, speech: Float32) -> Float32:
    """Per frame of the demo's speech."""
    return run(repository, framing.windows(speech)).reshape(-1)


def run(repository: Path, windows: Float32, output: str = "SPEECH") -> Float32:
    return np.asarray(feeds.session(repository / "vad" / "1" / "model.onnx").run([output], {"AUDIO": windows})[0])


def stock(windows: Float32) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """What the contract says, on the stock file: 28 steps of 512, the largest of a frame's steps; the chunk's through a
    triangle, and the last as they are."""
    session = feeds.session(_wheels.wheel_file("silero_vad", "data/silero_vad.onnx", STOCK_SHA256))
    chunk, latest = [], []
    for window in windows:
        state, rate = np.zeros((2, 1, 128), np.float32), np.array(clock.SAMPLE_RATE)
        steps = {}
        for begin in range(clock.WINDOW - 28 * 512, clock.WINDOW, 512):
            piece = window[None, begin - 64 : begin + 512]
            (((steps[begin],),), state) = session.run(None, {"input": piece, "state": state, "sr": rate})
        largest = [
            max(value for begin, value in steps.items() if begin < end and begin + 512 > end - 640)
            for end in range(15 * 640, 24 * 640, 640)
        ]
        chunk.append(np.convolve(largest[:8], np.array([1, 2, 3, 2, 1]) / 9, "valid"))
        latest.append(largest[-4:])
    return np.array(chunk), np.array(latest)


def test_the_file_gives_what_the_stock_model_gives(repository: Path, speech: Float32) -> None:
    windows = framing.windows(speech)[::5]
    noisy = windows + np.random.default_rng(0).normal(0, 0.02, windows.shape).astype(np.float32)
    both = np.concatenate([windows, noisy])
    for output, expected in zip(("SPEECH", "LATEST"), stock(both), strict=True):
        np.testing.assert_allclose(run(repository, both, output), expected, rtol=0, atol=1e-5)


def test_a_window_gives_the_same_alone_and_in_a_batch(repository: Path, speech: Float32) -> None:
    windows = framing.windows(speech)[10:18]
    alone = np.concatenate([run(repository, window[None]) for window in windows])
    np.testing.assert_allclose(run(repository, windows), alone, rtol=0, atol=1e-5)


def test_sentences_are_speech_and_the_pauses_between_are_not(probabilities: Float32) -> None:
    def between(begin: float, end: float) -> Float32:
        return probabilities[round(begin * clock.FPS) : round(end * clock.FPS)]

    for begin, end in ((0.5, 0.75), (2.5, 3.7), (7.0, 8.3), (9.5, 10.2)):
        assert between(begin, end).min() > 0.8
    for begin, end in ((0, 0.2), (1.85, 2.1), (5.2, 5.4), (8.9, 9.1), (11.8, 12.0)):
        assert between(begin, end).max() < 0.15


def test_the_latest_frames_need_nothing_that_comes_later(repository: Path, speech: Float32) -> None:
    """The demo speaks from 0.5 s on: the frames up to there are silence, and two later it is heard."""
    ends = [round(0.5 * clock.FPS) + frames for frames in range(-3, 4)]
    padded = np.pad(speech, (clock.WINDOW, 0))
    windows = np.stack([padded[end * 640 : end * 640 + clock.WINDOW] for end in ends])
    heard = run(repository, windows, "LATEST")[:, -1]
    assert heard[:2].max() < 0.2
    assert heard[-2:].min() > 0.8


def test_silence_and_noise_are_no_speech(repository: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 0.05, (4, clock.WINDOW)).astype(np.float32)
    noise[0] = 0
    assert run(repository, noise).max() < 0.2


def test_each_frame_hears_the_steps_that_overlap_it() -> None:
    steps = vad.frame_steps()
    for number, own in enumerate(steps):
        frame = range((14 + number) * 640, (15 + number) * 640)
        for step in range(vad.STEPS):
            begin = vad.FIRST_STEP + step * vad.STEP
            assert (step in own) == (begin < frame.stop and begin + vad.STEP > frame.start)


def test_weights_of_another_release_are_refused() -> None:
    with pytest.raises(WeightsError, match="SHA-256"):
        _wheels.wheel_file("silero_vad", "data/silero_vad.onnx", "0" * 64)
    with pytest.raises(WeightsError, match=r"has no data/none\.onnx"):
        _wheels.wheel_file("silero_vad", "data/none.onnx", "0" * 64)
    with pytest.raises(WeightsError, match=r"pip install .* no-such-weights"):
        _wheels.wheel_file("no_such_weights", "model.onnx", "0" * 64)
