"""The twin on a GPU: all of it but gsplat's kernels runs here, on torch's CPU device."""

import gc
import itertools
import os
import shutil
import subprocess
import sysconfig
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import simplejpeg
import torch
from heads import avatar, job
from make_avatar import make_huma1_avatar, make_staring_avatar, write_avatar
from torch import Tensor

from talksplat import avatar as bundle
from talksplat import splat
from talksplat.animator import Animator, Chunk, Options
from talksplat.bench._head import camera, head
from talksplat.drawing import MOST_FRAMES, GatheringDrawer, UInt8
from talksplat.splat import Job, cuda, reference
from talksplat.splat.cuda import DeviceError, Rasterize, Renderer

IMPL: Any = pytest.importorskip("gsplat.cuda._torch_impl", reason="the extra gpu is not installed")


def by_gsplats_reference(
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, colors: Tensor, viewmats: Tensor,
    Ks: Tensor, width: int, height: int, backgrounds: Tensor | None = None,  # noqa: N803
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Stands in for gsplat's kernels: its own PyTorch reference of the projection, and its rule of compositing.

    The reference of compositing that gsplat has wants its kernels for the intersections; here all pixels meet all
    Gaussians.
    """
    covars, _ = IMPL._quat_scale_to_covar_preci(quats, scales, True, False)
    radii, *projected, _ = IMPL._fully_fused_projection(
        means, covars, viewmats[:, None], Ks[:, None], width, height, eps2d=cuda.LOW_PASS, near_plane=cuda.NEAR
    )
    centres, depths, conics = (each[:, 0] for each in projected)
    order = depths.argsort(dim=1, stable=True)

    def sorted_(each: Tensor) -> Tensor:
        index = order.reshape(*order.shape, *[1] * (each.ndim - 2))
        return each.gather(1, index.expand_as(each))

    centres, conics, opacities, colors = map(sorted_, (centres, conics, opacities, colors))
    visible = sorted_(radii[:, 0].all(-1).float())
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    dx, dy = x.flatten() - centres[..., :1], y.flatten() - centres[..., 1:]  # [F, N, P]
    a, b, c = (conics[..., index : index + 1] for index in range(3))
    alphas = (opacities * visible)[..., None] * torch.exp(-0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy)
    alphas = torch.where(alphas < 1 / 255, 0, alphas.clamp_max(0.999))
    after = torch.cumprod(1 - alphas, dim=1)
    before = torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], dim=1)
    weights = torch.where(after > 1e-4, alphas * before, 0)
    drawn = torch.einsum("fnp,fnc->fpc", weights, colors).reshape(-1, height, width, 3)
    covered = weights.sum(1).reshape(-1, height, width, 1)
    if backgrounds is not None:
        drawn = drawn + (1 - covered) * backgrounds[:, None, None]
    return drawn, covered


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def renderer(request: pytest.FixtureRequest) -> Renderer:
    """With gsplat's kernels on a GPU, with what stands in for them on the CPU."""
    return Renderer("cuda") if request.param == "cuda" else Renderer("cpu", by_gsplats_reference)


@pytest.fixture
def shared_gaussians_views() -> tuple[splat.Gaussians, Any, Any]:
    g, (view, K) = head(120), camera(48, 40)  # noqa: N806
    views = np.repeat(view[None], 3, axis=0)
    views[:, 0, 3] += 0.02 * np.arange(3, dtype=np.float32)
    return g, views, K


def test_it_draws_what_the_core_draws(
    renderer: Renderer, shared_gaussians_views: tuple[splat.Gaussians, Any, Any]
) -> None:
    g, views, K = shared_gaussians_views  # noqa: N806
    behind = np.array([0.2, 0.4, 0.6], np.float32)
    for view, lead in ((views, (3,)), (views[0], ())):
        got = renderer.render(*g, view, K, 48, 40, backgrounds=behind)
        want = splat.render(*g, view, K, 48, 40, backgrounds=behind)
        assert got[0].shape == (*lead, 40, 48, 3)
        assert got[1].shape == (*lead, 40, 48, 1)
        for one, other in zip(got, want, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-3)  # a Gaussian on the edge of 1/255 is or is not drawn
            assert np.abs(one - other).mean() < 2e-5


def test_it_agrees_with_the_oracle_on_whatever_gaussians(renderer: Renderer, stress_scene: splat.Gaussians) -> None:
    view, K = camera(40, 32)  # noqa: N806
    got, _ = renderer.render(*stress_scene, view, K, 40, 32)
    want, _ = reference.render(stress_scene, view, K, 40, 32)
    assert np.isfinite(got).all()
    assert reference.psnr(got, want) > 40


def test_bad_arguments_are_refused_as_the_core_refuses_them(renderer: Renderer) -> None:
    g, (view, K) = head(10), camera(32, 32)  # noqa: N806
    with pytest.raises(ValueError, match="`width`"):
        renderer.render(*g, view, K, 0, 32)
    with pytest.raises(TypeError, match="`means`"):
        renderer.render(g.means.astype(np.float64), *g[1:], view, K, 32, 32)
    with pytest.raises(ValueError, match="`weights` must be finite"):
        renderer.render_onto([job(avatar(40), weights=np.full(5, np.nan, np.float32))])


def test_avatars_and_sizes_mix_in_a_batch(renderer: Renderer) -> None:
    heads = [avatar(count, rank, seed) for count, rank, seed in ((90, 5, 0), (33, 2, 1), (120, 0, 2))]
    jobs = [job(heads[i % 3], seed=i, height=40 + 8 * (i % 2), width=48) for i in range(6)]
    for got, want in zip(renderer.render_onto(jobs), splat.render_onto(jobs, mode="exact"), strict=True):
        image = got.cpu().numpy()
        assert image.dtype == np.uint8
        assert np.abs(image.astype(int) - want).max() <= 2
        assert np.mean(image != want) < 0.01


def test_no_jobs_are_no_images(renderer: Renderer) -> None:
    assert renderer.render_onto([]) == []


def test_a_size_is_one_call_whatever_the_avatars() -> None:
    asked: list[tuple[int, ...]] = []

    def counting(means: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        asked.append(tuple(means.shape))
        return by_gsplats_reference(means, *rest, **options)

    jobs = [job(avatar(count), height=height, width=32) for count in (20, 50) for height in (24, 32)]
    Renderer("cpu", cast(Rasterize, counting)).render_onto(jobs)
    assert asked == [(2, 50, 3), (2, 50, 3)]


def test_avatars_and_plates_stay_on_the_device_as_long_as_they_live() -> None:
    renderer, head_ = Renderer("cpu", by_gsplats_reference), avatar(30)
    first = job(head_, height=24, width=24)
    for _ in range(3):
        renderer.render_onto([first, job(head_, plate=first.plate, height=24, width=24)])
    assert len(renderer._kept) == 2
    renderer.render_onto([job(avatar(30, rank=0), plate=first.plate, height=24, width=24)])
    assert len(renderer._kept) == 2  # shapes of one frame don't come again
    del first, head_
    gc.collect()
    assert not renderer._kept


def test_a_gpu_that_is_not_there_is_one_clear_sentence() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(DeviceError, match="finds no CUDA GPU"):
        Renderer("cuda")


# --- what is wanted meanwhile is drawn together --------------------------------------------------------------------


class Device:
    """Stands in for a renderer: notes its batches, and holds the first until it is told."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.free = threading.Event()
        self.begun = threading.Event()

    def pictures(self, jobs: Sequence[Job], qualities: Sequence[int | None]) -> list[bytes | UInt8]:
        self.batches.append(len(jobs))
        self.begun.set()
        assert self.free.wait(10)
        if any(not each.plate.any() for each in jobs):
            raise ValueError("a black plate")
        return [b"jpeg" if quality else each.plate for each, quality in zip(jobs, qualities, strict=True)]


@pytest.fixture
def device() -> Iterator[tuple[Device, GatheringDrawer]]:
    device = Device()
    drawer = GatheringDrawer(device.pictures)
    yield device, drawer
    device.free.set()
    drawer.close()


def _ask(drawer: GatheringDrawer, jobs: Sequence[Job], quality: int | None = 80) -> tuple[list[threading.Thread], Any]:
    answers: dict[int, Any] = {}

    def ask(number: int, each: Job) -> None:
        try:
            answers[number] = drawer.picture(each, quality)
        except Exception as error:
            answers[number] = error

    threads = [threading.Thread(target=ask, args=pair) for pair in enumerate(jobs)]
    for thread in threads:
        thread.start()
    return threads, answers


def test_frames_gather_while_the_device_is_busy(device: tuple[Device, GatheringDrawer]) -> None:
    held, drawer = device
    first, _ = _ask(drawer, [job(avatar(5))])
    assert held.begun.wait(10)
    others, answers = _ask(drawer, [job(avatar(5), seed=seed) for seed in range(MOST_FRAMES + 3)])
    while drawer._wanted.qsize() < MOST_FRAMES + 3:
        threading.Event().wait(0.001)
    held.free.set()
    for thread in (*first, *others):
        thread.join(10)
    assert held.batches == [1, MOST_FRAMES, 3]
    assert set(answers.values()) == {b"jpeg"}


def test_a_frame_that_fails_fails_alone(device: tuple[Device, GatheringDrawer]) -> None:
    held, drawer = device
    first, _ = _ask(drawer, [job(avatar(5))])
    assert held.begun.wait(10)
    plates = [np.full((16, 16, 3), value, np.uint8) for value in (9, 0, 7)]
    others, answers = _ask(drawer, [job(avatar(5), plate=plate) for plate in plates], quality=None)
    while drawer._wanted.qsize() < 3:
        threading.Event().wait(0.001)
    held.free.set()
    for thread in (*first, *others):
        thread.join(10)
    assert answers[0] == plates[0].tobytes()
    assert isinstance(answers[1], ValueError)
    assert answers[2] == plates[2].tobytes()


# --- the whole way --------------------------------------------------------------------------------------------------


def test_an_animator_on_a_device_shows_what_one_on_the_cpu_shows(renderer: Renderer, tmp_path: Path) -> None:
    write_avatar(tmp_path, "ann")
    bundle.write(make_huma1_avatar("hal"), tmp_path)
    bundle.write(make_staring_avatar("eve"), tmp_path)
    rng, chunks = np.random.default_rng(0), []
    for number, options in enumerate((Options(), Options(size=48), Options(format="raw"))):
        coefficients = rng.normal(0, 1, (4, 20)).astype(np.float32)
        chunks.append(Chunk("ann", coefficients, np.ones(4, np.float32), 7 * number, options))
        chunks.append(Chunk("hal", None, None, number, options))
    chunks += [Chunk("nobody", None, None, 0), Chunk("eve", None, None, 80, Options(size=32, listening=50))]
    device, core = Animator(tmp_path, drawer=GatheringDrawer(renderer.pictures)), Animator(tmp_path, threads=1)
    for chunk, got, want in zip(chunks, device.render(chunks), core.render(chunks), strict=True):
        if chunk.avatar == "nobody":
            assert type(got) is type(want) and isinstance(got, Exception)  # noqa: PT018
            continue
        assert isinstance(got, list) and isinstance(want, list)  # noqa: PT018
        for one, other in zip(map(_pixels, got), map(_pixels, want), strict=True):
            assert reference.psnr(one / 255, other / 255) > 38
    device.close()
    core.close()


def _pixels(picture: bytes) -> UInt8:
    if picture.startswith(b"\xff\xd8"):
        return np.asarray(simplejpeg.decode_jpeg(picture, "RGB"))
    side = int((len(picture) / 3) ** 0.5)
    return np.frombuffer(picture, np.uint8).reshape(side, side, 3)


@pytest.mark.gpu
def test_jpegs_are_made_on_the_device_where_it_has_an_encoder() -> None:
    pytest.importorskip("nvidia.nvimgcodec")
    renderer, asked = Renderer("cuda"), [job(avatar(), height=64, width=64, seed=seed) for seed in range(3)]
    pictures = renderer.pictures(asked, [90, None, 50])
    assert isinstance(pictures[0], bytes) and isinstance(pictures[2], bytes)  # noqa: PT018
    assert len(pictures[2]) < len(pictures[0])
    image = simplejpeg.decode_jpeg(pictures[0], "RGB")
    want = renderer.render_onto(asked)[0].cpu().numpy()
    assert reference.psnr(image / 255, want / 255) > 20  # the plate is noise


@pytest.mark.skipif("TALKSPLAT_NVCC" not in os.environ, reason="compiles for minutes: set TALKSPLAT_NVCC=sm_86 or so")
@pytest.mark.timeout(900)
def test_gsplats_kernels_compile(tmp_path: Path) -> None:
    """Those that a frame needs; torch's CPU build lacks one generated header, which says nothing on Linux."""
    nvcc = shutil.which("nvcc")
    assert nvcc is not None, "there is no nvcc"
    macros = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    macros.parent.mkdir(parents=True)
    macros.write_text("#pragma once\n")
    sources, torch_ = Path(IMPL.__file__).parent, Path(torch.__file__).parent / "include"
    csrc = sources / "csrc"
    included = [tmp_path, sources / "include", csrc, csrc / "third_party" / "glm", torch_]
    included += [torch_ / "torch" / "csrc" / "api" / "include", Path(sysconfig.get_path("include"))]
    flags = itertools.chain.from_iterable(("-I", str(folder)) for folder in included)
    options = ["-std=c++20", f"-arch={os.environ['TALKSPLAT_NVCC']}", "--expt-relaxed-constexpr", *flags]
    for name in ("ProjectionEWA3DGSFused", "IntersectTile", "RasterizeToPixels3DGSFwd"):
        command = [nvcc, *options, "-c", str(csrc / f"{name}.cu"), "-o", str(tmp_path / f"{name}.o")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
