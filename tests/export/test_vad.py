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


def run(repository: Path, windows: Float32) -> Float32:
    return np.asarray(feeds.session(repository / "vad" / "1" / "model.onnx").run(None, {"AUDIO": windows})[0])


def stock(windows: Float32) -> npt.NDArray[np.float64]:
    """What the contract says, on the stock file: 28 steps of 512, the largest of a frame's steps, a triangle."""
    session = feeds.session(_wheels.wheel_file("silero_vad", "data/silero_vad.onnx", STOCK_SHA256))
    frames = []
    for window in windows:
        state, rate = np.zeros((2, 1, 128), np.float32), np.array(clock.SAMPLE_RATE)
        steps = {}
        for begin in range(clock.WINDOW - 28 * 512, clock.WINDOW, 512):
            piece = window[None, begin - 64 : begin + 512]
            (((steps[begin],),), state) = session.run(None, {"input": piece, "state": state, "sr": rate})
        largest = [
            max(value for begin, value in steps.items() if begin < end and begin + 512 > end - 640)
            for end in range(15 * 640, 23 * 640, 640)
        ]
        frames.append(np.convolve(largest, np.array([1, 2, 3, 2, 1]) / 9, "valid"))
    return np.array(frames)


def test_the_file_gives_what_the_stock_model_gives(repository: Path, speech: Float32) -> None:
    windows = framing.windows(speech)[::5]
    noisy = windows + np.random.default_rng(0).normal(0, 0.02, windows.shape).astype(np.float32)
    both = np.concatenate([windows, noisy])
    np.testing.assert_allclose(run(repository, both), stock(both), rtol=0, atol=1e-5)


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
