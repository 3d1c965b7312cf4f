"""The audio encoder: a window of speech in, what the mouth is about to do out.

Log-mel inside the graph, then unpadded convolutions only, so a frame's features depend on the audio around it and not
on its place in the window: a stream cut into windows and a long recording encoded at once give the same features.
Frame ``i`` describes the instant ``i / FPS`` seconds. It hears from LEFT_CONTEXT before that instant to 155 ms after
it, which is 115 ms after the end of its own 40 ms.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from talksplat.avatar import FEATURES
from talksplat.clock import LEFT_CONTEXT, SAMPLE_RATE, SAMPLES_PER_FRAME, WINDOW

from .registry import Graph, graph

HOP = 160  # samples between mel frames, 10 ms
WEIGHTS = Path(__file__).with_name("weights") / "audio_encoder.safetensors"

_N_FFT = 400
_MELS = 64
_WIDTH = 176
_LEVEL_FRAMES = 40  # mel frames (400 ms) whose mean power is the reference level of the last of them
_LEVEL_FLOOR = 1e-8  # -80 dBFS: below it nothing is lifted, so digital silence stays silent
_RANGE_FLOOR = 1e-5  # 50 dB below the level counts as nothing
_DILATIONS = (1, 1, 2, 2)
_DEEPER = 2  # layers more at 25 Hz, where depth costs little
_BLOCK = 40  # samples; hop, half a frame and WINDOW are multiples
_BLOCK_FRAMES = 1500  # frames that `encode` computes at once: a minute


def mel_filters(mels: int = _MELS, n_fft: int = _N_FFT) -> npt.NDArray[np.float64]:
    """Triangular filters [mels, n_fft // 2 + 1] on Slaney's mel scale (Auditory Toolbox, 1998), weights of sum 1."""
    log_step = np.log(6.4) / 27  # linear below 1 kHz (15 mel), logarithmic above
    top = 15 + np.log(SAMPLE_RATE / 2 / 1000) / log_step
    mel = np.linspace(0, top, mels + 2)
    edges = np.where(mel < 15, mel * 1000 / 15, 1000 * np.exp(log_step * (mel - 15)))
    bins = np.linspace(0, SAMPLE_RATE / 2, n_fft // 2 + 1)
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = np.clip(np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)), 0, None)
    filters: npt.NDArray[np.float64] = triangles / triangles.sum(axis=1, keepdims=True)
    return filters


class MelPower(nn.Module):
    """Audio [B, T] -> mel power [B, mels, (T - 400) // 160 + 1]; white noise of variance v gives about v.

    The short-time Fourier transform is a strided convolution with a windowed DFT basis: a graph without STFT or
    complex numbers compiles everywhere.
    """

    basis: Tensor
    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        window = np.hanning(_N_FFT + 1)[:-1]  # periodic
        window /= np.sqrt(np.sum(window**2))
        angle = 2 * np.pi / _N_FFT * np.outer(np.arange(_N_FFT // 2 + 1), np.arange(_N_FFT))
        basis = np.concatenate([np.cos(angle), -np.sin(angle)]) * window
        self.register_buffer("basis", torch.tensor(basis[:, None], dtype=torch.float32), persistent=False)
        self.register_buffer("filters", torch.tensor(mel_filters()[..., None], dtype=torch.float32), persistent=False)

    def forward(self, audio: Tensor) -> Tensor:  # noqa: D102
        real, imaginary = F.conv1d(audio.unsqueeze(1), self.basis, stride=HOP).chunk(2, dim=1)
        return F.conv1d(real * real + imaginary * imaginary, self.filters)


class _Convolution(nn.Sequential):
    """Unpadded convolution, batch normalisation (folded into it by every runtime) and ReLU.

    What it adds to a trained encoder begins as next to nothing where ``scale`` is small.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1, scale: float = 1.0
    ) -> None:
        norm = nn.BatchNorm1d(outputs)
        nn.init.constant_(norm.weight, scale)
        super().__init__(
            nn.Conv1d(inputs, outputs, kernel, stride=stride, dilation=dilation, bias=False), norm, nn.ReLU()
        )


class AudioEncoder(nn.Module):
    """AUDIO f32 [B, T] -> FEATURES f32 [B, (T - 12720) // 640 + 1, 128]; a request's T is WINDOW: 4 frames.

    The features have zero mean and unit variance over the training speech.
    """

    level_weight: Tensor
    level_floor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.mel_power = MelPower()
        mean = torch.full((1, _MELS, _LEVEL_FRAMES), 1 / (_MELS * _LEVEL_FRAMES))
        self.register_buffer("level_weight", mean, persistent=False)
        self.register_buffer("level_floor", torch.tensor([_LEVEL_FLOOR]), persistent=False)
        self.stem = _Convolution(_MELS, _WIDTH, 5, stride=2)  # 100 Hz -> 50 Hz
        self.blocks = nn.ModuleList(_Convolution(_WIDTH, _WIDTH, 3, dilation=d) for d in _DILATIONS)
        self.merge = _Convolution(_WIDTH, _WIDTH, 6, stride=2)  # 50 Hz -> 25 Hz
        self.refine = _Convolution(_WIDTH, _WIDTH, 1)
        self.deepen = nn.ModuleList(_Convolution(_WIDTH, _WIDTH, 1, scale=0.1) for _ in range(_DEEPER))
        self.project = nn.Conv1d(_WIDTH, FEATURES, 1, bias=False)
        self.standardise = nn.BatchNorm1d(FEATURES, affine=False)

    def log_mel(self, audio: Tensor) -> Tensor:
        """Log-mel [B, mels, frames] relative to the mean power of the 400 ms before, so that gain does not matter."""
        power = self.mel_power(audio)
        # One convolution with the floor as its bias: a mean gives other bits in ONNX Runtime for a batch of one, and
        # the ONNX optimiser takes an added 1e-8 for a zero.
        level = F.conv1d(power, self.level_weight, self.level_floor)
        relative = power[:, :, _LEVEL_FRAMES - 1 :] / level
        return torch.log10(relative + _RANGE_FLOOR) + 2.5

    def forward(self, audio: Tensor) -> Tensor:  # noqa: D102
        x = self.stem(self.log_mel(audio))
        for block, dilation in zip(self.blocks, _DILATIONS, strict=True):
            x = x[:, :, dilation:-dilation] + block(x)
        x = self.merge(x)
        for block in (self.refine, *self.deepen):
            x = x + block(x)
        features: Tensor = self.standardise(self.project(x))
        return features.transpose(1, 2)

    @torch.inference_mode()
    def encode(self, audio: Tensor) -> Tensor:
        """Features [frames, 128] of a whole recording [T]; frames = ceil(T / 640), silence before and after it.

        Raises:
            ValueError: the recording is not one-dimensional, empty, or holds NaN or infinity.
        """
        if audio.ndim != 1 or len(audio) == 0:
            raise ValueError(f"expected a recording [T] with T > 0, got shape {tuple(audio.shape)}")
        if not bool(torch.isfinite(audio).all()):
            raise ValueError("the recording holds NaN or infinity")
        frames = -(-len(audio) // SAMPLES_PER_FRAME)
        after = RECEPTIVE_FIELD - LEFT_CONTEXT + (frames - 1) * SAMPLES_PER_FRAME - len(audio)
        padded = F.pad(audio, (LEFT_CONTEXT, max(after, 0)))
        blocks = []
        for first in range(0, frames, _BLOCK_FRAMES):
            count = min(_BLOCK_FRAMES, frames - first)
            start = first * SAMPLES_PER_FRAME
            stop = start + RECEPTIVE_FIELD + (count - 1) * SAMPLES_PER_FRAME
            blocks.append(self(padded[None, start:stop])[0])
        return torch.cat(blocks)


def _receptive_field() -> int:
    """Samples that one frame hears."""
    half_rate_frames = 6 + 2 * sum(_DILATIONS)
    mel_frames = (half_rate_frames - 1) * 2 + 5 + _LEVEL_FRAMES - 1
    return (mel_frames - 1) * HOP + _N_FFT


RECEPTIVE_FIELD = _receptive_field()


def load(weights: Path = WEIGHTS) -> AudioEncoder:
    """The pretrained encoder, ready for inference."""
    encoder = AudioEncoder()
    encoder.load_state_dict(load_file(weights))
    return encoder.eval()


class _MelFrames(nn.Module):
    """`MelPower` of a WINDOW, [B, mel frames, mels + 1]; the last column is the mean power over `_LEVEL_FRAMES`.

    A frame's samples n and 400 - n share their cosine, and their sine but for its sign. So the second half is mirrored
    onto the first, and both products are half as large.
    """

    cosines: Tensor
    sines: Tensor
    filters: Tensor
    first: Tensor
    second: Tensor

    def __init__(self, power: MelPower) -> None:
        super().__init__()
        half = _N_FFT // 2
        bins = slice(1, half)  # no filter hears the lowest and the highest
        cosines, sines = (part[bins, 0, 1 : half + 1].T.clone() for part in power.basis.chunk(2))
        cosines[-1] /= 2  # the middle is its own mirror image
        filters = power.filters[:, bins, 0].T
        self.register_buffer("cosines", cosines)
        self.register_buffer("sines", sines)
        self.register_buffer("filters", torch.cat([filters, filters.mean(1, keepdim=True) / _LEVEL_FRAMES], dim=1))
        self.blocks = WINDOW // _BLOCK
        start = torch.arange((WINDOW - _N_FFT) // HOP + 1)[:, None] * (HOP // _BLOCK)
        blocks = torch.arange(half // _BLOCK)
        self.register_buffer("first", (start + blocks).flatten())
        self.register_buffer("second", (start + _N_FFT // _BLOCK - 1 - blocks).flatten())

    def forward(self, audio: Tensor) -> Tensor:
        half = _N_FFT // 2
        shifted = audio[:, 1 : 1 - _BLOCK].reshape(-1, self.blocks - 1, _BLOCK)  # as the window of sample 0 is 0
        mirrored = audio.reshape(-1, self.blocks, _BLOCK).flip(2)
        early = shifted.index_select(1, self.first).reshape(-1, half)  # samples 1 to 200 of each frame
        late = mirrored.index_select(1, self.second).reshape(-1, half)  # 399 to 200
        real, imaginary = (early + late) @ self.cosines, (early - late) @ self.sines
        power: Tensor = (real * real + imaginary * imaginary) @ self.filters
        return power.reshape(-1, len(self.first) * _BLOCK // half, self.filters.shape[1])


class _Product(nn.Module):
    """A `_Convolution` without its ReLU, [B, T, C] -> [B * T', C']: frames side by side, times one matrix."""

    weight: Tensor
    bias: Tensor
    seen: Tensor

    def __init__(self, convolution: nn.Module, norm: nn.Module, frames: int) -> None:
        super().__init__()
        assert isinstance(convolution, nn.Conv1d)
        assert isinstance(norm, nn.BatchNorm1d)
        folded = fuse_conv_bn_eval(convolution, norm)
        (kernel,), (stride,), (dilation,) = convolution.kernel_size, convolution.stride, convolution.dilation
        assert folded.bias is not None
        self.kernel, self.frames = kernel, (frames - dilation * (kernel - 1) - 1) // stride + 1
        self.register_buffer("weight", folded.weight.detach().transpose(1, 2).flatten(1))
        self.register_buffer("bias", folded.bias.detach())
        seen = torch.arange(self.frames)[:, None] * stride + torch.arange(kernel) * dilation
        self.register_buffer("seen", seen.flatten())

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel > 1:
            x = x.index_select(1, self.seen).reshape(-1, self.weight.shape[1])
        return F.linear(x, self.weight, self.bias)


class MatrixEncoder(nn.Module):
    """What an `AudioEncoder` computes of one WINDOW, as large matrix products; batch normalisation is folded into them.

    ONNX Runtime takes 1.5 times as long for the convolutions on a CPU. All has two dims where it is multiplied, and
    rows enough, so that a window has the same bits in every batch.
    """

    level_weight: Tensor
    level_floor: Tensor

    def __init__(self, encoder: AudioEncoder) -> None:
        super().__init__()
        self.mel_power = _MelFrames(encoder.mel_power)
        self.register_buffer("level_weight", torch.ones(1, 1, _LEVEL_FRAMES))
        self.register_buffer("level_floor", encoder.level_floor)
        frames = (WINDOW - _N_FFT) // HOP + 2 - _LEVEL_FRAMES
        self.stem = _Product(encoder.stem[0], encoder.stem[1], frames)
        frames = self.stem.frames
        self.blocks = nn.ModuleList()
        for block in encoder.blocks:
            assert isinstance(block, _Convolution)
            self.blocks.append(product := _Product(block[0], block[1], frames))
            frames = product.frames
        self.merge = _Product(encoder.merge[0], encoder.merge[1], frames)
        deeper = [encoder.refine, *(block for block in encoder.deepen if isinstance(block, _Convolution))]
        self.deepen = nn.ModuleList(_Product(block[0], block[1], self.merge.frames) for block in deeper)
        self.project = _Product(encoder.project, encoder.standardise, self.merge.frames)

    def forward(self, audio: Tensor) -> Tensor:  # noqa: D102
        power = self.mel_power(audio)
        level = F.conv1d(power[:, :, _MELS].unsqueeze(1), self.level_weight, self.level_floor)
        relative = power[:, _LEVEL_FRAMES - 1 :, :_MELS] / level.transpose(1, 2)
        x = F.relu(self.stem(torch.log10(relative + _RANGE_FLOOR) + 2.5)).reshape(-1, self.stem.frames, _WIDTH)
        for block, dilation in zip(self.blocks, _DILATIONS, strict=True):
            x = x[:, dilation:-dilation] + F.relu(block(x)).reshape(-1, x.shape[1] - 2 * dilation, _WIDTH)
        x = F.relu(self.merge(x))
        for block in self.deepen:
            x = x + F.relu(block(x))
        features: Tensor = self.project(x)
        return features.reshape(-1, self.merge.frames, FEATURES)


class _Served(nn.Module):
    """The encoder, and its input once more: Triton's steps form a chain, in which the next one needs the audio."""

    def __init__(self, encoder: AudioEncoder) -> None:
        super().__init__()
        self.encoder = MatrixEncoder(encoder)

    def forward(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(audio), audio.clone()


def graphs() -> list[tuple[Graph, nn.Module]]:
    """What is exported, and the module that computes it."""
    return [(graph("audio_encoder"), _Served(load()))]
