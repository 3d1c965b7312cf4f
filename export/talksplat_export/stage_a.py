"""Stage A: fit Gaussians and their motion bases to the frames, through the rasterizer's gradients.

The target of a frame is the recorded frame times the region's mask, premultiplied, and the mask as alpha; so Gaussians
learn nothing of the background and cover the plate wherever the mask is 1.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from numpy.lib.format import open_memmap
from torch import Tensor, nn

from talksplat.avatar import ATTRIBUTES, WEIGHTS
from talksplat.files import replacing
from talksplat_export import splat_torch
from talksplat_export.geometry import Region, project
from talksplat_export.recording import Recording
from talksplat_export.track import Track

Float32 = npt.NDArray[np.float32]
Gaussians: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # means, quats, scales, opacities, colors

# Attribute group: planes, learning rate at rest, learning rate of the bases.
GROUPS = {
    "means": (slice(0, 3), 4e-5, 2e-5),
    "quats": (slice(3, 7), 2e-3, 1e-3),
    "scales": (slice(7, 10), 6e-3, 2e-3),
    "opacities": (slice(10, 11), 2e-2, 4e-3),
    "colors": (slice(11, 14), 3e-3, 1e-3),
}
FINAL_RATE = 0.08  # of the learning rates at the end
BATCH = 4  # frames a step
HALF_SIZE_SHARE = 0.25  # of the steps, at half resolution
SSIM_SHARE = 0.2  # of the colour loss
ALPHA_WEIGHT = 0.5
CHECKPOINT_SECONDS = 60.0
MARGIN = 8  # pixels around the region
CPU = torch.device("cpu")


# --- the frames --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Crops:
    """Frames cut to the region, on disk as bytes; every crop has the same size."""

    frames: npt.NDArray[np.int64]  # [F] indices into the recording
    pixels: npt.NDArray[np.uint8]  # [F, H, W, 3]
    masks: npt.NDArray[np.uint8]  # [F, H, W]
    corners: npt.NDArray[np.int64]  # [F, 2] row and column of the crop in its frame
    emphasis: Float32  # [H, W] weight in the loss

    def target(self, index: int, shrink: int) -> tuple[Tensor, Tensor]:
        """Premultiplied colours [H, W, 3] and alpha [H, W, 1] in 0..1, reduced ``shrink`` times."""
        mask = torch.from_numpy(self.masks[index].astype(np.float32) / 255)[..., None]
        colors = torch.from_numpy(self.pixels[index].astype(np.float32) / 255) * mask
        return _shrink(colors, shrink), _shrink(mask, shrink)

    def even_emphasis(self) -> Tensor:
        """The emphasis [H, W, 1], of mean 1."""
        emphasis = torch.from_numpy(self.emphasis)[..., None]
        return emphasis / emphasis.mean()

    def camera(self, K: Float32, index: int, shrink: int) -> Tensor:  # noqa: N803
        """[3, 3] of a crop, reduced ``shrink`` times."""
        moved = K.copy()
        moved[:2, 2] -= self.corners[index][::-1]
        moved[:2] /= shrink
        return torch.from_numpy(moved)


def cut(
    recording: Recording,
    track: Track,
    region: Region,
    frames: Sequence[int],
    folder: Path,
    advance: Callable[[int], object],
) -> Crops:
    """Read ``frames`` (ascending) of the recording and keep what lies around the region, in ``folder``.

    Args:
        advance: called with the number of frames done.
    """
    rows, columns = np.nonzero(region.mask > 0)
    size = recording.size
    top, left = max(rows.min() - MARGIN, 0), max(columns.min() - MARGIN, 0)
    height, width = (
        min(-(-(last + MARGIN - first) // 16) * 16, size) for first, last in ((top, rows.max()), (left, columns.max()))
    )
    anchor = project(region.centre, region.viewmat, region.K)[1::-1]
    corners = np.empty((len(frames), 2), np.int64)
    for index, frame in enumerate(frames):
        moved = project(region.centre, track.viewmats[frame], track.K)[1::-1]
        corner = np.rint(np.array([top, left]) + moved - anchor).astype(np.int64)
        corners[index] = corner.clip(0, [size - height, size - width])
    folder.mkdir(parents=True, exist_ok=True)
    pixels = _new(folder / "pixels.npy", (len(frames), height, width, 3))
    masks = _new(folder / "masks.npy", (len(frames), height, width))
    wanted = {frame: index for index, frame in enumerate(frames)}
    for number, image in enumerate(recording.frames(0, frames[-1] + 1)):
        if number not in wanted:
            continue
        index = wanted[number]
        r, c = (
            range(int(start), int(start) + length)
            for start, length in zip(corners[index], (height, width), strict=True)
        )
        pixels[index] = image[r.start : r.stop, c.start : c.stop]
        mask = region.seen(region.mask, track.viewmats[number], r, c)
        masks[index] = np.rint(mask.clip(0, 1) * 255)
        advance(index + 1)
    pixels.flush()
    masks.flush()
    top, left = min(top, size - height), min(left, size - width)
    emphasis = region.emphasis[top : top + height, left : left + width]
    np.savez(folder / "crops.npz", frames=np.asarray(frames, np.int64), corners=corners, emphasis=emphasis)
    return open_crops(folder)


def open_crops(folder: Path) -> Crops:
    """What `cut` left in ``folder``."""
    with np.load(folder / "crops.npz") as small:
        arrays = {name: small[name] for name in small.files}
    return Crops(
        pixels=np.load(folder / "pixels.npy", mmap_mode="r"),
        masks=np.load(folder / "masks.npy", mmap_mode="r"),
        **arrays,
    )


def _new(path: Path, shape: tuple[int, ...]) -> np.memmap[Any, np.dtype[np.uint8]]:
    """An array of bytes on disk, to be filled."""
    array: np.memmap[Any, np.dtype[np.uint8]] = open_memmap(path, "w+", np.uint8, shape)  # type: ignore[no-untyped-call]
    with path.open("r+b") as file:  # a disk that is too full is an error here, and a crash when the pages are written
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _shrink(image: Tensor, factor: int) -> Tensor:  # [H, W, C]
    if factor == 1:
        return image
    return F.avg_pool2d(image.permute(2, 0, 1), factor).permute(1, 2, 0)


# --- the model ---------------------------------------------------------------------------------------------------


def activated(planes: Mapping[str, Tensor]) -> Gaussians:  # [F, planes of the group, N] each
    """Means, quats, scales, opacities, colors of each frame, as the rasterizer takes them."""
    return (
        planes["means"].transpose(1, 2),
        planes["quats"].transpose(1, 2),
        planes["scales"].exp().transpose(1, 2),
        planes["opacities"].sigmoid()[:, 0],
        planes["colors"].transpose(1, 2),
    )


class Head(nn.Module):
    """Gaussians of N attributes at rest and their bases; a frame's attributes are linear in its weights."""

    def __init__(self, canonical: Float32, motion: Float32) -> None:  # [14, N], [21, 3, N]
        super().__init__()
        self.count = canonical.shape[1]
        self.rest = nn.ParameterDict()
        self.bases = nn.ParameterDict()
        for name, (planes, _, _) in GROUPS.items():
            rest = torch.from_numpy(canonical[planes].reshape(-1).copy())
            bases = torch.zeros(WEIGHTS, len(rest))
            if name == "means":
                bases[:] = torch.from_numpy(motion.reshape(WEIGHTS, -1))
            self.rest[name], self.bases[name] = nn.Parameter(rest), nn.Parameter(bases)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Head:
        """Of a state that `fit` saved."""
        count = len(state["rest.opacities"])
        head = cls(np.zeros((ATTRIBUTES, count), np.float32), np.zeros((WEIGHTS, 3, count), np.float32))
        head.load_state_dict(state)
        return head

    def groups(self) -> list[dict[str, Any]]:
        """The parameters and their learning rates, as optimizers take them."""
        return [
            {"params": [part[name]], "lr": rate}
            for name, (_, *rates) in GROUPS.items()
            for part, rate in zip((self.rest, self.bases), rates, strict=True)
        ]

    def forward(self, weights: Tensor) -> Gaussians:  # [F, 21]
        """Means, quats, scales, opacities, colors of each frame, as the rasterizer takes them."""
        planes = {
            name: torch.addmm(self.rest[name], weights, self.bases[name]).view(len(weights), -1, self.count)
            for name in GROUPS
        }
        return activated(planes)

    @torch.no_grad()
    def quantised(self) -> tuple[Float32, npt.NDArray[np.int8], Float32]:
        """``canonical`` [14, N], ``bases`` int8 [14, 21, N] and ``basis_scales`` [14, 21] of a bundle."""
        canonical = np.concatenate([self.rest[name].view(-1, self.count).numpy() for name in GROUPS])
        full = np.concatenate([self.bases[name].view(WEIGHTS, -1, self.count).numpy() for name in GROUPS], axis=1)
        return np.ascontiguousarray(canonical), *quantise(full.transpose(1, 0, 2))


def quantise(
    full: Float32,  # [14, 21, N]
) -> tuple[npt.NDArray[np.int8], Float32]:
    """``bases`` [14, 21, N] and ``basis_scales`` [14, 21] of a bundle."""
    scales = np.ascontiguousarray(np.abs(full).max(-1) / 127)
    bases = np.rint(full / np.maximum(scales, 1e-30)[..., None]).astype(np.int8)
    return np.ascontiguousarray(bases), scales.astype(np.float32)


# --- the fit -----------------------------------------------------------------------------------------------------


def sampling(track: Track) -> npt.NDArray[np.float64]:
    """How likely each frame is drawn, [T]: more often with lips wide open or closed, or with shut eyes.

    Never one without a face.
    """
    opening = track.lip_opening
    low, high = np.percentile(opening, [10, 90])
    share = 1 + 1.5 * (opening > high) + 1.0 * (opening < low) + 3.0 * (track.blink > 0.1)
    share *= track.seen
    return np.asarray(share / share.sum(), np.float64)


def fit(
    head: Head,
    crops: Crops,
    track: Track,
    weights: Float32,  # [T, 21]
    sampling: npt.NDArray[np.float64],  # [F] probability of each crop
    steps: int,
    seed: int,
    checkpoint: Path,
    advance: Callable[[int], object],
    device: torch.device = CPU,
) -> list[float]:
    """Train ``head`` in place for ``steps``, see `descend`; returns the loss of every step.

    Args:
        device: that computes; ``head`` comes back to the CPU. A GPU's path is written, not run here: see `splat_torch`.
    """
    head.to(device)
    emphasis = crops.even_emphasis().to(device)

    def loss_at(step: int) -> Tensor:
        picked = np.random.default_rng([seed, step]).choice(len(crops.frames), BATCH, p=sampling)
        gaussians: Gaussians = head(torch.from_numpy(weights[crops.frames[picked]]).to(device))
        shrink = 2 if step / steps < HALF_SIZE_SHARE else 1
        return photometric(gaussians, crops, picked, track, emphasis, shrink)

    try:
        return descend(head, head.groups(), steps, loss_at, checkpoint, advance)
    finally:
        head.to(CPU)


def photometric(
    gaussians: Gaussians,
    crops: Crops,
    picked: npt.NDArray[np.int64],  # [F] of the crops
    track: Track,
    emphasis: Tensor,  # [H, W, 1] of mean 1
    shrink: int,
) -> Tensor:
    """Weighted L1 and SSIM of the premultiplied colours, L1 of the alphas; where the Gaussians live."""
    device = gaussians[0].device
    targets = [crops.target(index, shrink) for index in picked]
    colors, alphas = (torch.stack(images).to(device) for images in zip(*targets, strict=True))
    drawn, covered = splat_torch.rasterization(
        *gaussians,
        torch.from_numpy(track.viewmats[crops.frames[picked]]).to(device),
        torch.stack([crops.camera(track.K, index, shrink) for index in picked]).to(device),
        colors.shape[2],
        colors.shape[1],
    )
    return (
        (1 - SSIM_SHARE) * ((drawn - colors).abs() * _shrink(emphasis, shrink)).mean()
        + SSIM_SHARE * (1 - splat_torch.ssim(drawn, colors))
        + ALPHA_WEIGHT * (covered - alphas).abs().mean()
    )


def descend(
    net: nn.Module,
    groups: Sequence[Mapping[str, Any]],  # its parameters and their learning rates, as optimizers take them
    steps: int,
    loss_at: Callable[[int], Tensor],
    checkpoint: Path,
    advance: Callable[[int], object],
) -> list[float]:
    """Adam with falling rates; returns the loss of every step.

    The state is saved to ``checkpoint`` every minute, and whatever ends the descent. It goes on from there if that can
    be read: the steps are then those of one that was not interrupted.

    Args:
        advance: called with the number of steps done.
    """
    optimizer = torch.optim.Adam([dict(group) for group in groups], betas=(0.9, 0.99), eps=1e-15, fused=True)
    losses: list[float] = []
    state = None
    with contextlib.suppress(Exception):  # whatever zipfile, pickle and PyTorch say to a missing or damaged file
        state = torch.load(checkpoint, weights_only=True, map_location=next(net.parameters()).device)
    if state is not None:
        net.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"]

    def save() -> None:
        state = {"head": net.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
        with replacing(checkpoint) as partial:
            torch.save(state, partial)

    saved = time.monotonic()
    try:
        for step in range(len(losses), steps):
            for group, given in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = given["lr"] * FINAL_RATE ** (step / steps)
            loss = loss_at(step)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
            advance(step + 1)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                save()
                saved = time.monotonic()
    finally:
        save()
    return losses
