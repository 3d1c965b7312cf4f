"""The compiled half of :mod:`talksplat.splat`, which checks every argument before it comes here.

Arrays are C-contiguous. F frames, N Gaussians; a leading dimension of 1 is shared by all frames.
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]

MAX_SIZE: int  # pixels, of an image's height and width
ATTRIBUTES: int  # means xyz, quats wxyz, log-scales, opacity logit, colors rgb
MAX_BASES: int
SSIM_WINDOW: int  # pixels

def isas() -> list[str]: ...
def usable_cores() -> int: ...

class Scene:
    def __init__(
        self,
        means: Floats,
        quats: Floats,
        scales: Floats,
        opacities: Floats,
        colors: Floats,
        viewmats: Floats,
        Ks: Floats,  # noqa: N803
        backgrounds: Floats,
        width: int,
        height: int,
        /,
    ) -> None: ...

def render(scene: Scene, fast: bool, isa: str, threads: int, colors: Floats, alphas: Floats, /) -> None: ...

class Tape:
    def __init__(self, scene: Scene, isa: str, threads: int, colors: Floats, alphas: Floats, /) -> None: ...
    def backward(
        self,
        grad_colors: Floats,
        grad_alphas: Floats,
        means: Floats,
        quats: Floats,
        scales: Floats,
        opacities: Floats,
        colors: Floats,
        /,
    ) -> None: ...

class DirtyRenderer:
    def __init__(self, still: Scene, fast: bool, isa: str, /) -> None: ...
    def draw(
        self,
        means: Floats,
        quats: Floats,
        scales: Floats,
        opacities: Floats,
        colors: Floats,
        out_colors: Floats,
        out_alphas: Floats,
        /,
    ) -> int: ...

class Shapes:
    def __init__(self, canonical: Floats, bases: NDArray[np.int8], basis_scales: Floats, /) -> None: ...

def blend(
    shapes: Shapes,
    weights: Floats,
    isa: str,
    threads: int,
    means: Floats,
    quats: Floats,
    scales: Floats,
    opacities: Floats,
    colors: Floats,
    /,
) -> None: ...

class Job:
    def __init__(
        self,
        shapes: Shapes,
        weights: Floats,
        viewmat: Floats,
        K: Floats,  # noqa: N803
        plate: NDArray[np.uint8],
        out: NDArray[np.uint8],
        /,
    ) -> None: ...

def render_onto(jobs: list[Job], fast: bool, isa: str, threads: int, /) -> None: ...
def ssim(
    a: Floats, b: Floats, data_range: float, isa: str, threads: int, with_gradient: bool, grad: Floats, /
) -> list[float]: ...
