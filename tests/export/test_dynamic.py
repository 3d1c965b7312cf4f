from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from talksplat import asr, clock
from talksplat_export import dynamic
from talksplat_export._onnx import ExportError

Float32 = npt.NDArray[np.float32]

PARTS, LAYERS, WIDTH, WORDS = 2, 3, 16, 40


def scripted(path: Path, weights: Float32, layers: range = range(LAYERS)) -> Path:
    """TOKEN -> an embedding, the sum of all PARTS * LAYERS parts of CLIP on top, times the embedding transposed."""
    constants: dict[str, npt.NDArray[Any]] = {
        "embedding": weights,
        **{str(index): np.array(index, np.int64) for index in range(max(PARTS, LAYERS))},
        **{f"{layer}f": np.array(layer + 1, np.float32) for layer in range(LAYERS)},
    }
    nodes = [helper.make_node("Gather", ["embedding", "TOKEN"], ["x"])]
    tensor = "x"
    for part in range(PARTS):
        nodes.append(helper.make_node("Gather", ["CLIP", str(part)], [f"part{part}"], axis=1))
        for layer in layers:
            nodes.append(helper.make_node("Gather", [f"part{part}", str(layer)], [f"picked{part}{layer}"], axis=1))
            nodes.append(helper.make_node("Mul", [f"picked{part}{layer}", str(layer) + "f"], [f"scaled{part}{layer}"]))
            nodes.append(helper.make_node("Add", [tensor, f"scaled{part}{layer}"], [f"sum{part}{layer}"]))
            tensor = f"sum{part}{layer}"
    nodes.append(helper.make_node("Gemm", [tensor, "embedding"], ["LOGITS"], transB=1))
    graph = helper.make_graph(
        nodes,
        "scripted",
        [
            helper.make_tensor_value_info("TOKEN", TensorProto.INT64, ["batch"]),
            helper.make_tensor_value_info("CLIP", TensorProto.FLOAT, ["batch", PARTS, LAYERS, WIDTH]),
        ],
        [helper.make_tensor_value_info("LOGITS", TensorProto.FLOAT, ["batch", WORDS])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@settings(max_examples=10)
@given(seed=st.integers(0, 2**16), spread=st.floats(0.01, 10))
def test_a_quantised_graph_computes_about_the_same_from_parts(
    tmp_path_factory: pytest.TempPathFactory, seed: int, spread: float
) -> None:
    folder, generator = tmp_path_factory.mktemp("scripted"), np.random.default_rng(seed)
    weights = (spread * generator.normal(size=(WORDS, WIDTH))).astype(np.float32)
    source = scripted(folder / "source.onnx", weights)
    dynamic.quantise(source, folder / "new" / "target.onnx", opened="CLIP")

    token, clip = np.array([seed % WORDS]), generator.normal(size=(1, PARTS, LAYERS, WIDTH)).astype(np.float32)
    (expected,) = ort.InferenceSession(source).run(None, {"TOKEN": token, "CLIP": clip})
    target = ort.InferenceSession(folder / "new" / "target.onnx")
    names = [node.name for node in target.get_inputs()]
    parts = {f"CLIP.{part}.{layer}": clip[:, part, layer] for part in range(PARTS) for layer in range(LAYERS)}
    assert names == ["TOKEN", *parts]
    (actual,) = target.run(None, {"TOKEN": token, **parts})
    assert np.abs(actual - expected).max() <= 0.03 * np.abs(expected).max()
    assert [file.name for file in (folder / "new").iterdir()] == ["target.onnx"]


def test_parts_that_a_graph_does_not_pick_are_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    source = scripted(tmp_path / "source.onnx", np.ones((WORDS, WIDTH), np.float32), layers=range(LAYERS - 1))
    with pytest.raises(ExportError, match="2 x 3 parts from CLIP"):
        dynamic.quantise(source, tmp_path / "target.onnx", opened="CLIP")
    assert not (tmp_path / "target.onnx").exists()


def test_the_recogniser_in_8_bits_hears_the_same_words_by_almost_the_same_logits(
    repository: Path, speech: Float32
) -> None:
    clip = speech[None, : 2 * clock.SAMPLE_RATE]
    logits: dict[str, list[Any]] = {}
    precise, quick = (asr.in_process(repository, precision=precision) for precision in ("fp32", "int8"))
    said = asr.greedy(precise.decoder, precise.encoder(clip), cap=20)
    assert asr.greedy(quick.decoder, quick.encoder(clip), cap=20) == said
    for name, networks in (("fp32", precise), ("int8", quick)):
        cross = networks.encoder(clip)
        cache = np.zeros_like(cross[..., :0, :])
        for token in [asr.BOS, *said.tokens]:
            each, cache = networks.decoder(np.array([[token]]), cross, cache)
            logits.setdefault(name, []).append(each)
    assert np.corrcoef(np.ravel(logits["fp32"]), np.ravel(logits["int8"]))[0, 1] >= 0.99


def test_the_recogniser_in_8_bits_is_a_third_of_the_size(repository: Path) -> None:
    whole = sum((repository / f"asr_{name}" / "1" / "model.onnx").stat().st_size for name in ("encoder", "decoder"))
    small = sum((repository / "asr" / "1" / f"{name}.onnx").stat().st_size for name in ("encoder", "decoder"))
    assert 3 * small <= whole * 1.1
