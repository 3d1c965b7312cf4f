"""Voice activity: Silero VAD 6.2.3 (MIT, https://github.com/snakers4/silero-vad) as one stateless graph a window.

Silero steps through a stream, 512 new samples after 64 of context, with an LSTM's state between the steps, and
its stock files have `If` nodes. Here the steps over one window run from a zero state: no state links one request to
the next, windows of different streams batch, and nothing in the graph stops TensorRT.

All but the recurrence runs over all steps at once, as a few large matrix products, and the recurrence is one node: ONNX
Runtime takes three times as long for convolutions over four columns and a node for each product of each step.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from talksplat.clock import CHUNK_FRAMES, CHUNK_SAMPLES, LEFT_CONTEXT, LOOK_AHEAD, SAMPLES_PER_FRAME, WINDOW

from ._wheels import wheel_file
from .registry import Graph, graph

STEP = 512  # new samples a step
CONTEXT = 64  # samples of the step before, put in front of them
STEPS = (WINDOW - CONTEXT) // STEP  # 28
FIRST_STEP = WINDOW - STEPS * STEP  # sample of the window where the first step's new samples begin

SMOOTHING = (1 / 9, 2 / 9, 3 / 9, 2 / 9, 1 / 9)  # over the frame and two on either side

_HOP, _HIDDEN = 128, 128
_STRIDES = (1, 2, 2, 1)


_REACH = len(SMOOTHING) // 2
_CHUNK = LEFT_CONTEXT // SAMPLES_PER_FRAME - _REACH  # its first frame's, and of those before that smooth it
_FRAMES = WINDOW // SAMPLES_PER_FRAME - _CHUNK  # from there to the window's end


def frame_steps() -> list[range]:
    """For each frame from two before the chunk to the window's end, the steps whose new samples overlap it."""
    ranges = []
    for frame in range(_CHUNK, _CHUNK + _FRAMES):
        begin = frame * SAMPLES_PER_FRAME - FIRST_STEP
        end = begin + SAMPLES_PER_FRAME
        ranges.append(range(begin // STEP, -(-end // STEP)))
    return ranges


class SileroVad(nn.Module):
    """`AUDIO` [B, WINDOW] -> `SPEECH` and `LATEST`, [B, CHUNK_FRAMES]: probabilities of speech, one a frame.

    A frame has the largest probability of the steps that overlap it. `SPEECH` is of the chunk, smoothed by a triangle
    over five frames, so that the mouth opens and closes without a jump. `LATEST` is of the window's last frames, as it
    is: who waits for somebody to begin or to finish knows nothing of what follows, and smoothing would cost 40 ms.
    """

    overlapping: Tensor
    smoothing: Tensor
    spectrum: Tensor

    def __init__(self) -> None:
        super().__init__()
        overlapping = torch.tensor([list(steps) for steps in frame_steps()])  # two for every frame
        self.register_buffer("overlapping", overlapping.flatten(), persistent=False)
        self.register_buffer("smoothing", torch.tensor(SMOOTHING)[None, None], persistent=False)

        self.register_buffer("spectrum", torch.zeros(2 * (_HOP + 1), 1, 2 * _HOP))
        widths = (_HOP + 1, 128, 64, 64, _HIDDEN)
        self.encoder = nn.ModuleList(
            nn.Conv1d(before, after, 3, stride, padding=1)
            for (before, after), stride in zip(pairwise(widths), _STRIDES, strict=True)
        )
        self.recurrence = nn.LSTM(_HIDDEN, _HIDDEN, batch_first=True)
        self.output = nn.Linear(_HIDDEN, 1)

    def forward(
        self,
        audio: Tensor,  # [B, WINDOW]
    ) -> tuple[Tensor, Tensor]:  # [B, CHUNK_FRAMES] each
        """See the class."""
        x = self._magnitudes(audio)
        for layer in self.encoder:
            x = F.relu(_convolved(x, layer))
        outputs, _ = self.recurrence(x.reshape(-1, STEPS, _HIDDEN))
        probabilities = torch.sigmoid(self.output(F.relu(outputs))).squeeze(2)
        overlapping = probabilities.index_select(1, self.overlapping)
        frames = torch.maximum(overlapping[:, 0::2], overlapping[:, 1::2])
        chunk = frames[:, : CHUNK_FRAMES + 2 * _REACH].unsqueeze(1)
        return F.conv1d(chunk, self.smoothing).squeeze(1), frames[:, -CHUNK_FRAMES:]

    def _magnitudes(
        self,
        audio: Tensor,  # [B, WINDOW]
    ) -> Tensor:  # [B * STEPS, 4, 129]
        """Of a step's spectra. The last one looks at the step's end mirrored, which is folded into its basis."""
        new = audio[:, FIRST_STEP:].reshape(-1, STEP)
        before = audio[:, FIRST_STEP - CONTEXT : -CONTEXT].reshape(-1, STEP)[:, :CONTEXT]
        steps = torch.cat([before, new], dim=1)
        basis = self.spectrum.squeeze(1).T  # [256, 258]
        inside = 2 * _HOP - CONTEXT
        folded = basis[:inside] + F.pad(basis[inside:].flip(0), (0, 0, inside - CONTEXT - 1, 1))
        spans = torch.stack([steps[:, start : start + 2 * _HOP] for start in range(0, STEP - _HOP, _HOP)], dim=1)
        last = steps[:, STEP - _HOP :] @ folded
        real, imaginary = torch.cat([spans @ basis, last.unsqueeze(1)], dim=1).chunk(2, dim=2)
        return torch.sqrt(real * real + imaginary * imaginary)


def _convolved(
    x: Tensor,  # [B, T, in]
    layer: nn.Module,  # a convolution of width 3, padded by one on either side
) -> Tensor:  # [B, ceil(T / stride), out]
    """The convolution as one matrix product, without the taps that see nothing but padding."""
    assert isinstance(layer, nn.Conv1d)
    size, stride = x.shape[1], layer.stride[0]
    starts = range(-1, size - 1, stride)  # of each output's first tap
    taps = [tap for tap in range(3) if any(0 <= start + tap < size for start in starts)]
    padded = F.pad(x, (0, 0, 1, 1))
    seen = torch.cat([padded[:, 1 + starts[0] + tap :: stride][:, : len(starts)] for tap in taps], dim=2)
    weights = torch.cat([layer.weight[:, :, tap] for tap in taps], dim=1)
    return F.linear(seen, weights, layer.bias)


def load() -> SileroVad:
    """The module with the weights of the silero-vad wheel.

    Raises:
        WeightsError: the wheel is not installed, or is not the release whose hash is pinned here.
    """
    path = wheel_file(
        "silero_vad",
        "data/silero_vad_16k_sequence.onnx",  # the same numbers as the stock model; the .safetensors are others
        sha256="9ccdacc4719d8aa7e45a77536bfabec45a03ba1f2fad5e241ab4060b24238a85",
    )
    graph = onnx.load(path).graph
    stock = {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    recurrence = next(node for node in graph.node if node.op_type == "LSTM")
    weight_in, weight_recurrent, bias = (stock[name][0] for name in recurrence.input[1:4])

    def gates(rows: Tensor) -> Tensor:
        """Gates are in the order input, output, forget, new in ONNX; input, forget, new, output here."""
        inward, outward, forget, new = rows.chunk(4)
        return torch.cat([inward, forget, new, outward])

    bias_in, bias_recurrent = bias.chunk(2)
    state = {
        "spectrum": stock["stft.forward_basis_buffer"],
        "recurrence.weight_ih_l0": gates(weight_in),
        "recurrence.bias_ih_l0": gates(bias_in),
        "recurrence.weight_hh_l0": gates(weight_recurrent),
        "recurrence.bias_hh_l0": gates(bias_recurrent),
        "output.weight": stock["output.weight"].squeeze(2),
        "output.bias": stock["output.bias"],
        **{name: tensor for name, tensor in stock.items() if name.startswith("encoder.")},
    }
    module = SileroVad()
    module.load_state_dict(state)
    return module.eval()


def graphs() -> list[tuple[Graph, nn.Module]]:
    """What is exported, and the module that computes it; raises as `load` does."""
    return [(graph("vad"), load())]


@torch.inference_mode()
def detect(
    audio: npt.NDArray[np.float32],  # [samples]
    frames: int,
) -> npt.NDArray[np.float32]:
    """Probability of speech in each of so many frames, [frames], window by window as a stream is served.

    Silence follows where the audio is shorter.
    """
    module = load()
    chunks = -(-frames // CHUNK_FRAMES)
    audio = audio[: chunks * CHUNK_SAMPLES]
    padded = np.pad(audio, (LEFT_CONTEXT, chunks * CHUNK_SAMPLES - len(audio) + LOOK_AHEAD))
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::CHUNK_SAMPLES]
    found = [module(torch.from_numpy(windows[start : start + 32].copy()))[0] for start in range(0, chunks, 32)]
    return np.asarray(torch.cat(found).reshape(-1).numpy()[:frames])
