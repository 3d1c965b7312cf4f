from collections.abc import Callable

import numpy as np
import pytest

from talksplat import splat
from talksplat.bench._head import head
from talksplat.splat import Gaussians


@pytest.fixture(params=splat.isas())
def isa(request: pytest.FixtureRequest) -> str:
    """Every instruction set that this processor can run."""
    name: str = request.param
    return name


def _dots(g: Gaussians, rng: np.random.Generator) -> None:
    g.scales[:] = 1e-4  # far below a pixel: only the low-pass filter gives them a size


def _needles(g: Gaussians, rng: np.random.Generator) -> None:
    g.scales[:] = [0.15, 2e-4, 2e-4]


def _huge(g: Gaussians, rng: np.random.Generator) -> None:
    g.scales[:] = 0.8
    g.opacities[:] *= 0.2


def _opaque(g: Gaussians, rng: np.random.Generator) -> None:
    g.opacities[:] = 1.0


def _faint(g: Gaussians, rng: np.random.Generator) -> None:
    g.opacities[:] = rng.uniform(0.5 / 255, 3 / 255, len(g.opacities))


def _around(g: Gaussians, rng: np.random.Generator) -> None:
    g.means[:] *= 6  # beside, behind and touching the camera


def _long_quaternions(g: Gaussians, rng: np.random.Generator) -> None:
    g.quats[:] *= rng.uniform(0.01, 100, (len(g.quats), 1))


def _broken(g: Gaussians, rng: np.random.Generator) -> None:
    for array in g:
        array[rng.integers(0, len(array), 5)] = np.nan
        array[rng.integers(0, len(array), 5)] = np.inf
    g.quats[rng.integers(0, len(g.quats), 5)] = 0
    g.opacities[rng.integers(0, len(g.quats), 5)] = -0.5


STRESS: dict[str, Callable[[Gaussians, np.random.Generator], None]] = {
    "dots": _dots,
    "needles": _needles,
    "huge": _huge,
    "opaque": _opaque,
    "faint": _faint,
    "around": _around,
    "long quaternions": _long_quaternions,
    "broken": _broken,
}


@pytest.fixture(params=STRESS)
def stress_scene(request: pytest.FixtureRequest) -> Gaussians:
    """Scenes that break careless rasterizers."""
    gaussians = head(400, seed=1)
    STRESS[request.param](gaussians, np.random.default_rng(2))
    return gaussians
