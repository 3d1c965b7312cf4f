"""Gaussian splatting on the CPU: draw, differentiate, blend and composite.

Conventions are those of gsplat 1.5.3: quaternions are wxyz and of any length; scales and opacities are given
after activation; a view matrix takes world to camera coordinates (+z forward, +y down); pixel centres lie at
.5; 0.3 px² are added to the 2D covariance's diagonal; alpha is at most 0.999, and below 1/255 it adds nothing; a
pixel stops before the Gaussian that would take its transmittance to 1e-4 or less; what lies nearer than 0.01 is not
drawn. Colours are plain RGB. Equal depths keep their order.

Two modes. ``"exact"`` follows that rule to the letter and has gradients. ``"fast"`` is for serving: it clamps a
Gaussian's opacity and not its alpha at each pixel, and a 4 x 4 block of pixels stops as a whole.

A Gaussian that can't be seen is left out: behind the camera, off the image, of an opacity below 1/255, or with any
attribute that is NaN or infinite. Its gradient is zero.

One thread draws one frame; the frames of a batch are shared out over a private pool of threads, and the GIL is
free meanwhile. Every function takes ``isa`` (one of :func:`isas`; the fastest by default) and ``threads`` (how many
frames at a time; as many as there are usable cores by default).

Arrays are NumPy's, float32 unless said otherwise. Those that aren't contiguous are copied. A wrong dtype raises
:class:`TypeError`, a wrong shape or value :class:`ValueError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from talksplat.splat import _core

__all__ = [
    "MAX_SIZE",
    "Blendshapes",
    "DirtyRenderer",
    "Gaussians",
    "Job",
    "Mode",
    "Tape",
    "blend",
    "isas",
    "render",
    "render_onto",
    "render_with_tape",
    "ssim",
    "ssim_with_gradient",
]

Floats: TypeAlias = NDArray[np.float32]
Bytes: TypeAlias = NDArray[np.uint8]
Mode: TypeAlias = Literal["exact", "fast"]
_Scalar = TypeVar("_Scalar", bound=np.generic)

MAX_SIZE = _core.MAX_SIZE  # pixels, of an image's height and width


class Gaussians(NamedTuple):
    """Gaussians, or the gradients of a loss with respect to them; ``...`` is nothing or [F]."""

    means: Floats  # [..., N, 3]
    quats: Floats  # [..., N, 4] wxyz
    scales: Floats  # [..., N, 3] standard deviations
    opacities: Floats  # [..., N] in [0, 1]
    colors: Floats  # [..., N, 3] RGB in [0, 1]


def isas() -> tuple[str, ...]:
    """The instruction sets that this processor can run, fastest first: ``avx512``, ``avx2``, ``portable``."""
    return tuple(_core.isas())


# ---------------------------------------------------------------------------------------------------- drawing


def render(
    means: Floats,  # [N, 3], or [F, N, 3]: other Gaussians in every frame
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
    mode: Mode = "exact",
    isa: str | None = None,
    threads: int | None = None,
) -> tuple[Floats, Floats]:
    """Draw frames: ``(render_colors [..., H, W, 3], render_alphas [..., H, W, 1])``.

    ``...`` is [F] where any argument has a frame dimension, else nothing. Colours are premultiplied and lie over the
    background: ``sum of weights * colors + (1 - alpha) * background``.
    """
    scene = _Scene(means, quats, scales, opacities, colors, viewmats, Ks, width, height, backgrounds)
    out = scene.images()
    _core.render(scene.core, _is_fast(mode), _isa(isa), _threads(threads), *out)
    return scene.frames(out[0]), scene.frames(out[1][..., None])


def render_with_tape(
    means: Floats,
    quats: Floats,
    scales: Floats,
    opacities: Floats,
    colors: Floats,
    viewmats: Floats,
    Ks: Floats,  # noqa: N803
    width: int,
    height: int,
    *,
    backgrounds: Floats | None = None,
    isa: str | None = None,
    threads: int | None = None,
) -> tuple[Floats, Floats, Tape]:
    """:func:`render` in exact mode, and a :class:`Tape` that takes gradients back to the Gaussians."""
    scene = _Scene(means, quats, scales, opacities, colors, viewmats, Ks, width, height, backgrounds)
    tape = Tape(scene, _isa(isa), _threads(threads))
    render_colors, render_alphas = tape._images
    return scene.frames(render_colors), scene.frames(render_alphas[..., None]), tape


class Tape:
    """What :func:`render_with_tape` keeps for the gradients: arguments, images, and who touches which pixels.

    Neither the Gaussians nor the images may be changed in place before :meth:`backward`.
    """

    def __init__(self, scene: _Scene, isa: str, threads: int) -> None:
        self._scene = scene
        self._images = scene.images()
        self._core = _core.Tape(scene.core, isa, threads, *self._images)

    def backward(
        self,
        grad_colors: Floats,  # [..., H, W, 3], as render_colors
        grad_alphas: Floats | None = None,  # [..., H, W, 1], as render_alphas; zero by default
    ) -> Gaussians:
        """Gradients of a loss, from its gradients with respect to both images.

        Each has the shape of its argument: those of Gaussians that frames share are summed over the frames. As in
        gsplat, none flows through an alpha at its limit, through culling, or through the order of depths.
        """
        scene, lead = self._scene, self._scene.lead
        grad_colors = _floats("grad_colors", grad_colors, (*lead, scene.height, scene.width, 3))
        if grad_alphas is None:
            grad_alphas = np.zeros((*lead, scene.height, scene.width, 1), np.float32)
        grad_alphas = _floats("grad_alphas", grad_alphas, (*lead, scene.height, scene.width, 1))
        grads = [np.empty((scene.count, *g.shape[1:]), np.float32) for g in scene.gaussians]
        self._core.backward(
            grad_colors.reshape(scene.count, scene.height, scene.width, 3),
            grad_alphas.reshape(scene.count, scene.height, scene.width),
            *grads,
        )
        return Gaussians(
            *(
                grad if batched else grad[0] if scene.count == 1 else grad.sum(axis=0)
                for grad, batched in zip(grads, scene.batched, strict=True)
            )
        )


class DirtyRenderer:
    """Draws a scene of which only some Gaussians move: only the pixels that those touch are drawn anew.

    ``still`` is prepared once. :attr:`colors` [H, W, 3] and :attr:`alphas` [H, W, 1] hold the newest frame; they are
    the same arrays all along. The result is that of :func:`render` for the still Gaussians followed by the moving
    ones.
    """

    def __init__(
        self,
        still: Gaussians,  # without a frame dimension
        viewmat: Floats,  # [4, 4]
        K: Floats,  # [3, 3]  # noqa: N803
        width: int,
        height: int,
        *,
        background: Floats | None = None,  # [3], black by default
        mode: Mode = "exact",
        isa: str | None = None,
    ) -> None:
        scene = _Scene(*still, viewmat, K, width, height, background)
        if scene.lead:
            raise ValueError("DirtyRenderer draws one view of one scene, but an argument has a frame dimension.")
        colors, alphas = scene.images()
        self._images = colors[0], alphas[0]
        self.colors: Floats = colors[0]
        self.alphas: Floats = alphas[0][..., None]
        self._core = _core.DirtyRenderer(scene.core, _is_fast(mode), _isa(isa))

    def draw(self, moving: Gaussians) -> int:
        """Bring :attr:`colors` and :attr:`alphas` up to date; returns how many bins of 32 x 32 pixels were drawn."""
        arrays, _, frames = _gaussians(*moving)
        if frames is not None:
            raise ValueError("`moving` has a frame dimension, but DirtyRenderer draws one frame at a time.")
        means, quats, scales, opacities, colors = (a[0] for a in arrays)
        return self._core.draw(means, quats, scales, opacities, colors, *self._images)


# ---------------------------------------------------------------------------------------------------- avatars


@dataclass(frozen=True, eq=False)
class Blendshapes:
    """Gaussians with linear motion bases: ``canonical + sum over k of weights[k] * basis_scales[:, k] * bases[:, k]``.

    The 14 attributes are means xyz, quats wxyz, log-scales, opacity logit, and colors rgb. The arrays are used where
    they lie: they may be read-only and memory-mapped, and must be contiguous.
    """

    canonical: Floats  # [14, N]
    bases: NDArray[np.int8]  # [14, K, N]
    basis_scales: Floats  # [14, K]
    _core: _core.Shapes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        canonical = _array("canonical", self.canonical, np.float32, (_core.ATTRIBUTES, "N"))
        bases = _array("bases", self.bases, np.int8, (_core.ATTRIBUTES, "K", canonical.shape[1]))
        basis_scales = _array("basis_scales", self.basis_scales, np.float32, (_core.ATTRIBUTES, bases.shape[1]))
        if bases.shape[1] > _core.MAX_BASES:
            raise ValueError(f"`bases` holds {bases.shape[1]} bases; at most {_core.MAX_BASES} are supported.")
        for name, array in (("canonical", canonical), ("bases", bases), ("basis_scales", basis_scales)):
            if not array.flags.c_contiguous:
                raise ValueError(f"`{name}` must be C-contiguous: it is used where it lies and never copied.")
        object.__setattr__(self, "_core", _core.Shapes(canonical, bases, basis_scales))

    @property
    def count(self) -> int:
        """N, the number of Gaussians."""
        return int(self.canonical.shape[1])

    @property
    def rank(self) -> int:
        """K, the number of bases and so of weights."""
        return int(self.bases.shape[1])


def blend(
    avatar: Blendshapes,
    weights: Floats,  # [K] or [F, K]
    *,
    isa: str | None = None,
    threads: int | None = None,
) -> Gaussians:
    """The Gaussians that weights make of an avatar, activated: ready for :func:`render`."""
    weights = _finite("weights", _floats("weights", weights, (avatar.rank,), ("F", avatar.rank)))
    lead, n = weights.shape[:-1], avatar.count
    frames = weights if lead else weights[None]
    arrays = [np.empty((len(frames), n, width), np.float32) for width in (3, 4, 3)]
    arrays += [np.empty((len(frames), n), np.float32), np.empty((len(frames), n, 3), np.float32)]
    means, quats, scales, opacities, colors = arrays
    _core.blend(avatar._core, frames, _isa(isa), _threads(threads), means, quats, scales, opacities, colors)
    return Gaussians(*(a if lead else a[0] for a in arrays))


@dataclass(frozen=True, eq=False)
class Job:
    """One frame for :func:`render_onto`: an avatar in a pose, seen by a camera, over a plate."""

    avatar: Blendshapes
    weights: Floats  # [K]
    viewmat: Floats  # [4, 4]
    K: Floats  # [3, 3]
    plate: Bytes  # [H, W, 3] uint8 RGB
    out: Bytes | None = None  # [H, W, 3] uint8, contiguous; may be the plate itself; a new array by default


def render_onto(
    jobs: Sequence[Job],
    *,
    mode: Mode = "fast",
    isa: str | None = None,
    threads: int | None = None,
) -> list[Bytes]:
    """Serve frames: blend, draw and composite each job; returns their images [H, W, 3] uint8, in order.

    ``out = 255 * colour + T * plate``, rounded to the nearest byte, where colour is premultiplied and T is the
    transmittance: the Gaussians lie over the plate. Where there are none the plate comes through unchanged. Jobs may
    mix avatars and sizes; all threads are kept busy until the last frame.
    """
    jobs = [_checked(job) for job in jobs]
    outs = [np.empty_like(job.plate) if job.out is None else job.out for job in jobs]
    core_jobs = [
        _core.Job(job.avatar._core, job.weights, job.viewmat, job.K, job.plate, out)
        for job, out in zip(jobs, outs, strict=True)
    ]
    _core.render_onto(core_jobs, _is_fast(mode), _isa(isa), _threads(threads))
    return outs


def _checked(job: Job) -> Job:
    """The job, if its arrays are as they should be; contiguous."""
    plate = _array("plate", job.plate, np.uint8, ("H", "W", 3))
    _check_size(plate.shape[1], plate.shape[0])
    if job.out is not None:
        out = _array("out", job.out, np.uint8, plate.shape)
        if not (out.flags.c_contiguous and out.flags.writeable):
            raise ValueError("`out` must be a C-contiguous, writeable array.")
    weights = _finite("weights", _floats("weights", job.weights, (job.avatar.rank,)))
    viewmat, K = _camera("viewmat", job.viewmat, (4, 4)), _intrinsics("K", job.K, (3, 3))  # noqa: N806
    return Job(job.avatar, weights, viewmat, K, np.ascontiguousarray(plate), job.out)


# ------------------------------------------------------------------------------------------------- similarity


def ssim(
    a: Floats,  # [H, W, C] or [F, H, W, C]
    b: Floats,  # the same
    data_range: float = 1.0,
    *,
    isa: str | None = None,
    threads: int | None = None,
) -> float:
    """Mean structural similarity (Wang, Bovik, Sheikh and Simoncelli 2004) of two images, or of two batches.

    Gaussian windows of 11 x 11 pixels with a sigma of 1.5, wherever one fits into the image; a channel at a time;
    K1 = 0.01, K2 = 0.03; ``data_range`` is the distance between the least and the largest possible value.
    """
    return _ssim(a, b, data_range, isa, threads, with_gradient=False)[0]


def ssim_with_gradient(
    a: Floats,
    b: Floats,
    data_range: float = 1.0,
    *,
    isa: str | None = None,
    threads: int | None = None,
) -> tuple[float, Floats]:
    """:func:`ssim`, and its gradient with respect to ``a`` (of the shape of ``a``)."""
    return _ssim(a, b, data_range, isa, threads, with_gradient=True)


def _ssim(
    a: Floats, b: Floats, data_range: float, isa: str | None, threads: int | None, *, with_gradient: bool
) -> tuple[float, Floats]:
    a = _floats("a", a, ("H", "W", "C"), ("F", "H", "W", "C"))
    b = _floats("b", b, a.shape)
    side = _core.SSIM_WINDOW
    if min(a.shape[-3:-1]) < side or a.size == 0:
        raise ValueError(
            f"`a` has the shape {list(a.shape)}; SSIM needs at least a frame and a channel of {side} x {side} pixels."
        )
    if not data_range > 0:
        raise ValueError(f"`data_range` must be positive, not {data_range}.")
    images = a.reshape(-1, *a.shape[-3:]), b.reshape(-1, *a.shape[-3:])
    grad = np.empty(images[0].shape if with_gradient else (0, 0, 0, 0), np.float32)
    means = _core.ssim(*images, float(data_range), _isa(isa), _threads(threads), with_gradient, grad)
    if with_gradient:
        grad = grad.reshape(a.shape)
        if len(means) > 1:
            grad /= len(means)
    return float(np.mean(means)), grad


# ------------------------------------------------------------------------------------------- checking arguments


class _Scene:
    """The arguments of a render, checked, contiguous, and each with a frame dimension of 1 or F."""

    def __init__(
        self,
        means: Floats,
        quats: Floats,
        scales: Floats,
        opacities: Floats,
        colors: Floats,
        viewmats: Floats,
        Ks: Floats,  # noqa: N803
        width: int,
        height: int,
        backgrounds: Floats | None,
    ) -> None:
        self.width, self.height = _check_size(width, height)
        arrays, self.batched, frames = _gaussians(means, quats, scales, opacities, colors)
        self.gaussians = Gaussians(*arrays)
        cameras = [
            _camera("viewmats", viewmats, (4, 4), ("F", 4, 4)),
            _intrinsics("Ks", Ks, (3, 3), ("F", 3, 3)),
            _camera("backgrounds", np.zeros(3, np.float32) if backgrounds is None else backgrounds, (3,), ("F", 3)),
        ]
        for name, camera, dims in zip(("viewmats", "Ks", "backgrounds"), cameras, (2, 2, 1), strict=True):
            if camera.ndim > dims:
                frames = _agree(name, len(camera), frames)
        views, intrinsics, behind = (
            c if c.ndim > dims else c[None] for c, dims in zip(cameras, (2, 2, 1), strict=True)
        )
        self.cameras = views, intrinsics, behind
        self.count = 1 if frames is None else frames
        self.lead = () if frames is None else (frames,)
        self.core = _core.Scene(*self.gaussians, *self.cameras, self.width, self.height)

    def images(self) -> tuple[Floats, Floats]:
        size = (self.count, self.height, self.width)
        return np.empty((*size, 3), np.float32), np.empty(size, np.float32)

    def frames(self, images: Floats) -> Floats:
        return images if self.lead else cast(Floats, images[0])


def _gaussians(
    means: Floats, quats: Floats, scales: Floats, opacities: Floats, colors: Floats
) -> tuple[list[Floats], list[bool], int | None]:
    """The five arrays as [1 or F, N, ...], which of them have a frame dimension, and F where any has."""
    means = _floats("means", means, ("N", 3), ("F", "N", 3))
    n, frames = means.shape[-2], None
    arrays, batched = [], []
    for name, array, tail in (
        ("means", means, (n, 3)),
        ("quats", quats, (n, 4)),
        ("scales", scales, (n, 3)),
        ("opacities", opacities, (n,)),
        ("colors", colors, (n, 3)),
    ):
        array = _floats(name, array, tail, ("F", *tail))
        batched.append(array.ndim > len(tail))
        if batched[-1]:
            frames = _agree(name, len(array), frames)
        arrays.append(array if batched[-1] else array[None])
    return arrays, batched, frames


def _agree(name: str, here: int, frames: int | None) -> int:
    if frames is not None and frames != here:
        raise ValueError(f"`{name}` has {here} frames, but an argument before it has {frames}.")
    return here


def _array(name: str, value: object, dtype: type[_Scalar], *shapes: tuple[int | str, ...]) -> NDArray[_Scalar]:
    """`value`, if it is an array of this dtype and of one of these shapes, in which a string stands for any size."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"`{name}` must be a NumPy array, not {type(value).__name__}.")
    if value.dtype != dtype:
        raise TypeError(f"`{name}` must have the dtype {np.dtype(dtype)}, not {value.dtype}.")
    for shape in shapes:
        if len(shape) == value.ndim and all(
            isinstance(want, str) or want == got for want, got in zip(shape, value.shape, strict=True)
        ):
            return value
    wanted = " or ".join("[" + ", ".join(map(str, shape)) + "]" for shape in shapes)
    raise ValueError(f"`{name}` must have the shape {wanted}, not {list(value.shape)}.")


def _floats(name: str, value: object, *shapes: tuple[int | str, ...]) -> Floats:
    return np.ascontiguousarray(_array(name, value, np.float32, *shapes))


def _finite(name: str, array: Floats) -> Floats:
    if not np.isfinite(array).all():
        raise ValueError(f"`{name}` must be finite, but holds NaN or infinity.")
    return array


def _camera(name: str, value: object, *shapes: tuple[int | str, ...]) -> Floats:
    return _finite(name, _floats(name, value, *shapes))


def _intrinsics(name: str, value: object, *shapes: tuple[int | str, ...]) -> Floats:
    array = _camera(name, value, *shapes)
    if not (array[..., (0, 1), (0, 1)] > 0).all():
        raise ValueError(f"`{name}` must have positive focal lengths on its diagonal.")
    return array


def _check_size(width: int, height: int) -> tuple[int, int]:
    for name, size in (("width", width), ("height", height)):
        if not isinstance(size, int | np.integer) or isinstance(size, bool):
            raise TypeError(f"`{name}` must be an integer, not {type(size).__name__}.")
        if not 1 <= size <= MAX_SIZE:
            raise ValueError(f"`{name}` must lie between 1 and {MAX_SIZE} pixels, not {size}.")
    return int(width), int(height)


def _is_fast(mode: str) -> bool:
    if mode not in ("exact", "fast"):
        raise ValueError(f"`mode` must be 'exact' or 'fast', not {mode!r}.")
    return mode == "fast"


_ISAS = isas()


def _isa(isa: str | None) -> str:
    if isa is None:
        return _ISAS[0]
    if isa not in _ISAS:
        raise ValueError(f"`isa` must be one of {', '.join(_ISAS)} on this machine, not {isa!r}.")
    return isa


def _threads(threads: int | None) -> int:
    if threads is None:
        return _core.usable_cores()
    if threads < 1:
        raise ValueError(f"`threads` must be at least 1, not {threads}.")
    return threads
