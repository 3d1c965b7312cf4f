"""The rasterizer as torch functions: what fitting differentiates through.

Tensors live on the CPU, float32. While they run, one torch thread is enough (``torch.set_num_threads(1)``): the frames
of a batch already keep every core busy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from talksplat import splat


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
        threads: int | None,
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
            threads=threads,
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
        return (*(torch.from_numpy(g) for g in gradients), None, None, None, None, None, None)


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
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`talksplat.splat.render` in exact mode: ``(colors [..., H, W, 3], alphas [..., H, W, 1])``.

    Named after gsplat's function of the same conventions. Gradients flow from both images to the five tensors of the
    Gaussians, not to cameras and backgrounds.
    """
    for name, tensor in (("viewmats", viewmats), ("Ks", Ks), ("backgrounds", backgrounds)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"`{name}` requires a gradient, but the rasterizer has none for it.")
    images: tuple[Tensor, Tensor] = _Rasterization.apply(  # type: ignore[no-untyped-call]
        means, quats, scales, opacities, colors, viewmats, Ks, backgrounds, width, height, threads
    )
    return images


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
    """:func:`talksplat.splat.ssim` as a scalar tensor, with a gradient with respect to ``a``."""
    if b.requires_grad:
        raise ValueError("`b` requires a gradient, but SSIM has one with respect to `a` only.")
    value: Tensor = _Ssim.apply(a, b, data_range)  # type: ignore[no-untyped-call]
    return value


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    if tensor.device.type != "cpu":
        raise ValueError(f"The rasterizer runs on the CPU, but a tensor lives on {tensor.device}.")
    array: NDArray[np.float32] = tensor.detach().numpy()
    return array
