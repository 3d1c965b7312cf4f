"""The profile huma1: its tables, its frames, and `animate_huma1` through the real server."""

import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import soundfile
import torch
import torch.nn.functional as F
import tritonclient.grpc as triton
from hypothesis import given
from hypothesis import strategies as st
from make_avatar import make_avatar, make_huma1_avatar, write_avatar
from tritonclient.utils import InferenceServerException

from talksplat import avatar as bundle
from talksplat import clock, framing, splat, triplanes
from talksplat import server as server_module
from talksplat.animator import Animator, Chunk, Options
from talksplat.attention import blink, plate_index
from talksplat.framing import RequestError
from talksplat.server import ROOT, Ports, Server
from talksplat_client import Client

VIOLET, GREY, RED = "violet", "grey", "red"
RAW = Options(format="raw")


# --- tables ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.floats(0.5, 3))
def test_a_baked_table_is_what_torch_samples(seed: int, side: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    planes = rng.normal(size=(3, 2, side, side)).astype(np.float32)
    places = rng.uniform(-spread, spread, (20, 3)).astype(np.float32)
    expected = torch.ones(2, 20)
    for plane, axes in zip(planes, ((1, 2), (0, 2), (0, 1)), strict=True):
        grid = torch.from_numpy(places[None, None][..., list(axes)].copy())
        found = F.grid_sample(torch.from_numpy(plane[None]), grid, padding_mode="border", align_corners=True)
        expected = expected * found[0, :, 0]
    np.testing.assert_allclose(triplanes.sample(planes, places), expected.numpy(), atol=1e-4)


def test_the_corners_of_the_box_are_the_corners_of_the_planes() -> None:
    avatar = make_huma1_avatar(VIOLET, gaussians=2)
    avatar.canonical[:3] = avatar.box.T  # one Gaussian in the least corner, one in the greatest
    table = triplanes.bake(avatar)
    assert table.shape == (bundle.HUMA1_FEATURES, 2)
    for column, texel in ((0, 0), (1, -1)):
        expected = [planes[:, :, texel, texel].astype(np.float32).prod(0) for planes in (avatar.coarse, avatar.fine)]
        np.testing.assert_allclose(table[:, column], np.concatenate(expected), rtol=1e-3)


# --- frames ------------------------------------------------------------------------------------------------------


def chunk(avatar: str = VIOLET, *, index: int = 0, speech: float = 1.0, gaussians: int = 300, seed: int = 0) -> Chunk:
    shape = (clock.CHUNK_FRAMES, bundle.ATTRIBUTES, gaussians)
    offsets = np.random.default_rng(seed).normal(scale=0.05, size=shape).astype(np.float32)
    return Chunk(avatar, offsets, np.full(clock.CHUNK_FRAMES, speech, np.float32), index, RAW)


@pytest.fixture
def animator(tmp_path: Path) -> Animator:
    bundle.write(make_huma1_avatar(VIOLET), tmp_path)
    write_avatar(tmp_path, RED)
    return Animator(tmp_path)


def test_a_frame_is_the_offset_gaussians_and_the_blink_over_the_plate(animator: Animator) -> None:
    avatar = make_huma1_avatar(VIOLET)
    start = next(index for index in range(500) if 0 < blink(index) < 1) - 1
    asked = chunk(index=start)
    (frames,) = animator.render([asked])
    assert isinstance(frames, list)
    assert asked.motion is not None
    for number, frame in enumerate(frames):
        planes = avatar.canonical + asked.motion[number] + np.float32(blink(start + number)) * avatar.blink
        plate = plate_index(start + number, 0, len(avatar.plates))
        background = simplejpeg.decode_jpeg(avatar.plates[plate], "RGB").astype(np.float64)
        means, quats, scales, rgb = (
            np.ascontiguousarray(each.T) for each in (planes[:3], planes[3:7], np.exp(planes[7:10]), planes[11:])
        )
        opacities = 1 / (1 + np.exp(-planes[10]))
        view = avatar.viewmats[plate], avatar.K
        colors, alphas = splat.render(means, quats, scales, opacities, rgb, *view, 64, 64)
        expected = 255 * colors + (1 - alphas) * background
        drawn = np.frombuffer(frame, np.uint8).reshape(64, 64, 3)
        assert np.abs(drawn - expected.clip(0, 255)).mean() < 0.6


def test_silence_shows_the_rest_face_whatever_the_offsets(animator: Animator) -> None:
    still, other, speaking, idle = animator.render(
        [chunk(speech=0, seed=1), chunk(speech=0, seed=2), chunk(speech=1, seed=1), Chunk(VIOLET, None, None, 0, RAW)]
    )
    assert still == other == idle != speaking


def test_motion_of_another_profile_or_size_is_refused(animator: Animator) -> None:
    coefficients = np.zeros((clock.CHUNK_FRAMES, bundle.COEFFICIENTS), np.float32)
    other = Chunk(VIOLET, coefficients, np.ones(clock.CHUNK_FRAMES, np.float32), 0)
    bad = chunk()
    assert bad.motion is not None
    bad.motion[1, 2, 3] = np.inf
    results = animator.render([other, chunk(RED), chunk(gaussians=299), bad, chunk()])
    reasons = [str(result) for result in results if isinstance(result, RequestError)]
    assert len(reasons) == 4
    for reason, expected in zip(
        reasons,
        ("the model animate_huma1", "the model animate ", r"[4, 14, 299], expected [4, 14, 300]", "NaN"),
        strict=True,
    ):
        assert expected in reason
    assert isinstance(results[4], list)


def test_preloading_decodes_the_plates_that_fit_and_says_who_animates(tmp_path: Path) -> None:
    bundle.write(make_huma1_avatar(VIOLET), tmp_path)
    bundle.write(make_avatar(RED), tmp_path)
    plate = 64 * 64 * 3
    for budget, kept in ((1 << 30, 5), (3 * plate, 3)):
        animator = Animator(tmp_path, plate_bytes=budget)
        report = animator.preload(VIOLET)
        assert (report["profile"], report["model"], report["cached"]) == ("huma1", "animate_huma1", False)
        assert animator.catalogue()["plate_bytes"] == kept * plate
        assert animator.preload(VIOLET)["cached"]
    assert Animator(tmp_path).preload(RED)["model"] == "animate"


# --- served ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.grpc_url) as client:
        yield client


@pytest.fixture(scope="module")
def windows() -> Any:
    audio, _ = soundfile.read(ROOT / "demo" / "speech.wav", dtype="float32", frames=2 * clock.SAMPLE_RATE)
    return framing.windows(audio)


def tensor(name: str, array: Any, dtype: str) -> Any:
    return triton.InferInput(name, array.shape, dtype).set_data_from_numpy(array)


def inputs(windows: Any, avatars: Sequence[str]) -> list[Any]:
    return [
        tensor("AUDIO", windows, "FP32"),
        tensor("AVATAR", np.array([[name.encode()] for name in avatars], np.object_), "BYTES"),
        tensor("FRAME_INDEX", 4 * np.arange(len(windows), dtype=np.int64)[:, None], "INT64"),
    ]


def animate(
    client: triton.InferenceServerClient, windows: Any, avatars: Sequence[str], model: str = "animate_huma1"
) -> list[Any]:
    """Each chunk's frames [4, 64, 64, 3], sent as one request; chunk n begins at frame 4 n."""
    result = client.infer(model, inputs(windows, avatars), parameters={"format": "raw"}, client_timeout=60)
    assert result.as_numpy("SPEECH").shape == (len(windows), clock.CHUNK_FRAMES)
    rows = result.as_numpy("FRAMES")
    return [np.stack([np.frombuffer(frame, np.uint8).reshape(64, 64, 3) for frame in row]) for row in rows]


def operate(client: triton.InferenceServerClient, operation: str, avatar: str) -> dict[str, Any]:
    name = tensor("AVATAR", np.array([[avatar.encode()]], np.object_), "BYTES")
    result = client.infer("rasterizer", [name], parameters={"operation": operation}, client_timeout=60)
    return dict(json.loads(result.as_numpy("REPORT").item()))


def test_speech_moves_the_face_and_silence_does_not(client: triton.InferenceServerClient, windows: Any) -> None:
    loudest = int(np.argmax(np.abs(windows[:, clock.LEFT_CONTEXT : -clock.LOOK_AHEAD]).mean(1)))
    (rest,) = animate(client, np.zeros((1, clock.WINDOW), np.float32), [VIOLET])
    (quiet_noise,) = animate(client, np.full((1, clock.WINDOW), 1e-4, np.float32), [VIOLET])
    (speaking,) = animate(client, windows[[loudest]], [VIOLET])
    np.testing.assert_array_equal(rest, quiet_noise)
    assert np.abs(speaking.astype(int) - rest).mean() > 1


def test_a_chunk_alone_is_the_chunk_in_a_batch(client: triton.InferenceServerClient, windows: Any) -> None:
    """Up to a step of a byte here and there: the runtime's products of batches are not rounded alike."""
    windows, avatars = windows[4:8], [VIOLET, GREY, VIOLET, GREY]

    def ask(number: int) -> Any:
        return animate(client, windows[[number]], [avatars[number]])[0]

    alone = [ask(number) for number in range(4)]
    together = [
        animate(client, windows[[number, 3 - number]], [avatars[number], avatars[3 - number]])[0] for number in range(4)
    ]
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(ask, range(4)))
    for other in (together, at_once):
        for mine, theirs in zip(alone, other, strict=True):
            assert np.abs(mine.astype(int) - theirs).max() <= 1
    assert np.abs(alone[0].astype(int) - alone[1]).max() > 20  # of another avatar


@pytest.mark.parametrize(("model", "avatar"), [("animate", RED), ("animate_huma1", VIOLET)])
@pytest.mark.parametrize("output", ["SPEECH", "FRAMES"])
def test_either_output_can_be_asked_for_alone(
    client: triton.InferenceServerClient, windows: Any, model: str, avatar: str, output: str
) -> None:
    asked = inputs(windows[2:4], [avatar] * 2)
    both = client.infer(model, asked, client_timeout=60)
    alone = client.infer(model, asked, outputs=[triton.InferRequestedOutput(output)], client_timeout=60)
    np.testing.assert_array_equal(alone.as_numpy(output), both.as_numpy(output))


def test_preloading_through_the_rasterizer_bakes_and_reports(client: triton.InferenceServerClient) -> None:
    operate(client, "unload", GREY)
    report = operate(client, "preload", GREY)
    assert (report["profile"], report["model"], report["cached"]) == ("huma1", "animate_huma1", False)
    assert operate(client, "preload", GREY)["cached"]


@pytest.mark.parametrize(("model", "avatar"), [("animate", VIOLET), ("animate_huma1", RED)])
def test_an_avatar_of_another_profile_is_refused_with_the_model_to_ask(
    client: triton.InferenceServerClient, server: Server, windows: Any, model: str, avatar: str
) -> None:
    right = {"animate": "animate_huma1", "animate_huma1": "animate"}[model]
    with pytest.raises(InferenceServerException, match=f"the model {right} animates it") as caught:
        animate(client, windows[:1], [avatar], model)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    server.canary(20)


def test_unloading_forgets_the_table_and_the_net_too(client: triton.InferenceServerClient, server: Server) -> None:
    """A file that is damaged while the manifest stays as it was is only noticed when it is read anew."""
    folder = bundle.write(make_huma1_avatar("guest"), server.avatars)
    name = tensor("AVATAR", np.array([[b"guest"]], np.object_), "BYTES")
    try:
        operate(client, "preload", "guest")
        (folder / "deformation.safetensors").write_bytes(b"damaged")
        client.infer("avatar_huma1", [name])
        operate(client, "unload", "guest")
        with pytest.raises(InferenceServerException, match=r"deformation\.safetensors is 7 bytes"):
            client.infer("avatar_huma1", [name])
    finally:
        shutil.rmtree(folder)


def test_who_animates_can_not_unload(client: triton.InferenceServerClient, windows: Any) -> None:
    inputs = [
        tensor("AUDIO", windows[:1], "FP32"),
        tensor("AVATAR", np.array([[VIOLET.encode()]], np.object_), "BYTES"),
        tensor("FRAME_INDEX", np.zeros((1, 1), np.int64), "INT64"),
    ]
    with pytest.raises(InferenceServerException, match="An operation takes AVATAR alone"):
        client.infer("animate_huma1", inputs, parameters={"operation": "unload"}, client_timeout=60)


def test_an_avatar_of_another_speech_encoder_is_refused(
    client: triton.InferenceServerClient, server: Server, windows: Any
) -> None:
    """It would move somehow: what another layer, or another size of the recogniser, hears means nothing to it."""
    other = replace(make_huma1_avatar("aged"), audio_encoder="9" * 64)
    folder = bundle.write(other, server.avatars)
    try:
        for ask in (lambda: operate(client, "preload", "aged"), lambda: animate(client, windows[:1], ["aged"])):
            with pytest.raises(InferenceServerException, match="was fitted to another speech encoder") as caught:
                ask()
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
        loaded = {each["id"]: each["loaded"] for each in operate(client, "list", "aged")["avatars"]}
        assert loaded["aged"] is False
        server.canary(20)  # "aged" is the first of its profile
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("avatars", "asked"),
    [
        ([], {"transcribe": None}),
        ([RED], {"speech_to_animation": RED}),
        ([RED, VIOLET], {"speech_to_animation": RED, "animate_huma1": VIOLET}),
        ([VIOLET], {"transcribe": None, "animate_huma1": VIOLET}),
        (["broken", VIOLET], {"transcribe": None, "animate_huma1": VIOLET}),
    ],
)
def test_the_canary_goes_through_each_profile_that_is_there(
    avatars: list[str], asked: dict[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for avatar_id in avatars:
        folder = bundle.write((make_avatar if avatar_id == RED else make_huma1_avatar)(avatar_id), tmp_path)
        if avatar_id == "broken":
            (folder / "triplanes.safetensors").write_bytes(b"")
    found: dict[str, str | None] = {}

    def ask(_: Any, model: str, arrays: dict[str, Any], timeout: float, **__: Any) -> None:
        found[model] = arrays["AVATAR"].item().decode() if "AVATAR" in arrays else None

    monkeypatch.setattr(server_module, "_ask", ask)
    Server(avatars=tmp_path, ports=Ports.free()).canary(1)
    assert found == asked


def test_an_unknown_avatar_is_not_found(client: triton.InferenceServerClient, windows: Any) -> None:
    with pytest.raises(InferenceServerException, match="There is no avatar 'nobody'") as caught:
        animate(client, windows[:1], ["nobody"])
    assert caught.value.status() == "StatusCode.NOT_FOUND"


def test_the_client_animates_with_the_model_that_preloading_names(server: Server) -> None:
    with Client(server.grpc_url) as user:
        model = user.preload(VIOLET).model
        frames = list(user.animate(np.zeros(7 * 640, np.float32), avatar=VIOLET, model=model))
    assert [frame.index for frame in frames] == list(range(7))
    assert frames[0].to_array().shape == (64, 64, 3)
