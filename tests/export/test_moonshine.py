"""The exported recogniser against torch, and torch against the files that the wheels carry."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from google.protobuf import text_format
from rich.console import Console
from safetensors.torch import save_file
from tritonclient.grpc.model_config_pb2 import ModelConfig

from talksplat import asr, clock
from talksplat.server import ROOT
from talksplat_export import _wheels, feeds, models, moonshine
from talksplat_export._wheels import WeightsError

Float32 = npt.NDArray[np.float32]

SENTENCE = "Hello and welcome."  # demo/speech.wav begins with it


@pytest.fixture(scope="module")
def base() -> moonshine.Moonshine:
    return moonshine.load_wheel("base")[0]


@pytest.fixture(scope="module")
def clip(speech: Float32) -> Float32:
    return speech[: 2 * clock.SAMPLE_RATE][None]


@pytest.fixture(scope="module")
def tokens(repository: Path, clip: Float32) -> list[int]:
    """What the exported pair hears, with the BOS in front of it."""
    networks = asr.in_process(repository, precision="fp32")
    return [asr.BOS, *asr.greedy(networks.decoder, networks.encoder(clip), cap=20).tokens]


def token_by_token(
    tokens: list[int], decoder: Callable[[Any, Any, Any], tuple[Any, Any]], cross: Any, cache: Any
) -> list[Any]:
    logits = []
    for token in tokens:
        each, cache = decoder(np.array([[token]]), cross, cache)
        logits.append(each[0])
    return logits


def test_the_files_give_the_logits_of_torch_token_by_token(
    repository: Path, base: moonshine.Moonshine, clip: Float32, tokens: list[int]
) -> None:
    networks, step = asr.in_process(repository, precision="fp32"), moonshine.DecoderStep(base)
    cross, empty = networks.encoder(clip), base.empty_cache(1)
    actual = np.array(token_by_token(tokens, networks.decoder, cross, empty.numpy()))
    with torch.inference_mode():
        theirs, *_ = moonshine.EncoderGraph(base)(torch.from_numpy(clip))
        expected = token_by_token(tokens, lambda token, *rest: step(torch.from_numpy(token), *rest), theirs, empty)
    np.testing.assert_allclose(actual, np.array(expected), rtol=0, atol=1e-3 * np.abs(np.array(expected)).max())


def test_the_files_give_the_logits_of_the_wheel(repository: Path, clip: Float32, tokens: list[int]) -> None:
    """The wheel's own graphs are an oracle that shares no code with ours; base's compute in float32."""
    wheel = moonshine.WHEELS["base"]
    encoder, decoder = (
        feeds.session(_wheels.wheel_file(wheel.package, f"{wheel.folder}/{name}", sha256))
        for name, sha256 in (("encoder_model.ort", wheel.encoder), ("decoder_model_merged.ort", wheel.decoder))
    )
    (frames,) = encoder.run(None, {"input_values": clip})
    inputs = {
        node.name: np.zeros((1, 8, 0 if "decoder" in node.name else 1, 52), np.float32)
        for node in decoder.get_inputs()
        if node.name.startswith("past_key_values")
    }
    inputs |= {"input_ids": np.array([tokens]), "encoder_hidden_states": frames, "use_cache_branch": np.array([False])}
    ((expected,),) = decoder.run(["logits"], inputs)

    networks = asr.in_process(repository, precision="fp32")
    cross = networks.encoder(clip)
    actual = np.array(token_by_token(tokens, networks.decoder, cross, np.zeros_like(cross[..., :0, :])))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def test_the_first_sentence_comes_out_right(repository: Path, tokens: list[int]) -> None:
    tokenizer = asr.Tokenizer((repository / "asr" / "1" / "tokenizer.bin").read_bytes())
    assert tokenizer.decode(tokens) == SENTENCE


def test_the_embedding_is_in_the_file_once(repository: Path) -> None:
    path = repository / "asr_decoder" / "1" / "model.onnx"
    graph = onnx.load(path).graph
    large = [tensor for tensor in graph.initializer if 32768 in tensor.dims]
    assert len(large) == 1
    assert sum(large[0].name in node.input for node in graph.node) == 2  # looked up, and multiplied with


# A model as small as the sizes allow, in the form that the Hugging Face hub has


@pytest.fixture
def download(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = moonshine.Moonshine(vocabulary=300, width=288, hidden=32, layers=1)
    folder = tmp_path / "download"
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    pieces = {f"\u2581word{number}": number for number in range(3, 300)} | {"\u2581" + "x" * 200: 299}
    document = {
        "model": {"vocab": {piece: number for piece, number in pieces.items() if piece != "\u2581word299"}},
        "added_tokens": [{"id": 0, "content": "<unk>"}, {"id": 1, "content": "<s>"}, {"id": 2, "content": "</s>"}],
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


def test_a_downloaded_model_is_exported_like_a_wheels(download: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    for name in ("asr_encoder", "asr_decoder", "avatar_huma1"):
        (repository / name).mkdir(parents=True)
        text = (ROOT / "model_repository" / name / "config.pbtxt").read_text()
        (repository / name / "config.pbtxt").write_text(text)
    wanted = [model for model in models.models(asr_weights=download) if model.name in moonshine.GRAPHS]
    models.export(repository, wanted, Console(quiet=True))  # compares them with torch, too

    _, table = moonshine.load_folder(download)
    assert (repository / "asr" / "1" / "tokenizer.bin").read_bytes() == table
    assert asr.Tokenizer(table).decode([1, 7, 299, 2]) == "word7 " + "x" * 200
    config = text_format.Parse((repository / "asr_decoder" / "config.pbtxt").read_text(), ModelConfig())
    assert [list(tensor.dims) for tensor in config.input] == [[1], [2, 1, 8, -1, 36], [2, 1, 8, -1, 36]]
    assert list(config.output[1].dims) == [2, 1, 8, -1, 36]
    assert list(config.model_warmup[0].inputs["PAST_KV"].dims) == [2, 1, 8, 1, 36]
    config = text_format.Parse((repository / "asr_encoder" / "config.pbtxt").read_text(), ModelConfig())
    assert {tensor.name: list(tensor.dims) for tensor in config.output} == {
        "CROSS_KV": [2, 1, 8, -1, 36],
        "HIDDEN": [-1, 416],  # as Huma 1's net wants it, with zeros: a server of tiny starts, and refuses its avatars
        "WINDOW": [-1],
    }
    config = text_format.Parse((repository / "avatar_huma1" / "config.pbtxt").read_text(), ModelConfig())
    used = hashlib.sha256((download / "model.safetensors").read_bytes()).hexdigest()
    assert config.parameters["speech_encoder"].string_value == moonshine.encoder_id(used)


def test_a_config_that_fits_keeps_its_comments(base: moonshine.Moonshine, tmp_path: Path) -> None:
    text = (ROOT / "model_repository" / "asr_decoder" / "config.pbtxt").read_text()
    path = tmp_path / "config.pbtxt"
    path.write_text(text)
    moonshine._resize(path, base)
    assert path.read_text() == text


def test_hidden_is_what_the_layers_so_far_hear(base: moonshine.Moonshine, clip: Float32) -> None:
    """As an encoder with fewer layers has it at its end, whose norm is the plain one."""
    encoder = moonshine.Encoder(base.width, hidden=1664, layers=moonshine.HIDDEN_LAYERS)
    own = encoder.state_dict()
    encoder.load_state_dict({name: tensor for name, tensor in base.model.encoder.state_dict().items() if name in own})
    torch.nn.init.ones_(encoder.layer_norm.weight)
    sound = torch.from_numpy(clip)
    with torch.inference_mode():
        frames, hidden = base.model.encoder(sound)
        torch.testing.assert_close(encoder(sound)[0], hidden)
    assert (frames - hidden).abs().mean() > 0.1  # not what the recogniser gets


def test_avatars_are_served_with_the_encoder_that_they_are_fitted_to() -> None:
    config = (ROOT / "model_repository" / "avatar_huma1" / "config.pbtxt").read_text()
    served = text_format.Parse(config, ModelConfig()).parameters["speech_encoder"].string_value
    assert served == moonshine.encoder_id(moonshine.WHEELS["base"].encoder)


def test_names_are_those_of_the_hub(base: moonshine.Moonshine) -> None:
    names = set(base.state_dict())
    assert {
        "model.encoder.conv1.weight",
        "model.encoder.groupnorm.weight",
        "model.encoder.layers.7.self_attn.o_proj.weight",
        "model.encoder.layers.0.mlp.fc1.bias",
        "model.decoder.embed_tokens.weight",
        "model.decoder.layers.7.encoder_attn.k_proj.weight",
        "model.decoder.layers.0.final_layernorm.weight",
        "model.decoder.norm.weight",
    } <= names
    assert len(names) == 8 * (10 + 15) + 10  # layers of the encoder and of the decoder, and the rest


def test_a_download_of_something_else_is_refused(download: Path) -> None:
    save_file({"weight": torch.zeros(2)}, download / "model.safetensors")
    with pytest.raises(WeightsError, match="does not hold Moonshine's weights"):
        moonshine.load_folder(download)


def test_rotary_embedding_depends_on_the_distance_only() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 52, generator=generator)
    for distance in (0, 1, 7):
        products = []
        for position in (0, 5, 400):
            turned = [
                moonshine.rotate(x, *moonshine.rotary_angles(torch.tensor([where])))
                for x, where in ((query, position + distance), (key, position))
            ]
            products.append(float((turned[0] * turned[1]).sum()))
        assert products == pytest.approx([products[0]] * 3, abs=1e-3)
