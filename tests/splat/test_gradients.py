"""Gradients against float64 autograd through an implementation of its own."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from talksplat import splat
from talksplat.bench._head import BACKGROUND, camera, head
from talksplat.splat import Gaussians, reference


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    torch.set_num_threads(1)


def torch_render(leaves: list[Tensor], view: Any, K: Any, width: int, height: int) -> tuple[Tensor, Tensor]:  # noqa: N803
    """gsplat's rule with all Gaussians at once; (colors [H, W, 3] over BACKGROUND, alphas [H, W, 1])."""
    means, quats, scales, opacities, colors = leaves
    view, K = torch.tensor(view, dtype=torch.float64), torch.tensor(K, dtype=torch.float64)  # noqa: N806
    focal, principal, size = K[[0, 1], [0, 1]], K[:2, 2], torch.tensor([width, height])
    at = means @ view[:3, :3].T + view[:3, 3]
    depth = at[:, 2:]
    w, x, y, z = torch.nn.functional.normalize(quats, dim=1).T
    rotation = torch.stack(
        [
            1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
            2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
            2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
        ], dim=1,
    ).reshape(-1, 3, 3)  # fmt: skip
    low, high = (-principal - 0.15 * size) / focal, (size - principal + 0.15 * size) / focal
    ratio = torch.minimum(torch.maximum(at[:, :2] / depth, low), high)
    jacobian = torch.cat([torch.diag_embed(focal / depth), (-focal * ratio / depth)[:, :, None]], dim=2)
    axes = jacobian @ view[:3, :3] @ rotation * scales[:, None, :]
    conic = torch.linalg.inv(axes @ axes.mT + 0.3 * torch.eye(2))
    centre = focal * at[:, :2] / depth + principal
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    offset = torch.stack([columns, rows], dim=-1).to(torch.float64) - centre[:, None, None, :]  # [N, H, W, 2]
    power = -0.5 * torch.einsum("nhwi,nij,nhwj->nhw", offset, conic, offset)
    alpha = torch.clamp(opacities[:, None, None] * torch.exp(power), max=0.999)
    visible = (alpha >= 1 / 255) & (depth >= 0.01)[:, :, None]

    image, through = torch.zeros(height, width, 3, dtype=torch.float64), torch.ones(height, width).double()
    stopped = torch.zeros(height, width, dtype=torch.bool)
    for n in torch.argsort(depth[:, 0], stable=True):
        stopped = stopped | (visible[n] & (through * (1 - alpha[n]) <= 1e-4))
        weight = torch.where(visible[n] & ~stopped, alpha[n] * through, 0.0)
        image = image + weight[..., None] * colors[n]
        through = through - weight
    return image + through[..., None] * torch.tensor(BACKGROUND).double(), 1 - through[..., None]


def _stretched() -> Gaussians:
    g = head(200, seed=3)
    g.quats[:] *= np.linspace(0.2, 5, 200, dtype=np.float32)[:, None]
    # The outer ones lie so far beyond the image that the Jacobian doesn't follow them any more.
    g.means[:30, 0], g.means[:30, 1], g.scales[:30] = np.linspace(-1.9, 1.9, 30), 0, 0.5
    return g


def _opaque() -> Gaussians:
    g = head(200, seed=4)
    g.opacities[:] = 1
    return g


SCENES = {"head": lambda: head(300), "stretched": _stretched, "opaque": _opaque}


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("of", ["colors", "alphas", "both"])
def test_gradients_agree_with_autograd(scene: str, of: str) -> None:
    g = SCENES[scene]()
    width, height = 44, 36
    view, intrinsics = camera(width, height)
    rng = np.random.default_rng(5)
    grad_colors = rng.normal(size=(height, width, 3)).astype(np.float32) * (of != "alphas")
    grad_alphas = rng.normal(size=(height, width, 1)).astype(np.float32) * (of != "colors")

    leaves = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in g]
    image, alphas = torch_render(leaves, view, intrinsics, width, height)
    want_image, want_alphas = reference.render(g, view, intrinsics, width, height, BACKGROUND)
    np.testing.assert_allclose(image.detach().numpy(), want_image, atol=1e-9)  # the two oracles agree
    np.testing.assert_allclose(alphas.detach().numpy(), want_alphas, atol=1e-9)
    ((image * torch.tensor(grad_colors)).sum() + (alphas * torch.tensor(grad_alphas)).sum()).backward()  # type: ignore[no-untyped-call]

    for isa in splat.isas():
        _, _, tape = splat.render_with_tape(*g, view, intrinsics, width, height, backgrounds=BACKGROUND, isa=isa)
        gradients = tape.backward(grad_colors, grad_alphas)
        for name, got, leaf in zip(Gaussians._fields, gradients, leaves, strict=True):
            assert leaf.grad is not None
            want = leaf.grad.numpy()
            error = np.linalg.norm(got - want) / max(float(np.linalg.norm(want)), 1e-9)
            assert error < 2e-4, (isa, name, error)


def test_the_tape_draws_what_render_draws(isa: str) -> None:
    g, (view, intrinsics) = head(300), camera(50, 70)
    colors, alphas, _ = splat.render_with_tape(*g, view, intrinsics, 50, 70, backgrounds=BACKGROUND, isa=isa)
    want = splat.render(*g, view, intrinsics, 50, 70, backgrounds=BACKGROUND, isa=isa)
    np.testing.assert_array_equal(colors, want[0])
    np.testing.assert_array_equal(alphas, want[1])


def test_gradients_of_shared_gaussians_are_summed_over_the_frames(isa: str) -> None:
    g, (view, intrinsics) = head(200), camera(40, 40)
    rng = np.random.default_rng(6)
    frames = 3
    means = g.means + rng.normal(0, 0.02, (frames, *g.means.shape)).astype(np.float32)
    grad_colors = rng.normal(size=(frames, 40, 40, 3)).astype(np.float32)
    grad_alphas = rng.normal(size=(frames, 40, 40, 1)).astype(np.float32)
    _, _, tape = splat.render_with_tape(means, *g[1:], view, intrinsics, 40, 40, isa=isa, threads=2)
    batch = tape.backward(grad_colors, grad_alphas)
    assert [a.shape for a in batch] == [means.shape, *(a.shape for a in g[1:])]
    singles = []
    for f in range(frames):
        _, _, tape = splat.render_with_tape(means[f], *g[1:], view, intrinsics, 40, 40, isa=isa)
        singles.append(tape.backward(grad_colors[f], grad_alphas[f]))
    np.testing.assert_array_equal(batch.means, np.stack([s.means for s in singles]))
    np.testing.assert_allclose(batch.colors, sum(s.colors for s in singles), rtol=1e-5, atol=1e-6)


def test_gaussians_that_are_not_drawn_have_no_gradient(isa: str) -> None:
    g, (view, intrinsics) = head(200), camera(40, 40)
    hidden = {
        0: ("means", np.nan),
        1: ("scales", np.inf),
        2: ("opacities", 0.0),
        3: ("colors", np.nan),
        4: ("quats", 0.0),
    }
    for i, (name, value) in hidden.items():
        getattr(g, name)[i] = value
    g.means[5] = [0, 0, -50]  # behind the camera
    _, _, tape = splat.render_with_tape(*g, view, intrinsics, 40, 40, isa=isa)
    gradients = tape.backward(np.ones((40, 40, 3), np.float32), np.ones((40, 40, 1), np.float32))
    for gradient in gradients:
        assert (gradient[:6] == 0).all()
        assert np.isfinite(gradient).all()
        assert gradient.any()


def test_no_gaussians_have_no_gradients() -> None:
    nothing = Gaussians(*(a[:0] for a in head(10)))
    view, intrinsics = camera(16, 16)
    _, _, tape = splat.render_with_tape(*nothing, view, intrinsics, 16, 16)
    assert tape.backward(np.ones((16, 16, 3), np.float32)).means.shape == (0, 3)


def test_gradients_of_a_wrong_shape_are_refused() -> None:
    view, intrinsics = camera(16, 16)
    _, _, tape = splat.render_with_tape(*head(10), view, intrinsics, 16, 16)
    with pytest.raises(ValueError, match=r"`grad_colors` must have the shape \[16, 16, 3\], not \[16, 3\]"):
        tape.backward(np.ones((16, 3), np.float32))
    with pytest.raises(TypeError, match="`grad_alphas` must have the dtype float32"):
        tape.backward(np.ones((16, 16, 3), np.float32), np.ones((16, 16, 1)))  # type: ignore[arg-type]
