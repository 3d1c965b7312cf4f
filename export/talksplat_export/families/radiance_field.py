"""A conditional neural radiance field, small: colour and density of every point of the head, as the sound has it.

The idea of RAD-NeRF (https://arxiv.org/abs/2211.12368) and ER-NeRF (https://arxiv.org/abs/2307.09323) in plain
PyTorch: triplanes and small MLPs instead of hash grids in CUDA. A coarse triplane and the code of the sound displace a
point, a fine one and the code give its density and colour. The camera is the track's; since the landmarks say where
the face is, rays are sampled only a little before and behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talksplat_export import geometry
from talksplat_export.families.baseline import CODE, Baseline, Crops, Scene
from talksplat_export.geometry import Float32
from talksplat_export.recording import Image

AXES = ((0, 1), (0, 2), (1, 2))  # coordinates of each plane
COARSE, COARSE_CHANNELS = 24, 8
FINE, FINE_CHANNELS = 144, 16
HIDDEN = 64
REACH = 0.2  # of the box: how far a point may be displaced
BEFORE, BEHIND = 0.025, 0.025  # metres around the face's surface at rest
SAMPLES = 10  # of a ray
PLANE_RATE = 8.0  # of the networks' rate of learning
RAYS = 1024  # of a frame, a step
FRAME_RAYS = 4096  # drawn at once
SURFACE_STEPS = 3


class Field(nn.Module):
    """Points [..., 3] in a box of -1..1 and a code [..., C] of their frame -> density [...] and colour [..., 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.coarse = nn.Parameter(0.3 * torch.randn(3, COARSE_CHANNELS, COARSE, COARSE))
        self.fine = nn.Parameter(0.3 * torch.randn(3, FINE_CHANNELS, FINE, FINE))
        condition = CODE + 1  # and the blink
        self.displace = nn.Sequential(
            nn.Linear(3 * COARSE_CHANNELS + condition, 32), nn.ReLU(), nn.Linear(32, 3), nn.Tanh()
        )
        self.look_up = nn.Linear(3 * FINE_CHANNELS + condition, HIDDEN)
        self.answer = nn.Sequential(nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 4))

    def forward(self, points: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        flat, code = points.reshape(-1, 3), condition.expand(*points.shape[:-1], -1).reshape(-1, condition.shape[-1])
        flat = flat + REACH * self.displace(torch.cat([_sample(self.coarse, flat), code], 1))
        found = self.answer(self.look_up(torch.cat([_sample(self.fine, flat), code], 1)))
        density, color = F.softplus(found[:, 0] - 1), torch.sigmoid(found[:, 1:])
        return density.view(points.shape[:-1]), color.view(points.shape)


def _sample(planes: Tensor, points: Tensor) -> Tensor:  # [3, C, S, S], [N, 3] -> [N, 3 C]
    grids = torch.stack([points[:, list(axes)] for axes in AXES])[:, None]
    found = F.grid_sample(planes, grids, mode="bilinear", padding_mode="border", align_corners=True)
    return found[:, :, 0].permute(2, 0, 1).flatten(1)


class RadianceField(Baseline):
    """It draws the whole region, eyes too; a blink is a condition beside the sound."""

    name = "radiance field"
    file = "radiance_field.pt"
    size = 128
    batch = 4
    rate = 8e-3
    steps = 2500

    box: Tensor
    depth: Tensor
    view: Tensor
    intrinsics: Tensor

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        region = scene.region
        self.field = Field()
        rows, columns = np.nonzero(region.mask > 0)
        pixels = np.stack([columns, rows], 1) + 0.5
        depths = region.depth[rows, columns].astype(np.float64)
        edges = [geometry.unproject(pixels, depths + away, region.viewmat, region.K) for away in (-BEFORE, BEHIND)]
        points = np.concatenate(edges)
        box = torch.from_numpy(np.stack([points.min(0), points.max(0)]).astype(np.float32))
        constants = {"box": box, "depth": region.depth, "view": region.viewmat, "intrinsics": region.K}
        for name, value in constants.items():
            self.register_buffer(name, torch.as_tensor(value), persistent=False)

    @staticmethod
    def mask(scene: Scene) -> Float32:
        """The whole region."""
        return scene.region.mask

    def groups(self) -> list[dict[str, Any]]:
        """The triplanes learn faster than the networks."""
        planes = [self.field.coarse, self.field.fine]
        others = [parameter for parameter in self.parameters() if all(parameter is not each for each in planes)]
        return [{"params": others, "lr": self.rate}, {"params": planes, "lr": PLANE_RATE * self.rate}]

    def tables(self) -> int:
        """The triplanes."""
        return self.field.coarse.numel() + self.field.fine.numel()

    def forward(
        self,
        pixels: Tensor,  # [B, R, 2] columns and rows in the reduced windows, centres at .5
        cameras: Tensor,  # [B, 3, 3]
        viewmats: Tensor,  # [B, 4, 4]
        condition: Tensor,  # [B, CODE + 1]
    ) -> Tensor:
        """Colours [B, R, 3] of rays; the last sample is opaque."""
        focal, centre = cameras[:, None, [0, 1], [0, 1]], cameras[:, None, :2, 2]
        rays = torch.cat([(pixels - centre) / focal, torch.ones_like(pixels[..., :1])], -1)
        rotation, offset = viewmats[:, :3, :3], viewmats[:, None, :3, 3]

        def lift(depth: Tensor) -> Tensor:  # [B, R] -> the head's frame
            return (rays * depth[..., None] - offset) @ rotation

        face = self._surface(lift, rays)
        share = torch.arange(SAMPLES) / (SAMPLES - 1)
        if self.training:
            share = share + (torch.rand(*face.shape, SAMPLES) - 0.5) / (SAMPLES - 1)
        depths = face[..., None] - BEFORE + (BEFORE + BEHIND) * share  # [B, R, S]
        points = (rays[..., None, :] * depths[..., None] - offset[:, :, None]) @ rotation[:, None]
        low, high = self.box
        places = (2 * (points - low) / (high - low) - 1).clamp(-1, 1)
        density, color = self.field(places, condition[:, None, None])
        alpha = 1 - torch.exp(-density[..., :-1])
        through = torch.cumprod(torch.cat([torch.ones_like(alpha[..., :1]), 1 - alpha], -1), -1)
        weight = torch.cat([through[..., :-1] * alpha, through[..., -1:]], -1)
        colors: Tensor = (weight[..., None] * color).sum(-2)
        return colors

    @torch.no_grad()
    def _surface(self, lift: Callable[[Tensor], Tensor], rays: Tensor) -> Tensor:
        """The depth [B, R] at which rays meet the face at rest: where the reference view sees it at the same depth."""
        depth = torch.full(rays.shape[:-1], float(self.depth.median()))
        size = self.depth.shape[-1]
        for _ in range(SURFACE_STEPS):
            seen = lift(depth) @ self.view[:3, :3].T + self.view[:3, 3]
            focal, centre = self.intrinsics[[0, 1], [0, 1]], self.intrinsics[:2, 2]
            where = (seen[..., :2] / seen[..., 2:] * focal + centre) * (2 / size) - 1
            known = F.grid_sample(
                self.depth.expand(len(where), 1, -1, -1), where[:, None], padding_mode="border", align_corners=False
            )[:, 0, 0]
            depth = depth + known - seen[..., 2]
        return depth

    def _condition(self, frames: npt.NDArray[np.int64]) -> Tensor:
        blink = torch.from_numpy(self.scene.track.blink[frames])[:, None]
        return torch.cat([self.sound(torch.from_numpy(frames)), blink], 1)

    def loss(self, crops: Crops, frames: npt.NDArray[np.int64], rng: np.random.Generator) -> Tensor:  # noqa: D102
        colors = crops.targets(frames)
        share = (self.window.reduced_mask()[0] * crops.emphasis).flatten().double()
        chances = (share / share.sum()).numpy()
        picked = torch.from_numpy(rng.choice(len(chances), (len(frames), RAYS), p=chances))
        pixels = torch.stack([picked % self.size, picked // self.size], -1) + 0.5
        wanted = colors.flatten(2).gather(2, picked[:, None].expand(-1, 3, -1)).transpose(1, 2)
        cameras = torch.from_numpy(np.stack([self.window.camera(frame) for frame in frames]))
        viewmats = torch.from_numpy(self.scene.track.viewmats[frames])
        drawn = self(pixels, cameras, viewmats, self._condition(frames))
        return F.smooth_l1_loss(drawn, wanted, beta=0.05)

    def predict(self, recorded: Image, index: int) -> Tensor:  # noqa: D102
        around = F.max_pool2d(self.window.reduced_mask(), 3, 1, 1)[0]  # what enlarging mixes in, too
        rows, columns = torch.nonzero(around, as_tuple=True)
        pixels = torch.stack([columns, rows], -1) + 0.5
        camera = torch.from_numpy(self.window.camera(index))[None]
        viewmat = torch.from_numpy(self.scene.track.viewmats[[index]])
        condition = self._condition(np.array([index]))
        parts = [self(part[None], camera, viewmat, condition)[0] for part in torch.split(pixels, FRAME_RAYS)]
        window = torch.zeros(3, self.size, self.size)
        window[:, rows, columns] = torch.cat(parts).T
        return window
