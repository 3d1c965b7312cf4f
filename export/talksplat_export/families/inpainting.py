"""A 2D generator, small: the lower face is cut out of the frame and painted in again to fit the sound.

The idea of Wav2Lip (https://arxiv.org/abs/2008.10010) and MuseTalk (https://arxiv.org/abs/2410.10122): a U-Net sees
the frame without mouth and jaw, and a reference frame of the same person; the sound modulates its layers. There is no
discriminator, lip-sync expert or latent space: L1, SSIM and the differences of neighbouring pixels are the loss.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talksplat_export import splat_torch
from talksplat_export.families.baseline import CODE, Baseline, Crops, Scene
from talksplat_export.geometry import Float32
from talksplat_export.recording import Image

WIDTHS = (16, 40, 80, 128)  # channels at a half, a quarter, ... of the window's size
SEAM = 0.15  # distances between the eyes that the mask takes to begin below the nose
SSIM_WEIGHT = 0.2
EDGE_WEIGHT = 1.0
LOGIT_EDGE = 0.02  # what is darker or lighter counts as this far from black or white


class _Block(nn.Module):
    """Two convolutions; the code scales and shifts what lies between them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.GroupNorm(4, outputs)
        self.modulate = nn.Linear(CODE, 2 * outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, image: Tensor, code: Tensor) -> Tensor:
        scale, shift = self.modulate(code)[..., None, None].chunk(2, 1)
        hidden = F.silu(self.norm(self.first(image)) * (1 + scale) + shift)
        return F.silu(self.second(hidden))


class UNet(nn.Module):
    """Visible window, reference and mask [B, 7, S, S] with a code [B, CODE] -> the window [B, 3, S, S].

    What it computes is added to the reference.
    """

    def __init__(self) -> None:
        super().__init__()
        inputs = 7 * 4  # two by two pixels are one
        pairs = list(itertools.pairwise(WIDTHS))
        self.stem = _Block(inputs, WIDTHS[0])
        self.down = nn.ModuleList(_Block(a, b) for a, b in pairs)
        self.up = nn.ModuleList(_Block(a + b, a) for a, b in reversed(pairs))
        self.out = nn.Conv2d(WIDTHS[0], 3 * 4, 3, padding=1)
        nn.init.zeros_(self.out.weight)  # a fit begins with the reference
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, image: Tensor, code: Tensor) -> Tensor:  # noqa: D102
        x = F.pixel_unshuffle(image, 2).to(memory_format=torch.channels_last)
        levels = [self.stem(x, code)]
        for block in self.down:
            levels.append(block(F.avg_pool2d(levels[-1], 2), code))
        x = levels.pop()
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2), levels.pop()], 1), code)
        return torch.sigmoid(torch.logit(image[:, 3:6], LOGIT_EDGE) + F.pixel_shuffle(self.out(x), 2))


class Inpainting(Baseline):
    """Everything above the nose stays as it was recorded, eyes and brows too."""

    name = "2D generator"
    file = "inpainting.pt"
    size = 192
    batch = 6
    rate = 2e-3
    steps = 2500

    reference: Tensor
    hidden: Tensor  # [1, size, size] 1 where nothing is seen

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.net = UNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        train = scene.track[: scene.training]
        calm = int(np.argmin(np.linalg.norm(train.expression, axis=1) + 10 * train.blink))
        frame = next(scene.recording.frames(calm, calm + 1))
        self.register_buffer("reference", self.window.cut(frame, calm))
        self.register_buffer("hidden", (self.window.reduced_mask() > 0).float(), persistent=False)

    @staticmethod
    def mask(scene: Scene) -> Float32:
        """The region below the nose."""
        rows = np.arange(scene.recording.size, dtype=np.float32)[:, None]
        below = ((rows - scene.nose_line) / (SEAM * scene.unit)).clip(0, 1)
        return np.asarray(scene.region.mask * (below * below * (3 - 2 * below)), np.float32)

    def forward(self, colors: Tensor, frames: Tensor) -> Tensor:
        """Windows [B, 3, S, S] from what lies outside the mask, and the sound of frames [B]."""
        hidden, reference = (each.expand(len(colors), -1, -1, -1) for each in (self.hidden, self.reference))
        painted: Tensor = self.net(torch.cat([colors * (1 - hidden), reference, hidden], 1), self.sound(frames))
        return painted

    def loss(self, crops: Crops, frames: npt.NDArray[np.int64], rng: np.random.Generator) -> Tensor:  # noqa: D102
        wanted, mask = crops.targets(frames), self.window.reduced_mask()
        seen = self(wanted, torch.from_numpy(frames)) * mask + wanted * (1 - mask)
        heavy = (crops.emphasis * mask).expand(len(frames), -1, -1, -1)
        edges = sum(
            ((seen.diff(dim=dim) - wanted.diff(dim=dim)).abs() * heavy.narrow(dim, 1, self.size - 1)).mean()
            for dim in (2, 3)
        )
        similarity = splat_torch.ssim(_rows(seen), _rows(wanted))
        loss: Tensor = ((seen - wanted).abs() * heavy).mean() + SSIM_WEIGHT * (1 - similarity) + EDGE_WEIGHT * edges
        return loss

    def predict(self, recorded: Image, index: int) -> Tensor:  # noqa: D102
        painted: Tensor = self(self.window.cut(recorded, index)[None], torch.tensor([index]))[0]
        return painted


def _rows(images: Tensor) -> Tensor:  # [B, C, H, W] -> [B, H, W, C]
    return images.permute(0, 2, 3, 1).contiguous()
