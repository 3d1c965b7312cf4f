"""The twin of :mod:`talksplat.splat` on a GPU: the same rules, by gsplat 1.5.3 and PyTorch.

The one module of the runtime that imports torch; it is imported where a GPU is asked for and nowhere else. gsplat
draws; what lies around its one call (blending, padding, compositing, rounding) is torch that runs on any device and is
tested on the CPU. gsplat's kernels were not run here.

Images stay on the device until they are JPEG: by nvImageCodec (NVIDIA's own, with 4:2:0 and batches; torchvision's
encoder has neither its chroma subsampling nor CPU builds that carry it), else on the CPU after one copy a batch.
"""

from __future__ import annotations

import logging
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from talksplat.splat import Blendshapes, Bytes, Floats, Job, _checked, _Scene

NEAR = 0.01  # as the core has it; the others of its constants are fixed in gsplat's kernels: 1/255, 0.999, 1e-4
LOW_PASS = 0.3  # px²
UNSEEN = -torch.inf  # an opacity's logit

Picture: TypeAlias = bytes | Bytes  # JPEG, or [H, W, 3] RGB that the caller encodes or sends as it is
Five: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # means, quats, scales, opacities, colors
T = TypeVar("T")

_log = logging.getLogger(__name__)


class DeviceError(RuntimeError):
    """Nothing can draw on a device; the message says what is missing."""


class Rasterize(Protocol):
    """Draws frames, each a scene of its own with one camera: `rasterize`, or what stands in for it in tests."""

    def __call__(
        self,
        means: Tensor,  # [F, N, 3]
        quats: Tensor,  # [F, N, 4] wxyz
        scales: Tensor,  # [F, N, 3]
        opacities: Tensor,  # [F, N]
        colors: Tensor,  # [F, N, 3]
        viewmats: Tensor,  # [F, 4, 4]
        Ks: Tensor,  # [F, 3, 3]  # noqa: N803
        width: int,
        height: int,
        backgrounds: Tensor | None = None,  # [F, 3]
    ) -> tuple[Tensor, Tensor]:  # colours [F, H, W, 3] premultiplied, alphas [F, H, W, 1]
        """See the class."""
        ...


def rasterize(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,  # noqa: N803
    width: int,
    height: int,
    backgrounds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """By gsplat, with gradients; shapes as in `Rasterize`.

    Raises:
        DeviceError: gsplat is not installed.
    """
    drawn, covered, _ = _gsplat()(
        means,
        quats,
        scales,
        opacities,
        colors,
        viewmats[:, None],
        Ks[:, None],
        width,
        height,
        near_plane=NEAR,
        eps2d=LOW_PASS,
        packed=False,
        backgrounds=None if backgrounds is None else backgrounds[:, None],
        render_mode="RGB",
        rasterize_mode="classic",
    )
    return drawn[:, 0], covered[:, 0]


def _gsplat() -> Any:
    try:
        from gsplat import rasterization
    except ImportError as error:
        raise DeviceError(
            f"Drawing on a GPU needs gsplat ({error}): pip install -c constraints.txt './export[gpu]', "
            "or draw on the CPU with --device cpu."
        ) from error
    return rasterization


class Renderer:
    """Draws on one device; keeps there what avatars and plates are made of, for as long as their arrays live.

    For one thread at a time.

    Args:
        device: as torch names it.
        rasterize: what draws.

    Raises:
        DeviceError: torch has no such device, or gsplat is not installed.
    """

    def __init__(self, device: str = "cuda", rasterize: Rasterize = rasterize) -> None:
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise DeviceError(f"There is no device {device!r}: torch {torch.__version__} finds no CUDA GPU.")
        if torch.device(device).type == "cuda":
            _gsplat()  # now, and not at the first frame
        self._device = torch.device(device)
        self._rasterize = rasterize
        self._kept: dict[Hashable, Any] = {}
        self._encode = _nvimgcodec(self._device)

    @torch.inference_mode()
    def render(
        self,
        means: Floats,  # [N, 3] or [F, N, 3]
        quats: Floats,  # [N, 4] or [F, N, 4], wxyz
        scales: Floats,  # [N, 3] or [F, N, 3]
        opacities: Floats,  # [N] or [F, N]
        colors: Floats,  # [N, 3] or [F, N, 3]
        viewmats: Floats,  # [4, 4] or [F, 4, 4]
        Ks: Floats,  # [3, 3] or [F, 3, 3]  # noqa: N803
        width: int,
        height: int,
        *,
        backgrounds: Floats | None = None,  # [3] or [F, 3], black by default
    ) -> tuple[Floats, Floats]:
        """:func:`talksplat.splat.render` in exact mode: ``(colors [..., H, W, 3], alphas [..., H, W, 1])``."""
        scene = _Scene(means, quats, scales, opacities, colors, viewmats, Ks, width, height, backgrounds)
        means_, quats_, scales_, opacities_, colors_, views, intrinsics, behind = (
            self._framed(array, scene.count) for array in (*scene.gaussians, *scene.cameras)
        )
        gaussians = seen(means_, quats_, scales_, opacities_, colors_)
        drawn = self._rasterize(*gaussians, views, intrinsics, scene.width, scene.height, behind)
        images, alphas = (image.cpu().numpy() for image in drawn)
        return scene.frames(images), scene.frames(alphas)

    @torch.inference_mode()
    def render_onto(self, jobs: Sequence[Job]) -> list[Tensor]:
        """:func:`talksplat.splat.render_onto` in exact mode: images [H, W, 3] uint8 on the device, in order.

        One call of gsplat for all jobs whose plates are of one size, whatever their avatars: those with fewer Gaussians
        are filled up with ones that can't be seen. ``out`` is not written to.
        """
        jobs = [_checked(job) for job in jobs]
        planes = self._blended(jobs)
        by_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, job in enumerate(jobs):
            by_size[job.plate.shape].append(index)
        images: dict[int, Tensor] = {}
        for (height, width, _), places in by_size.items():
            drawn, covered = self._rasterize(
                *seen(*activated(padded([planes[place] for place in places]))),
                self._tensor(np.stack([jobs[place].viewmat for place in places])),
                self._tensor(np.stack([jobs[place].K for place in places])),
                width,
                height,
            )
            plates = torch.stack([self._resident(jobs[place].plate, self._bytes) for place in places])
            composed = (255 * drawn + (1 - covered) * plates).round_().clamp_(0, 255).to(torch.uint8)
            images.update(zip(places, composed, strict=True))
        return [images[index] for index in range(len(jobs))]

    def pictures(self, jobs: Sequence[Job], qualities: Sequence[int | None]) -> list[Picture]:
        """Images as they leave the device: JPEG of a quality where the device can, else RGB; None asks for RGB."""
        images = self.render_onto(jobs)
        pictures: dict[int, Picture] = {}
        if self._encode is not None:
            for quality in {each for each in qualities if each is not None}:
                places = [place for place, each in enumerate(qualities) if each == quality]
                pictures.update(zip(places, self._encode([images[place] for place in places], quality), strict=True))
        by_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for place, image in enumerate(images):
            if place not in pictures:
                by_size[tuple(image.shape)].append(place)
        for places in by_size.values():
            copied = torch.stack([images[place] for place in places]).cpu().numpy()
            pictures.update(zip(places, copied, strict=True))
        return [pictures[place] for place in range(len(jobs))]

    def _blended(self, jobs: Sequence[Job]) -> list[Tensor]:  # [14, N] each
        """All frames of an avatar by one product."""
        by_avatar: dict[Blendshapes, list[int]] = defaultdict(list)
        for index, job in enumerate(jobs):
            by_avatar[job.avatar].append(index)
        planes: dict[int, Tensor] = {}
        for avatar, places in by_avatar.items():
            if not avatar.rank:  # shapes of one frame: nothing of them comes again
                planes.update(dict.fromkeys(places, self._tensor(avatar.canonical)))
                continue
            canonical, bases = self._resident(avatar, self._shapes)
            weights = self._tensor(np.stack([jobs[place].weights for place in places]))
            planes.update(zip(places, canonical + torch.einsum("fk,akn->fan", weights, bases), strict=True))
        return [planes[index] for index in range(len(jobs))]

    def _shapes(self, avatar: Blendshapes) -> tuple[Tensor, Tensor]:  # [14, N], [14, K, N]
        scales = self._tensor(avatar.basis_scales)[..., None]
        return self._tensor(avatar.canonical), torch.nan_to_num(scales) * self._tensor(avatar.bases)

    def _tensor(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.tensor(array, dtype=torch.float32, device=self._device)

    def _bytes(self, plate: Bytes) -> Tensor:
        return torch.tensor(plate, device=self._device)

    def _framed(self, array: Floats, frames: int) -> Tensor:
        tensor = self._tensor(array)
        return tensor.expand(frames, *tensor.shape[1:])

    def _resident(self, owner: T, make: Callable[[T], Any]) -> Any:
        """What was made of an object, until the object goes."""
        key = id(owner)
        if key not in self._kept:
            self._kept[key] = make(owner)
            weakref.finalize(owner, self._kept.pop, key, None)
        return self._kept[key]


def padded(
    planes: Sequence[Tensor],  # [14, N] each, N may differ
) -> Tensor:  # [F, 14, N] of the largest
    """Filled up with Gaussians that can't be seen."""
    most = max(each.shape[1] for each in planes)
    out = planes[0].new_zeros(len(planes), planes[0].shape[0], most)
    out[:, 10] = UNSEEN
    for row, each in zip(out, planes, strict=True):
        row[:, : each.shape[1]] = each
    return out


def activated(
    planes: Tensor,  # [F, 14, N]
) -> Five:
    """Means [F, N, 3], quats [F, N, 4], scales [F, N, 3], opacities [F, N], colors [F, N, 3]."""
    rows = planes.transpose(1, 2)
    return (
        rows[..., 0:3].contiguous(),
        rows[..., 3:7].contiguous(),
        rows[..., 7:10].exp(),
        rows[..., 10].sigmoid(),
        rows[..., 11:14].contiguous(),
    )


def seen(means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, colors: Tensor) -> Five:
    """The same Gaussians; one with an attribute that is NaN or infinite, or without a rotation, is of opacity 0."""
    sound = torch.isfinite(opacities) & (quats != 0).any(-1)
    for each in (means, quats, scales, colors):
        sound &= torch.isfinite(each).all(-1)
    clean = [torch.where(sound[..., None], each, torch.ones_like(each)) for each in (means, quats, scales, colors)]
    return clean[0], clean[1], clean[2], torch.where(sound, opacities, 0).clamp_min(0), clean[3]


Encode: TypeAlias = Callable[[Sequence[Tensor], int], list[bytes]]


def _nvimgcodec(device: torch.device) -> Encode | None:
    """JPEG of images on the device, all at once; None where there is no encoder for it."""
    if device.type != "cuda":
        return None
    try:
        from nvidia import nvimgcodec
    except ImportError:
        return None

    def encode(images: Sequence[Tensor], quality: int) -> list[bytes]:
        params = nvimgcodec.EncodeParams(
            quality_type=nvimgcodec.QualityType.QUALITY,
            quality_value=quality,
            chroma_subsampling=nvimgcodec.ChromaSubsampling.CSS_420,
        )
        stream = torch.cuda.current_stream(device).cuda_stream
        streams = encoder.encode(
            [nvimgcodec.as_image(image, stream) for image in images], "jpeg", params=params, cuda_stream=stream
        )
        if any(each is None for each in streams):
            raise DeviceError("nvImageCodec could not encode a frame.")
        return [bytes(each) for each in streams]

    try:
        encoder = nvimgcodec.Encoder(device_id=torch.cuda.current_device() if device.index is None else device.index)
        encode([torch.zeros(16, 16, 3, dtype=torch.uint8, device=device)], 85)
    except Exception as error:  # without nvJPEG, say
        _log.warning("nvImageCodec can't be used, so the CPU makes the JPEGs: %s", error)
        return None
    return encode
