"""Speech to text: Moonshine base or tiny (MIT, https://arxiv.org/abs/2410.15608) as an encoder and a decoder step.

The English models come inside PyPI wheels as int8 ONNX Runtime files with `If` nodes and Microsoft's operators.
Their weights are dequantised into the module below, whose parameter names are those of the Hugging Face model,
so that a downloaded `model.safetensors` loads as well. The two graphs hold no control flow, and the cache of keys
and values travels as tensors:

    asr_encoder  AUDIO [B, T]                          -> CROSS_KV [B, 2, L, H, S, D], HIDDEN [B, S, C], WINDOW [B, T]
    asr_decoder  TOKEN [B, 1], CROSS_KV, PAST_KV [B, 2, L, H, P, D] -> LOGITS [B, V], PRESENT_KV (P + 1)

with L layers, H heads of size D, C channels, S frames of 24 ms; keys stand before values; P is 0 at the start. HIDDEN
is what the encoder hears after `HIDDEN_LAYERS` of its layers, from which Huma 1 animates, with zeros where tiny has no
channels; WINDOW is AUDIO once more, for the next step of its chain. There is no padding mask, since the encoder
normalises over the whole clip: rows of one batch have the same true length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from google.protobuf import text_format
from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs.InferenceSession import InferenceSession
from safetensors.torch import load_file
from torch import Tensor, nn
from tritonclient.grpc.model_config_pb2 import ModelConfig

from talksplat.avatar import SPEECH_WIDTH

from . import dynamic, models, registry
from ._onnx import write
from ._wheels import WeightsError, wheel_file
from .registry import Graph, graph

Size = Literal["base", "tiny"]

GRAPHS = ("asr_encoder", "asr_decoder")

HEADS = 8  # in both sizes
ROTARY = 32  # channels of a head that rotary embedding turns, in both sizes
# Lips follow from a middle layer better than from the last one, which knows words: linear regression of a recording's
# lips leaves 25 % of their variance instead of 29 %.
HIDDEN_LAYERS = 5


class _Wheel(NamedTuple):
    package: str  # import name
    folder: str
    encoder: str  # SHA-256 of each file
    decoder: str
    tokenizer: str


WHEELS: dict[Size, _Wheel] = {
    "base": _Wheel(
        "moonshine_cpp",
        "models/base-en",
        encoder="9d1a19e044cbf89a207723d1adb667de89a5671a1e3e611b8ebe721b2c31219c",
        decoder="370e0c1f161d68dc1c2264c1a82024fb123380da3b73f47f05531d1e8d3308c3",
        tokenizer="04670d78994d030185c3dd843c60591788fed0a56cc6750747bd326825f13ca9",
    ),
    "tiny": _Wheel(
        "moonshine_voice",
        "assets/tiny-en",
        encoder="94e90a4654fc45cdfedb77c4c08e1739f48862998e58fada384b25118134f221",
        decoder="cf524c4862d36e9e5ab032eddc73637efd822d70e868ac575cf1a46e1e4708a0",
        tokenizer="6884b35fd6377d4c4d32336a0bc152f36b64d1e45b6503683cdc238250a8472d",
    ),
}


def encoder_id(weights: str) -> str:
    """What names the speech that a Huma 1 was fitted to: SHA-256 of the encoder's weights, and the layer."""
    return f"{weights}:{HIDDEN_LAYERS}"


# The module


def rotary_angles(
    positions: Tensor,  # [T]
) -> tuple[Tensor, Tensor]:  # [T, ROTARY / 2] each
    """Cosine and sine of rotary position embedding (https://arxiv.org/abs/2104.09864)."""
    frequencies = 10_000.0 ** (-torch.arange(0, ROTARY, 2).float() / ROTARY)
    angles = positions.float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(
    x: Tensor,  # [B, H, T, D]
    cosine: Tensor,  # [T, ROTARY / 2]
    sine: Tensor,
) -> Tensor:
    """Turn the first ROTARY channels of each head, neighbours paired."""
    even, odd = x[..., 0:ROTARY:2], x[..., 1:ROTARY:2]
    turned = torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), dim=-1)
    return torch.cat([turned.flatten(-2), x[..., ROTARY:]], dim=-1)


class Attention(nn.Module):
    """Multi-head attention whose keys and values are made apart from its use, so that they can be cached."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def queries(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, H, T, D]
        """The queries of ``x``, split into heads."""
        return _heads(self.q_proj(x))

    def keys(self, x: Tensor) -> Tensor:
        """The keys of ``x``, split into heads."""
        return _heads(self.k_proj(x))

    def values(self, x: Tensor) -> Tensor:
        """The values of ``x``, split into heads."""
        return _heads(self.v_proj(x))

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:  # [B, H, T, D] each -> [B, T, C]
        """Every query sees every key: in the decoder these are the keys of earlier steps and its own."""
        weights = torch.softmax((queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2), dim=-1)
        y: Tensor = self.o_proj((weights @ values).transpose(1, 2).flatten(2))
        return y


def _heads(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], HEADS, -1).transpose(1, 2)


class Mlp(nn.Module):
    """GELU in the encoder; gated, that is SwiGLU (https://arxiv.org/abs/2002.05202), in the decoder."""

    def __init__(self, width: int, hidden: int, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        self.fc1 = nn.Linear(width, hidden * (2 if gated else 1))
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, C]
        """Each position by itself."""
        x = self.fc1(x)
        if self.gated:
            value, gate = x.chunk(2, dim=-1)
            x = F.silu(gate) * value
        else:
            x = F.gelu(x)
        y: Tensor = self.fc2(x)
        return y


class EncoderLayer(nn.Module):
    """Self-attention and an MLP, both pre-normalised."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(width, bias=False)
        self.self_attn = Attention(width)
        self.post_attention_layernorm = nn.LayerNorm(width, bias=False)
        self.mlp = Mlp(width, hidden, gated=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:  # [B, S, C] -> [B, S, C]
        """Every frame sees the whole clip."""
        normed, attention = self.input_layernorm(x), self.self_attn
        queries, keys = attention.queries(normed), attention.keys(normed)
        x = x + attention(rotate(queries, cosine, sine), rotate(keys, cosine, sine), attention.values(normed))
        y: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y


class DecoderLayer(nn.Module):
    """Self-attention over the cache, cross-attention to the clip and an MLP, all pre-normalised."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(width, bias=False)
        self.self_attn = Attention(width)
        self.post_attention_layernorm = nn.LayerNorm(width, bias=False)
        self.encoder_attn = Attention(width)
        self.final_layernorm = nn.LayerNorm(width, bias=False)
        self.mlp = Mlp(width, hidden, gated=True)

    def forward(
        self,
        x: Tensor,  # [B, 1, C]
        cross: tuple[Tensor, Tensor],  # keys and values of the clip, [B, H, S, D]
        past: tuple[Tensor, Tensor],  # keys and values of earlier steps, [B, H, P, D]
        cosine: Tensor,  # [1, ROTARY / 2]
        sine: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # [B, 1, C], keys and values [B, H, P + 1, D]
        """One step."""
        y, attention = self.input_layernorm(x), self.self_attn
        keys = torch.cat([past[0], rotate(attention.keys(y), cosine, sine)], dim=2)
        values = torch.cat([past[1], attention.values(y)], dim=2)
        x = x + attention(rotate(attention.queries(y), cosine, sine), keys, values)
        queries = self.encoder_attn.queries(self.post_attention_layernorm(x))
        x = x + self.encoder_attn(queries, *cross)
        return x + self.mlp(self.final_layernorm(x)), keys, values


class Encoder(nn.Module):
    """Raw audio to frames of about 24 ms."""

    def __init__(self, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(1, width, 127, stride=64, bias=False)
        self.groupnorm = nn.GroupNorm(1, width)
        self.conv2 = nn.Conv1d(width, 2 * width, 7, stride=3)
        self.conv3 = nn.Conv1d(2 * width, width, 3, stride=2)
        self.layers = nn.ModuleList(EncoderLayer(width, hidden) for _ in range(layers))
        self.layer_norm = nn.LayerNorm(width, bias=False)

    def forward(self, audio: Tensor) -> tuple[Tensor, Tensor]:  # [B, T] -> [B, S, C] each
        """Frames as the decoder wants them, and what the layers up to `HIDDEN_LAYERS` hear, normalised.

        The group norm sees the whole clip, so that padding would change every frame.
        """
        x: Tensor = self.groupnorm(torch.tanh(self.conv1(audio.unsqueeze(1))))
        x = F.gelu(self.conv3(F.gelu(self.conv2(x)))).transpose(1, 2)
        cosine, sine = rotary_angles(torch.arange(x.shape[1]))
        for layer in self.layers[:HIDDEN_LAYERS]:
            x = layer(x, cosine, sine)
        hidden = F.layer_norm(x, x.shape[-1:])
        for layer in self.layers[HIDDEN_LAYERS:]:
            x = layer(x, cosine, sine)
        return self.layer_norm(x), hidden


class Decoder(nn.Module):
    """Holds the decoder's parameters; `DecoderStep` runs them."""

    def __init__(self, vocabulary: int, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(DecoderLayer(width, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)

    def blocks(self) -> list[DecoderLayer]:
        """The layers with their type."""
        return cast(list[DecoderLayer], list(self.layers))


class _Networks(nn.Module):
    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder


class Moonshine(nn.Module):
    """The parameters under the names of Hugging Face's `MoonshineForConditionalGeneration`."""

    def __init__(self, vocabulary: int, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.width, self.layers = width, layers
        self.model = _Networks(Encoder(width, hidden, layers), Decoder(vocabulary, width, hidden, layers))

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Moonshine:
        """Sizes follow from the tensors; a missing, unknown or misshapen one raises RuntimeError."""
        state = {name: tensor for name, tensor in state.items() if name != "proj_out.weight"}  # tied
        vocabulary, width = state["model.decoder.embed_tokens.weight"].shape
        hidden = state["model.encoder.layers.0.mlp.fc1.bias"].shape[0]
        layers = sum(name.endswith("encoder_attn.q_proj.weight") for name in state)
        module = cls(vocabulary, width, hidden, layers)
        module.load_state_dict(state)
        return module.eval()

    def empty_cache(self, batch: int) -> Tensor:
        """`PAST_KV` before the first step, [B, 2, L, H, 0, D]."""
        return torch.zeros(batch, 2, self.layers, HEADS, 0, self.width // HEADS)


class EncoderGraph(nn.Module):
    """`AUDIO` [B, T] -> `CROSS_KV` [B, 2, L, H, S, D], `HIDDEN` [B, S, C], `WINDOW` [B, T]."""

    def __init__(self, model: Moonshine) -> None:
        super().__init__()
        self.encoder, self.decoder = model.model.encoder, model.model.decoder

    def forward(self, audio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All that the decoder wants of the clip, made once; what Huma 1 wants of it; the clip."""
        frames, hidden = self.encoder(audio)
        hidden = F.pad(hidden, (0, SPEECH_WIDTH - hidden.shape[-1]))  # one config serves both sizes
        attentions = [layer.encoder_attn for layer in self.decoder.blocks()]
        cross = _stack(
            [attention.keys(frames) for attention in attentions], [attention.values(frames) for attention in attentions]
        )
        return cross, hidden, audio.clone()


class DecoderStep(nn.Module):
    """`TOKEN`, `CROSS_KV`, `PAST_KV` -> `LOGITS`, `PRESENT_KV`."""

    def __init__(self, model: Moonshine) -> None:
        super().__init__()
        self.decoder = model.model.decoder

    def forward(
        self,
        token: Tensor,  # [B, 1]
        cross: Tensor,  # [B, 2, L, H, S, D]
        past: Tensor,  # [B, 2, L, H, P, D]
    ) -> tuple[Tensor, Tensor]:  # [B, V], [B, 2, L, H, P + 1, D]
        """The logits of the token after this one, and the cache with this one in it."""
        x = self.decoder.embed_tokens(token)
        cosine, sine = rotary_angles(torch.arange(1) + past.shape[4])
        keys, values = [], []
        for i, layer in enumerate(self.decoder.blocks()):
            x, k, v = layer(x, (cross[:, 0, i], cross[:, 1, i]), (past[:, 0, i], past[:, 1, i]), cosine, sine)
            keys.append(k)
            values.append(v)
        # Two dims make it a Gemm that takes the embedding transposed, so that the file holds it once.
        logits = F.linear(self.decoder.norm(x).squeeze(1), self.decoder.embed_tokens.weight)
        return logits, _stack(keys, values)


def _stack(keys: list[Tensor], values: list[Tensor]) -> Tensor:  # L times [B, H, T, D] -> [B, 2, L, H, T, D]
    return torch.stack([torch.stack(keys, dim=1), torch.stack(values, dim=1)], dim=1)


# The weights


def load_wheel(size: Size) -> tuple[Moonshine, bytes]:
    """The dequantised model of a wheel, and its tokenizer.

    Raises:
        WeightsError: the wheel is not installed, or is not the release whose hashes are pinned here.
    """
    wheel = WHEELS[size]
    encoder = wheel_file(wheel.package, f"{wheel.folder}/encoder_model.ort", wheel.encoder)
    decoder = wheel_file(wheel.package, f"{wheel.folder}/decoder_model_merged.ort", wheel.decoder)
    tokenizer = wheel_file(wheel.package, f"{wheel.folder}/tokenizer.bin", wheel.tokenizer)
    state = {f"model.encoder.{name}": array for name, array in _parameters(encoder)}
    state |= dict(_parameters(decoder))
    tensors = {name: torch.from_numpy(np.array(array, np.float32)) for name, array in state.items()}
    return Moonshine.from_state(tensors), tokenizer.read_bytes()


def load_folder(folder: Path) -> tuple[Moonshine, bytes]:
    """The model of a downloaded Hugging Face repository (UsefulSensors/moonshine-base or -tiny), and its tokenizer.

    Raises:
        FileNotFoundError: `model.safetensors` or `tokenizer.json` is missing.
        WeightsError: `model.safetensors` is not Moonshine's.
    """
    weights, tokenizer = folder / "model.safetensors", folder / "tokenizer.json"
    try:
        model = Moonshine.from_state({name: tensor.float() for name, tensor in load_file(weights).items()})
    except (KeyError, RuntimeError) as error:
        raise WeightsError(f"{weights} does not hold Moonshine's weights: {error}") from error
    return model, _tokenizer_table(tokenizer)


def _tokenizer_table(
    path: Path,  # tokenizer.json of the `tokenizers` library
) -> bytes:
    """The table that the wheels carry as `tokenizer.bin`: per id the length (two bytes from 128 on) and the piece."""
    document = json.loads(path.read_text(encoding="utf-8"))
    pieces = {int(index): piece for piece, index in document["model"]["vocab"].items()}
    pieces |= {int(token["id"]): token["content"] for token in document["added_tokens"]}
    table = bytearray()
    for index in range(max(pieces) + 1):
        piece = pieces.get(index, "").encode()
        table += bytes([len(piece)] if len(piece) < 128 else [len(piece) % 128 + 128, len(piece) // 128]) + piece
    return bytes(table)


_NUMPY_TYPES = {1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float16}
_RENAMED = {"attn.dense": "attn.o_proj", "mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"}  # in base only


def _parameters(path: Path) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Name and value of every parameter in an ORT-format file.

    Norms, biases, convolutions and the embedding have their names; a matrix is anonymous and takes the name of the
    node that multiplies with it.
    """
    constants, uses = _read_ort(path)
    plain = {name: array for name, array in constants.items() if not name.endswith(("_scale", "_zero_point"))}
    values = {_plain(name): _dequantised(name, constants) for name in plain}
    for name, array in values.items():
        if name.endswith((".weight", ".bias")):
            yield _renamed(name), array
    for operator, name, inputs in uses:
        module = name.removeprefix("/").replace("/", ".").rpartition(".")[0]
        matrices = [values[_plain(i)] for i in inputs if _plain(i).startswith("onnx::") and _plain(i) in values]
        if module == "groupnorm" and operator in ("Mul", "Add") and matrices:
            yield f"groupnorm.{'weight' if operator == 'Mul' else 'bias'}", matrices[0][:, 0]
        elif "MatMul" in operator and matrices and module != "proj_out":  # proj_out is the embedding again
            yield _renamed(f"{module}.weight"), matrices[0].T


def _plain(name: str) -> str:
    """A tensor's name without the marks of quantisation and of merging the two decoders."""
    return name.removesuffix("_quantized").removesuffix("_add_tensor").replace("_merged_0", "")


def _renamed(name: str) -> str:
    for before, after in _RENAMED.items():
        name = name.replace(before, after)
    return name


def _dequantised(name: str, constants: Mapping[str, npt.NDArray[np.generic]]) -> npt.NDArray[np.float32]:
    """Tiny has integer zero points: (q - zero) * scale; base has float ones: q * scale + zero."""
    array = constants[name]
    if not name.endswith("_quantized"):
        return array.astype(np.float32)
    stem = name.removesuffix("_quantized")
    scale, zero = constants[f"{stem}_scale"].astype(np.float32), constants[f"{stem}_zero_point"]
    offset = zero.astype(np.float32)
    if np.issubdtype(zero.dtype, np.integer):
        return (array.astype(np.float32) - offset) * scale
    return array.astype(np.float32) * scale + offset


def _read_ort(path: Path) -> tuple[dict[str, npt.NDArray[np.generic]], list[tuple[str, str, list[str]]]]:
    """Constants by name, and (operator, name, inputs) of all nodes, those in the branches of `If` included."""
    constants: dict[str, npt.NDArray[np.generic]] = {}
    nodes: list[tuple[str, str, list[str]]] = []
    graphs = [InferenceSession.GetRootAs(path.read_bytes(), 0).Model().Graph()]
    while graphs:
        graph = graphs.pop()
        for tensor in map(graph.Initializers, range(graph.InitializersLength())):
            shape = [tensor.Dims(i) for i in range(tensor.DimsLength())]
            raw = tensor.RawDataAsNumpy()
            constants[tensor.Name().decode()] = raw.view(_NUMPY_TYPES[tensor.DataType()]).reshape(shape)
        for node in map(graph.Nodes, range(graph.NodesLength())):
            inputs = [node.Inputs(i).decode() for i in range(node.InputsLength())]
            nodes.append((node.OpType().decode(), (node.Name() or b"").decode(), inputs))
            branches = (node.Attributes(i).G() for i in range(node.AttributesLength()))
            graphs += [branch for branch in branches if branch is not None]
    return constants, nodes


# The graphs


def graphs(size: Size = "base", weights: Path | None = None) -> list[tuple[Graph, nn.Module]]:
    """What is exported, and the modules that compute it.

    Args:
        size: which wheel to take.
        weights: a downloaded Hugging Face repository to take instead.

    Raises:
        WeightsError: see `load_wheel` and `load_folder`.
    """
    model, _ = _load(size, weights)
    modules = EncoderGraph(model), DecoderStep(model)
    return [(_resized(graph(name), model), module) for name, module in zip(GRAPHS, modules, strict=True)]


def accompany(repository: Path, size: Size = "base", weights: Path | None = None) -> None:
    """Write `asr/1`: the tokenizer, and both graphs as `talksplat.asr` runs them in process; make the configs fit.

    Those that were written for another size get this one's dims, and that of `avatar_huma1` is told the encoder, so
    that it refuses avatars of another one.

    Args and errors: see `graphs`.
    """
    model, tokenizer = _load(size, weights)
    folder = repository / "asr" / "1"
    write(folder / "tokenizer.bin", tokenizer)
    encoder, decoder = (models.path(name, repository=repository) for name in GRAPHS)
    dynamic.quantise(encoder, folder / "encoder.onnx")
    dynamic.quantise(decoder, folder / "decoder.onnx", opened="CROSS_KV")
    for name in GRAPHS:
        _resize(repository / name / "config.pbtxt", model)
    used = hashlib.sha256((weights / "model.safetensors").read_bytes()).hexdigest() if weights else WHEELS[size].encoder
    _name_encoder(repository / "avatar_huma1" / "config.pbtxt", encoder_id(used))


def _load(size: Size, weights: Path | None) -> tuple[Moonshine, bytes]:
    return load_folder(weights) if weights else load_wheel(size)


def _resized(described: Graph, model: Moonshine) -> Graph:
    """The graph of a model of this size; the registry describes base's."""

    def resized(tensor: registry.Tensor) -> registry.Tensor:
        if tensor.name.endswith("_KV"):
            dims = list(tensor.dims)
            dims[1], dims[4] = model.layers, model.width // HEADS
            return replace(tensor, dims=tuple(dims))
        if tensor.name == "LOGITS":
            return replace(tensor, dims=(model.model.decoder.embed_tokens.num_embeddings,))
        return tensor

    return replace(
        described, inputs=tuple(map(resized, described.inputs)), outputs=tuple(map(resized, described.outputs))
    )


def _name_encoder(path: Path, encoder: str) -> None:
    if not path.is_file():
        return
    config = text_format.Parse(path.read_text(), ModelConfig())
    if config.parameters["speech_encoder"].string_value != encoder:
        config.parameters["speech_encoder"].string_value = encoder
        write(path, text_format.MessageToString(config).encode())


def _resize(path: Path, model: Moonshine) -> None:
    """Give a config the model's number of layers and size of heads, if it has another size's.

    The configs are written for the base model, and one that fits is left as it is, with its comments.
    """
    if not path.is_file():
        return
    config = text_format.Parse(path.read_text(), ModelConfig())
    tensors = {tensor.name: tensor.dims for tensor in [*config.input, *config.output]}
    warm = {name: value.dims for warmup in config.model_warmup for name, value in warmup.inputs.items()}
    caches = [dims for each in (tensors, warm) for name, dims in each.items() if name.endswith("_KV")]
    wanted = model.layers, model.width // HEADS
    if all((dims[1], dims[4]) == wanted for dims in caches):
        return
    for dims in caches:
        dims[1], dims[4] = wanted
    write(path, text_format.MessageToString(config).encode())
