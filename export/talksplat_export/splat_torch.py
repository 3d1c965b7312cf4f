"""The rasterizer as torch functions: what fitting differentiates through.

Tensors are float32. On the CPU the project's own core works; one torch thread is enough meanwhile
(``torch.set_num_threads(1)``): the frames of a batch already keep every core busy. On a GPU the same calls go to gsplat
1.5.3 (the extra ``gpu``), whose conventions the core follows, and to PyTorch. The GPU's path was written without one at
hand: what it asks of gsplat and its SSIM are tested on the CPU, gsplat's kernels were not run here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from talksplat import splat
from talksplat.splat.cuda import DeviceError, rasterize

SSIM_SIDE, SSIM_SIGMA = 11, 1.5  # pixels


class _Rasterization(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        means: Tensor,
        quats: Tensor,
        scales: Tensor,
        opacities: Tensor,
        colors: Tensor,
        viewmats: Tensor,
        intrinsics: Tensor,
        backgrounds: Tensor | None,
        width: int,
        height: int,
    ) -> tuple[Tensor, Tensor]:
        render_colors, render_alphas, tape = splat.render_with_tape(
            _numpy(means),
            _numpy(quats),
            _numpy(scales),
            _numpy(opacities),
            _numpy(colors),
            _numpy(viewmats),
            _numpy(intrinsics),
            width,
            height,
            backgrounds=None if backgrounds is None else _numpy(backgrounds),
        )
        images = torch.from_numpy(render_colors), torch.from_numpy(render_alphas)
        ctx.tape = tape
        # Only so that torch notices when one of them is changed in place before the backward pass.
        ctx.save_for_backward(means, quats, scales, opacities, colors, *images)
        return images

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        grad_colors, grad_alphas = grads
        gradients = ctx.tape.backward(_numpy(grad_colors), _numpy(grad_alphas))
        return (*(torch.from_numpy(g) for g in gradients), None, None, None, None, None)


def rasterization(
    means: Tensor,  # [N, 3] or [F, N, 3]
    quats: Tensor,  # [N, 4] or [F, N, 4], wxyz, any length
    scales: Tensor,  # [N, 3] or [F, N, 3], after activation
    opacities: Tensor,  # [N] or [F, N], after activation
    colors: Tensor,  # [N, 3] or [F, N, 3]
    viewmats: Tensor,  # [4, 4] or [F, 4, 4]
    Ks: Tensor,  # [3, 3] or [F, 3, 3]  # noqa: N803
    width: int,
    height: int,
    *,
    backgrounds: Tensor | None = None,  # [3] or [F, 3]
) -> tuple[Tensor, Tensor]:
    """:func:`talksplat.splat.render` in exact mode: ``(colors [..., H, W, 3], alphas [..., H, W, 1])``.

    Named after gsplat's function of the same conventions, which draws what lives on a GPU. Gradients flow from both
    images to the five tensors of the Gaussians, not to cameras and backgrounds.

    Raises:
        ValueError: a camera or the backgrounds require a gradient; a shape is wrong.
        DeviceError: the tensors live on different devices, or on a GPU and gsplat is not installed.
    """
    for name, tensor in (("viewmats", viewmats), ("Ks", Ks), ("backgrounds", backgrounds)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"`{name}` requires a gradient, but the rasterizer has none for it.")
    device = _device(means, quats, scales, opacities, colors, viewmats, Ks, backgrounds)
    if device.type != "cpu":
        return _gsplat(means, quats, scales, opacities, colors, viewmats, Ks, width, height, backgrounds)
    images: tuple[Tensor, Tensor] = _Rasterization.apply(  # type: ignore[no-untyped-call]
        means, quats, scales, opacities, colors, viewmats, Ks, backgrounds, width, height
    )
    return images


def _gsplat(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    intrinsics: Tensor,
    width: int,
    height: int,
    backgrounds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same by gsplat: every frame is a scene of its own with one camera. Written, not run here on a GPU."""
    given = [(means, 2), (quats, 2), (scales, 2), (opacities, 1), (colors, 2), (viewmats, 2), (intrinsics, 2)]
    given += [] if backgrounds is None else [(backgrounds, 1)]
    counts = {len(tensor) for tensor, dims in given if tensor.ndim > dims}
    if len(counts) > 1:
        raise ValueError(f"The arguments have different numbers of frames: {sorted(counts)}.")
    frames = max(counts, default=1)

    def framed(tensor: Tensor, dims: int) -> Tensor:
        return tensor.expand(frames, *tensor.shape[-dims:])

    means, quats, scales, opacities, colors, viewmats, intrinsics = (framed(*each) for each in given[:7])
    behind = None if backgrounds is None else framed(backgrounds, 1)
    drawn, covered = rasterize(means, quats, scales, opacities, colors, viewmats, intrinsics, width, height, behind)
    lead = slice(None) if counts else 0
    return drawn[lead], covered[lead]


class _Ssim(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, data_range: float) -> Tensor:
        value, gradient = splat.ssim_with_gradient(_numpy(a), _numpy(b), data_range)
        ctx.gradient = torch.from_numpy(gradient)
        return a.new_tensor(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gradient * grads[0], None, None


def ssim(
    a: Tensor,  # [H, W, C] or [F, H, W, C]
    b: Tensor,  # the same; without a gradient
    data_range: float = 1.0,
) -> Tensor:
    """:func:`talksplat.splat.ssim` as a scalar tensor, with a gradient with respect to ``a``; on a GPU by PyTorch.

    Raises:
        ValueError: ``b`` requires a gradient; a shape is wrong.
        DeviceError: the images live on different devices.
    """
    if b.requires_grad:
        raise ValueError("`b` requires a gradient, but SSIM has one with respect to `a` only.")
    if _device(a, b).type != "cpu":
        return _convolved_ssim(a, b, data_range)
    value: Tensor = _Ssim.apply(a, b, data_range)  # type: ignore[no-untyped-call]
    return value


def _convolved_ssim(a: Tensor, b: Tensor, data_range: float) -> Tensor:
    """By two convolutions with a line of the window, for any device."""
    taps = torch.exp(-0.5 * ((torch.arange(SSIM_SIDE, device=a.device) - SSIM_SIDE // 2) / SSIM_SIGMA) ** 2)
    taps = (taps / taps.sum()).to(a.dtype)

    def mean(images: Tensor) -> Tensor:  # [F C, 1, H, W]
        return F.conv2d(F.conv2d(images, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))

    a, b = (image.reshape(-1, *image.shape[-3:]).permute(0, 3, 1, 2).flatten(0, 1)[:, None] for image in (a, b))
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, covariance = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean()


def _device(*tensors: Tensor | None) -> torch.device:
    """Where all of them live."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise DeviceError(f"Tensors live on different devices: {', '.join(sorted(map(str, devices)))}.")
    return devices.pop()


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().numpy()
    return array
