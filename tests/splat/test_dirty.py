"""Drawing only what moves."""

import numpy as np
import pytest

from talksplat import splat
from talksplat.bench._head import BACKGROUND, camera, head, mouth, speak, take
from talksplat.splat import Gaussians


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_dirty_frames_equal_full_frames(isa: str, mode: splat.Mode) -> None:
    g, (view, K) = head(2000), camera(150, 130)  # noqa: N806
    moves = mouth(g)
    still, moving = take(g, ~moves), take(g, moves)
    renderer = splat.DirtyRenderer(still, view, K, 150, 130, background=BACKGROUND, mode=mode, isa=isa)
    drawn = []
    for t in range(6):
        now = speak(moving, t)
        drawn.append(renderer.draw(now))
        everything = Gaussians(*(np.concatenate(pair) for pair in zip(still, now, strict=True)))
        colors, alphas = splat.render(*everything, view, K, 150, 130, backgrounds=BACKGROUND, mode=mode, isa=isa)
        np.testing.assert_array_equal(renderer.colors, colors)
        np.testing.assert_array_equal(renderer.alphas, alphas)
    assert drawn[0] == 5 * 5
    assert 0 < max(drawn[1:]) < drawn[0] / 2


def test_a_gaussian_that_leaves_is_wiped_off() -> None:
    g, (view, K) = head(500), camera(96, 96)  # noqa: N806
    moves = mouth(g)
    still, moving = take(g, ~moves), take(g, moves)
    renderer = splat.DirtyRenderer(still, view, K, 96, 96)
    renderer.draw(moving)
    nothing = Gaussians(*(a[:0] for a in moving))
    assert renderer.draw(nothing) > 0
    np.testing.assert_array_equal(renderer.colors, splat.render(*still, view, K, 96, 96)[0])
    assert renderer.draw(nothing) == 0


def test_batches_are_refused() -> None:
    g, (view, K) = head(20), camera(32, 32)  # noqa: N806
    with pytest.raises(ValueError, match="a frame dimension"):
        splat.DirtyRenderer(g, view[None], K, 32, 32)
    renderer = splat.DirtyRenderer(g, view, K, 32, 32)
    with pytest.raises(ValueError, match="`moving` has a frame dimension"):
        renderer.draw(Gaussians(*(a[None] for a in g)))
