"""Batches of real speech: within the profile of every graph, of several sizes, and without torch."""

import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from talksplat import avatar, clock
from talksplat.server import ROOT
from talksplat_export import feeds, registry
from talksplat_export.feeds import FeedsError
from talksplat_export.registry import GRAPHS, Graph


@pytest.fixture(scope="module")
def made(repository: Path) -> dict[str, list[feeds.Feed]]:
    heard, _ = feeds.halves()
    return {graph.name: feeds.feeds(graph.name, repository, heard) for graph in GRAPHS}


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.name)
def test_every_batch_is_within_the_profile_and_sizes_differ(made: dict[str, list[feeds.Feed]], graph: Graph) -> None:
    batches = made[graph.name]
    for feed in batches:
        assert list(feed) == [tensor.name for tensor in graph.inputs]
        for tensor in graph.inputs:
            least, _, most = graph.profile()[tensor.name]
            array = feed[tensor.name]
            assert array.dtype == np.dtype(tensor.dtype)
            assert np.isfinite(array).all()
            assert len(array.shape) == len(least)
            assert all(low <= size <= high for low, size, high in zip(least, array.shape, most, strict=True))
    first = graph.inputs[0].name
    assert len({len(feed[first]) for feed in batches}) > 1
    for dim in set(graph.ranges) - {registry.BATCH}:
        tensor = next(tensor for tensor in graph.inputs if dim in tensor.dims)
        at = tensor.dims.index(dim) + 1
        assert len({feed[tensor.name].shape[at] for feed in batches}) > 1


def test_it_is_the_speech_and_the_avatar_that_are_committed(repository: Path, speech: npt.NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(feeds.speech(), speech)
    (first, *_) = feeds.feeds("deformation", repository)
    adapter_in, adapter_out = avatar.read_adapter(ROOT / "avatars", "ava")
    np.testing.assert_array_equal(first["ADAPTER_IN"][0], adapter_in)
    np.testing.assert_array_equal(first["ADAPTER_OUT"][0], adapter_out)
    heard, unheard = feeds.halves()
    np.testing.assert_array_equal(np.concatenate([heard, unheard]), speech)


def test_the_decoder_is_fed_with_its_own_words(repository: Path, made: dict[str, list[feeds.Feed]]) -> None:
    """Each batch's second step has the token that the first one found likeliest, and its cache."""
    first, second, *_ = made["asr_decoder"]
    logits, cache = feeds.session(repository / "asr_decoder" / "1" / "model.onnx").run(None, first)
    np.testing.assert_array_equal(second["TOKEN"][:, 0], logits.argmax(1))
    np.testing.assert_array_equal(second["PAST_KV"], cache)


@pytest.mark.parametrize("name", [graph.name for graph in GRAPHS])
def test_a_graph_that_is_not_in_its_place_yet_can_be_checked(
    name: str, repository: Path, made: dict[str, list[feeds.Feed]], tmp_path: Path
) -> None:
    for graph in GRAPHS:
        if graph.name != name:
            (tmp_path / graph.name).symlink_to(repository / graph.name)
    heard, _ = feeds.halves()
    found = feeds.feeds(name, tmp_path, heard, repository / name / "1" / "model.onnx")
    for mine, expected in zip(found, made[name], strict=True):
        assert all(np.array_equal(mine[key], expected[key]) for key in expected)


def test_feeds_need_no_torch_and_no_onnx() -> None:
    code = "import sys, talksplat_export.feeds as x; x.feeds('vad'); print({'torch', 'onnx'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_a_graph_that_was_not_exported_is_named(tmp_path: Path) -> None:
    with pytest.raises(FeedsError, match=r"audio_encoder/1/model\.onnx is missing: run `talksplat-export models`"):
        feeds.feeds("deformation", tmp_path)


def test_a_recording_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "speech.wav"
    with pytest.raises(FeedsError, match="can't be read"):
        feeds.speech(path)
    with wave.open(str(path), "wb") as file:
        file.setparams((2, 2, clock.SAMPLE_RATE, 0, "NONE", ""))
    with pytest.raises(FeedsError, match="not 16-bit mono at 16000 Hz"):
        feeds.speech(path)
    path.write_bytes(b"RIFF")
    with pytest.raises(FeedsError, match="can't be read"):
        feeds.speech(path)
    with pytest.raises(FeedsError, match="16000 samples are too few: 25600 are needed"):
        feeds.feeds("asr_encoder", audio=np.zeros(clock.SAMPLE_RATE, np.float32))
