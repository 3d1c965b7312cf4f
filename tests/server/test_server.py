"""The real Triton, started once for the session (`server` in tests/conftest.py), driven through gRPC."""

import json
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import simplejpeg
import tritonclient.grpc as triton
from make_avatar import write_avatar
from tritonclient.utils import InferenceServerException

from talksplat import clock, framing
from talksplat.server import Server

RED, GREEN, BLUE = "red", "green", "blue"


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.grpc_url) as client:
        yield client


@pytest.fixture
def healthy_after(server: Server) -> Iterator[None]:
    yield
    assert server.dead_processes() is None
    server.canary(20)


def voice(seconds: float, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A buzz in syllables: enough for a detector to hear speech in parts of it."""
    t = np.arange(round(seconds * clock.SAMPLE_RATE)) / clock.SAMPLE_RATE
    pitch = 2 * np.pi * (110 * t + 8 * np.sin(2 * np.pi * 0.7 * t + seed))
    tone = sum(np.sin(k * pitch) / k for k in range(1, 20))
    return np.asarray(0.25 * tone * (0.5 - 0.5 * np.cos(2 * np.pi * 4 * t)), np.float32)


def tensor(name: str, array: Any, dtype: str) -> Any:
    array = np.asarray(array)
    return triton.InferInput(name, array.shape, dtype).set_data_from_numpy(array)


def ids(*names: str) -> Any:
    return np.array([[name.encode()] for name in names], np.object_)


def animate(
    client: triton.InferenceServerClient,
    windows: Any,
    avatars: Sequence[str],
    indices: Sequence[int],
    **parameters: Any,
) -> list[list[bytes]]:
    """The frames of some chunks, sent as one request."""
    result = client.infer(
        "animate",
        [
            tensor("AUDIO", windows, "FP32"),
            tensor("AVATAR", ids(*avatars), "BYTES"),
            tensor("FRAME_INDEX", np.array(indices, np.int64)[:, None], "INT64"),
        ],
        parameters=parameters or None,
        client_timeout=60,
    )
    speech = result.as_numpy("SPEECH")
    assert speech.shape == (len(windows), clock.CHUNK_FRAMES)
    assert ((speech >= 0) & (speech <= 1)).all()
    return [list(frames) for frames in result.as_numpy("FRAMES")]


def idle(client: triton.InferenceServerClient, avatar: str, index: int, **parameters: Any) -> list[bytes]:
    """The frames of a chunk in which nobody speaks."""
    asked = [tensor("AVATAR", ids(avatar), "BYTES"), tensor("FRAME_INDEX", np.array([[index]]), "INT64")]
    result = client.infer("rasterizer", asked, parameters=parameters or None, client_timeout=60)
    return list(result.as_numpy("FRAMES")[0])


def operate(client: triton.InferenceServerClient, operation: str, avatar: str = "") -> dict[str, Any]:
    result = client.infer("rasterizer", [tensor("AVATAR", ids(avatar), "BYTES")], parameters={"operation": operation})
    return dict(json.loads(result.as_numpy("REPORT").item()))


def picture(jpeg: bytes) -> Any:
    return simplejpeg.decode_jpeg(jpeg, "RGB")


def test_a_chunk_gives_jpegs_of_the_avatar(client: triton.InferenceServerClient) -> None:
    windows = framing.windows(voice(0.16))
    for channel, name in enumerate((RED, GREEN, BLUE)):
        ((*frames,),) = animate(client, windows, [name], [0])
        assert len(frames) == clock.CHUNK_FRAMES
        for frame in frames:
            image = picture(frame)
            assert image.shape == (64, 64, 3)
            assert image[24:40, 24:40].mean((0, 1)).argmax() == channel


def test_a_chunk_gives_the_same_frames_alone_and_beside_other_avatars_chunks(
    client: triton.InferenceServerClient,
) -> None:
    windows = framing.windows(voice(2.0))
    avatars = [(RED, GREEN, BLUE)[number % 3] for number in range(len(windows))]
    indices = [4 * number for number in range(len(windows))]
    alone = [
        animate(client, window[None], [avatar], [index])[0]
        for window, avatar, index in zip(windows, avatars, indices, strict=True)
    ]
    assert animate(client, windows, avatars, indices) == alone  # one request
    with ThreadPoolExecutor(len(windows)) as pool:  # many, which Triton batches

        def ask(number: int) -> list[bytes]:
            return animate(client, windows[number][None], [avatars[number]], [indices[number]])[0]

        for _ in range(3):
            assert list(pool.map(ask, range(len(windows)))) == alone
    assert len({frame for frames in alone for frame in frames}) > len(windows)  # the face does move


def test_many_streams_are_served_in_batches(client: triton.InferenceServerClient) -> None:
    windows = framing.windows(voice(0.16))

    def counts() -> Any:
        (statistics,) = client.get_inference_statistics("rasterizer").model_stats
        return np.array([statistics.inference_count, statistics.execution_count])

    before = counts()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: animate(client, windows, [RED], [number]), range(128)))
    inferences, executions = counts() - before
    assert inferences == 128
    assert executions < 128


def test_frames_depend_on_index_and_seed_alone(client: triton.InferenceServerClient) -> None:
    windows = framing.windows(np.zeros(clock.CHUNK_SAMPLES, np.float32))
    one = animate(client, windows, [RED], [40], seed=3)
    animate(client, windows, [RED], [0])
    assert animate(client, windows, [RED], [40], seed=3) == one
    assert animate(client, windows, [RED], [42], seed=3)[0][:2] == one[0][2:]
    assert animate(client, windows, [RED], [40], seed=4) != one


def test_raw_frames_are_what_the_jpegs_show(client: triton.InferenceServerClient) -> None:
    windows = framing.windows(voice(0.16))
    (raw,) = animate(client, windows, [RED], [0], format="raw")
    (jpegs,) = animate(client, windows, [RED], [0], quality=100)
    for pixels, jpeg in zip(raw, jpegs, strict=True):
        image = np.frombuffer(pixels, np.uint8).reshape(64, 64, 3)
        assert np.abs(image.astype(int) - picture(jpeg)).mean() < 4


def test_a_lower_quality_gives_smaller_frames(client: triton.InferenceServerClient) -> None:
    windows = framing.windows(voice(0.16))
    low, high = (animate(client, windows, [RED], [0], quality=quality)[0][0] for quality in (30, 95))
    assert len(low) < len(high)


@pytest.mark.parametrize("size", [32, 40, 56])
def test_a_smaller_size_shows_the_same_picture(client: triton.InferenceServerClient, size: int) -> None:
    windows = framing.windows(voice(0.16))
    (full,) = animate(client, windows, [RED], [0], format="raw")
    (small,) = animate(client, windows, [RED], [0], format="raw", size=size)
    whole, image = (
        np.frombuffer(frames[0], np.uint8).reshape(8, side // 8, 8, side // 8, 3).mean((1, 3))
        for frames, side in ((full, 64), (small, size))
    )
    assert np.abs(whole - image).mean() < 4
    assert np.abs(whole - np.roll(image, 1, axis=0)).mean() > 8  # so much a shift would show


def test_an_utterance_gives_the_frames_of_its_chunks(client: triton.InferenceServerClient) -> None:
    audio = voice(1.5)
    windows = framing.windows(audio)
    indices = [100 + 4 * number for number in range(len(windows))]
    result = client.infer(
        "speech_to_animation",
        [
            tensor("AUDIO", audio, "FP32"),
            tensor("AVATAR", ids(BLUE)[0], "BYTES"),
            tensor("FRAME_INDEX", np.array([100]), "INT64"),
        ],
        client_timeout=60,
    )
    assert isinstance(result.as_numpy("TEXT").item(), bytes)
    assert result.as_numpy("SPEECH").shape == (len(windows), clock.CHUNK_FRAMES)
    whole = [list(frames) for frames in result.as_numpy("FRAMES")]
    assert whole == animate(client, windows, [BLUE] * len(windows), indices)


def test_an_ensemble_answers_with_the_outputs_that_are_asked_for(client: triton.InferenceServerClient) -> None:
    """Triton leaves out steps whose outputs nobody wants, and those of the others must not need them."""
    audio = voice(0.16)
    for model, heard, avatar, outputs in (
        ("animate", framing.windows(audio), ids(RED), ["FRAMES"]),
        ("speech_to_animation", audio, ids(RED)[0], ["TEXT", "FRAMES", "SPEECH"]),
    ):
        index = tensor("FRAME_INDEX", np.zeros(avatar.shape, np.int64), "INT64")
        asked = [tensor("AUDIO", heard, "FP32"), tensor("AVATAR", avatar, "BYTES"), index]
        everything = client.infer(model, asked, client_timeout=60)
        for name in outputs:
            alone = client.infer(model, asked, outputs=[triton.InferRequestedOutput(name)], client_timeout=60)
            assert [output.name for output in alone.get_response().outputs] == [name]
            np.testing.assert_array_equal(alone.as_numpy(name), everything.as_numpy(name))


def test_an_idle_chunk_is_what_animate_gives_on_silence_byte_for_byte(client: triton.InferenceServerClient) -> None:
    silence = framing.windows(np.zeros(clock.CHUNK_SAMPLES, np.float32))
    for index, parameters in (
        *((0, {}), (96, {"seed": 5}), (8, {"size": 32, "quality": 60}), (4, {"format": "raw"})),
        (4, {"listening_before": 20, "listening": 70}),
    ):
        assert idle(client, BLUE, index, **parameters) == animate(client, silence, [BLUE], [index], **parameters)[0]


def test_a_listener_is_drawn_otherwise_by_animate_too(client: triton.InferenceServerClient) -> None:
    windows = framing.windows(voice(0.16))
    for ask in (partial(idle, client, BLUE, 8), partial(animate, client, windows, [BLUE], [8])):
        assert ask() == ask(listening=0, listening_before=0) != ask(listening=100, listening_before=100)


def test_a_chunk_is_rendered_only_before_its_deadline(client: triton.InferenceServerClient) -> None:
    windows = framing.windows(voice(0.16))
    assert animate(client, windows, [RED], [0], deadline_ms=60_000) == animate(client, windows, [RED], [0])
    asked = [tensor("AVATAR", ids(RED), "BYTES"), tensor("FRAME_INDEX", np.zeros((1, 1), np.int64), "INT64")]
    arrived = tensor("ARRIVED", np.array([[time.monotonic() - 3]]), "FP64")
    assert client.infer("rasterizer", [*asked, arrived], parameters={"deadline_ms": 60_000}).as_numpy("FRAMES").size
    with pytest.raises(
        InferenceServerException, match=r"The chunk is 3\d\d\d ms old, beyond its deadline of 2500 ms\."
    ) as caught:
        client.infer("rasterizer", [*asked, arrived], parameters={"deadline_ms": 2500})
    assert caught.value.status() == "StatusCode.CANCELLED"
    with pytest.raises(InferenceServerException, match="ARRIVED") as caught:
        client.infer("rasterizer", [*asked, tensor("ARRIVED", np.array([[np.nan]]), "FP64")])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_half_of_what_a_speaking_chunk_needs_is_invalid(client: triton.InferenceServerClient) -> None:
    asked = [tensor("AVATAR", ids(RED), "BYTES"), tensor("FRAME_INDEX", np.zeros((1, 1), np.int64), "INT64")]
    speech = tensor("SPEECH", np.zeros((1, clock.CHUNK_FRAMES), np.float32), "FP32")
    coefficients = tensor("COEFFICIENTS", np.zeros((1, clock.CHUNK_FRAMES, 20), np.float32), "FP32")
    for half, missing in ((speech, "COEFFICIENTS"), (coefficients, "SPEECH")):
        with pytest.raises(InferenceServerException, match=f"{missing} is missing") as caught:
            client.infer("rasterizer", [*asked, half])
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_requests_are_answered_though_an_operation_takes_its_time(client: triton.InferenceServerClient) -> None:
    """More operations than there are threads for them, and chunks between them."""
    with ThreadPoolExecutor(16) as pool:
        reports = [pool.submit(operate, client, "preload", name) for name in ("violet", "grey", RED, BLUE) * 3]
        chunks = [pool.submit(idle, client, (RED, GREEN)[number % 2], 4 * number) for number in range(24)]
        assert all(report.result(60)["loaded"] for report in reports)
        assert all(len(frames.result(60)) == clock.CHUNK_FRAMES for frames in chunks)


def test_avatars_are_listed_loaded_and_forgotten(client: triton.InferenceServerClient) -> None:
    def loaded() -> dict[str, bool]:
        return {entry["id"]: entry["loaded"] for entry in operate(client, "list")["avatars"]}

    operate(client, "unload", GREEN)
    assert not loaded()[GREEN]
    report = operate(client, "preload", GREEN)
    assert (report["avatar"], report["cached"], report["width"], report["height"]) == (GREEN, False, 64, 64)
    assert report["milliseconds"] > 0
    assert loaded()[GREEN]
    assert operate(client, "preload", GREEN)["cached"]
    assert operate(client, "unload", GREEN)["loaded"] is False
    assert set(loaded()) >= {RED, GREEN, BLUE}


def test_a_new_avatar_is_served_without_a_restart_and_a_deleted_one_no_more(
    client: triton.InferenceServerClient, server: Server
) -> None:
    windows = framing.windows(voice(0.16))
    folder = write_avatar(server.avatars, "fresh", size=32)
    try:
        ((first, *_),) = animate(client, windows, ["fresh"], [0])
        assert picture(first).shape == (32, 32, 3)
    finally:
        shutil.rmtree(folder)
    with pytest.raises(InferenceServerException, match="There is no avatar 'fresh'") as caught:
        operate(client, "preload", "fresh")
    assert caught.value.status() == "StatusCode.NOT_FOUND"


@pytest.mark.usefixtures("healthy_after")
@pytest.mark.parametrize("name", ["nobody", "", "../red", "RED", "x" * 5000, "r\xe9d", "red\0"])
def test_an_unknown_avatar_is_not_found(client: triton.InferenceServerClient, name: str) -> None:
    with pytest.raises(InferenceServerException, match="avatar") as caught:
        animate(client, framing.windows(voice(0.16)), [name], [0])
    assert caught.value.status() == "StatusCode.NOT_FOUND"


def test_a_broken_bundle_fails_its_requests_only(
    client: triton.InferenceServerClient, server: Server, healthy_after: None
) -> None:
    folder = write_avatar(server.avatars, "broken")
    try:
        data = (folder / "plates.bin").read_bytes()
        (folder / "plates.bin").write_bytes(data[:-9])
        with pytest.raises(InferenceServerException, match=r"plates\.bin") as caught:
            operate(client, "preload", "broken")
        assert caught.value.status() == "StatusCode.INTERNAL"
        with pytest.raises(InferenceServerException, match=r"plates\.bin"):
            animate(client, framing.windows(voice(0.16)), ["broken"], [0])
        (folder / "plates.bin").write_bytes(data)
        assert operate(client, "preload", "broken")["loaded"]
    finally:
        shutil.rmtree(folder)


@pytest.mark.usefixtures("healthy_after")
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *(((1, 100), "FP32"), ((1, clock.WINDOW + 1), "FP32"), ((clock.WINDOW,), "FP32"), ((1, clock.WINDOW), "FP64")),
        *(((0, clock.WINDOW), "FP32"), ((2, clock.WINDOW), "FP32"), ((500, clock.WINDOW), "FP32"), ((0,), "FP32")),
    ],
)
def test_wrong_tensors_are_invalid(client: triton.InferenceServerClient, shape: tuple[int, ...], dtype: str) -> None:
    audio = np.zeros(shape, {"FP32": np.float32, "FP64": np.float64}[dtype])
    inputs = [
        tensor("AUDIO", audio, dtype),
        tensor("AVATAR", ids(RED), "BYTES"),
        tensor("FRAME_INDEX", np.zeros((1, 1), np.int64), "INT64"),
    ]
    with pytest.raises(InferenceServerException, match=r"AUDIO|batch") as caught:
        client.infer("animate", inputs)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.usefixtures("healthy_after")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_audio_that_is_not_finite_is_invalid(client: triton.InferenceServerClient, bad: float) -> None:
    window = framing.windows(voice(0.16))
    window[0, clock.LEFT_CONTEXT + 5] = bad
    with pytest.raises(InferenceServerException, match="NaN or infinity") as caught:
        animate(client, window, [RED], [0])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.usefixtures("healthy_after")
def test_one_bad_chunk_fails_its_own_request_only(client: triton.InferenceServerClient) -> None:
    good = framing.windows(voice(0.16))
    bad = np.full_like(good, np.nan)
    expected = animate(client, good, [RED], [0])

    def ask(number: int) -> object:
        try:
            return animate(client, *((good, [RED]), (bad, [RED]), (good, ["nobody"]))[number % 3], [0])
        except InferenceServerException as error:
            return error.status()

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(36)))
    assert all(answer == expected for answer in answers[::3])
    assert set(map(str, answers[1::3])) == {"StatusCode.INVALID_ARGUMENT"}
    assert set(map(str, answers[2::3])) == {"StatusCode.NOT_FOUND"}


@pytest.mark.usefixtures("healthy_after")
def test_cancelled_requests_harm_nobody(server: Server, client: triton.InferenceServerClient) -> None:
    """That each of them is released shows when the server stops: see the fixture."""
    windows = framing.windows(voice(0.64))
    avatars, indices = [RED] * len(windows), list(range(len(windows)))
    expected = animate(client, windows, avatars, indices)

    def cancel(number: int) -> None:
        with triton.InferenceServerClient(server.grpc_url) as own:
            inputs = [
                tensor("AUDIO", windows, "FP32"),
                tensor("AVATAR", ids(*avatars), "BYTES"),
                tensor("FRAME_INDEX", np.array(indices, np.int64)[:, None], "INT64"),
            ]
            answered = threading.Event()
            call = own.async_infer("animate", inputs, lambda result, error: answered.set())
            answered.wait(0.0005 * number)
            call.cancel()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(cancel, range(60)))
    assert animate(client, windows, avatars, indices) == expected


@pytest.mark.usefixtures("healthy_after")
@pytest.mark.parametrize("loudness", [5.0, 1e4, 1e30])
def test_clipped_and_huge_audio_gives_frames_or_a_clear_error(
    client: triton.InferenceServerClient, loudness: float
) -> None:
    windows = framing.windows(voice(0.16) * np.float32(loudness))
    try:
        ((*frames,),) = animate(client, windows, [RED], [0])
    except InferenceServerException as error:
        answer = [error.status()]
    else:
        answer = [picture(frame).shape for frame in frames]
    assert answer in ([(64, 64, 3)] * clock.CHUNK_FRAMES, ["StatusCode.INVALID_ARGUMENT"])


@pytest.mark.usefixtures("healthy_after")
@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"format": "png"}, "format is 'png', expected one of jpeg, raw"),
        ({"quality": 0}, "quality is 0, expected 1 to 100"),
        ({"quality": "high"}, "quality is 'high', expected a whole number"),
        ({"size": 12}, "size is 12, expected a multiple of 8"),
        ({"size": 4096}, "size is 4096, above the 64 pixels"),
        ({"seed": 1.5}, "seed is 1.5, expected a whole number"),
        ({"listening": 101}, "listening is 101, expected 0 to 100"),
        ({"listening_before": "all"}, "listening_before is 'all', expected a whole number"),
        ({"operation": "explode"}, "operation is 'explode', expected one of preload, unload, list"),
        ({"operation": "unload"}, "ask the model rasterizer"),
    ],
)
def test_wrong_parameters_are_invalid(
    client: triton.InferenceServerClient, parameters: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InferenceServerException, match=reason) as caught:
        animate(client, framing.windows(voice(0.16)), [RED], [0], **parameters)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.usefixtures("healthy_after")
@pytest.mark.parametrize("index", [-1, -(2**63), 2**63 - 1])
def test_a_frame_index_out_of_range_is_invalid(client: triton.InferenceServerClient, index: int) -> None:
    with pytest.raises(InferenceServerException, match="FRAME_INDEX") as caught:
        animate(client, framing.windows(voice(0.16)), [RED], [index])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.usefixtures("healthy_after")
@pytest.mark.parametrize("samples", [0, framing.MAX_SAMPLES + 1])
def test_an_utterance_of_impossible_length_is_invalid(client: triton.InferenceServerClient, samples: int) -> None:
    inputs = [
        tensor("AUDIO", np.zeros(samples, np.float32), "FP32"),
        tensor("AVATAR", ids(RED)[0], "BYTES"),
        tensor("FRAME_INDEX", np.array([0]), "INT64"),
    ]
    with pytest.raises(InferenceServerException) as caught:
        client.infer("speech_to_animation", inputs, client_timeout=30)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
