"""The voice rebuilt as three graphs against the wheel's own graph, and what is committed beside them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest

from talksplat import speaking
from talksplat.speaking import CONTEXT, HOP
from talksplat_export import replies, voice
from talksplat_export._wheels import wheel_file

Array = npt.NDArray[Any]

# tensors of the wheel's graph
DURATION_NOISE, NOISE = "/dp/RandomNormalLike_output_0", "/RandomNormalLike_output_0"
FRAMES, LATENT = "/Ceil_output_0", "/Mul_7_output_0"

needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="the wheel espeakng-loader is not installed"
)


@pytest.fixture(scope="module")
def networks(repository: Path) -> speaking.Networks:
    return speaking.in_process(repository)


@pytest.fixture(scope="module")
def original() -> ort.InferenceSession:
    """The wheel's graph, which also tells what noise it drew."""
    model = onnx.load(str(wheel_file(voice.PACKAGE, voice.FILE, voice.SHA256)))
    for name in (DURATION_NOISE, NOISE, FRAMES, LATENT):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("ipa", ["hˈaɪ.", "maɪ lˈɪps klˈoʊz fɔːɹ pˈiːpəl, bˈʌbəlz ænd mjˈuːzɪk."])  # noqa: RUF001
def test_the_three_graphs_compute_what_the_wheels_graph_computes(
    networks: speaking.Networks, original: ort.InferenceSession, ipa: str
) -> None:
    ids = speaking.tokens(ipa, voice.symbols())
    feed = {
        "input": np.array([ids]),
        "input_lengths": np.array([len(ids)]),
        "scales": np.array([0.667, 1.0, 0.8], np.float32),
    }
    names = ["output", DURATION_NOISE, NOISE, FRAMES, LATENT]
    audio, duration_noise, noise, frames, latent = original.run(names, feed)

    means, deviations, durations = networks.encoder(np.array([ids]), duration_noise)
    np.testing.assert_array_equal(np.ceil(durations).ravel(), frames.ravel())
    counts = frames.ravel().astype(int)
    means, deviations = (np.repeat(each, counts, axis=2) for each in (means, deviations))
    mine = networks.flow(means + deviations * noise)
    np.testing.assert_allclose(mine, latent, atol=1e-5 * np.abs(latent).max())
    spoken, audio = networks.decoder(np.pad(mine, ((0, 0), (0, 0), (CONTEXT, CONTEXT))))[0], audio.ravel()
    assert spoken.shape == audio.shape
    inner = slice(CONTEXT * HOP, -CONTEXT * HOP)
    np.testing.assert_allclose(spoken[inner], audio[inner], atol=1e-4)
    # at the very ends, before and after the speech, the wheel's layers each pad with zeros of their own
    assert np.sqrt(np.mean((spoken - audio) ** 2)) < 0.01 * np.sqrt(np.mean(audio**2))


def test_more_tokens_than_memory_could_hold_are_refused_at_once(networks: speaking.Networks) -> None:
    most = speaking.MAX_TOKENS
    for tokens, noise in ((most + 1, most + 1), (20 * most, 1), (30, 31)):
        with pytest.raises(Exception, match="Non-zero status code"):  # ONNX Runtime's own type is not public
            networks.encoder(np.ones((1, tokens), np.int64), np.zeros((1, 2, noise), np.float32))


def test_the_committed_symbols_are_the_wheels() -> None:
    committed = json.loads((replies.REPLIES.with_name("symbols.json")).read_text(encoding="utf-8"))
    assert committed == voice.symbols()


def test_every_sentence_of_the_script_is_prepared_and_nothing_else() -> None:
    """`talksplat-export replies` makes them; what a sentence sounds like does not depend on marks and case."""
    prepared = json.loads(replies.REPLIES.read_text(encoding="utf-8"))
    assert {speaking.spoken(text) for text in prepared} == {speaking.spoken(text) for text in replies.script()}
    assert all(speaking.tokens(ipa, voice.symbols()) for ipa in prepared.values())


@needs_espeak
def test_the_replies_are_espeaks(tmp_path: Path) -> None:
    replies.prepare(tmp_path / "replies.json")
    assert (tmp_path / "replies.json").read_bytes() == replies.REPLIES.read_bytes()
