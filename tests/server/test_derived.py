"""Real servers on derived repositories, beside the suite's on the committed one."""

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import tritonclient.grpc as triton
from rich.console import Console

from talksplat import clock, framing
from talksplat.server import NO_PROXY, ROOT, Ports, Server
from talksplat_export import models
from talksplat_export.derive import ModelChange, derive

AVATAR = "ava"
SIZE = 256
CHANNEL = [*NO_PROXY, ("grpc.max_receive_message_length", -1)]
Show = Callable[[Server], npt.NDArray[np.float64]]


@pytest.fixture(scope="module")
def show() -> Show:
    """Three seconds of the demo's speech, as one batch: the frames [chunks, 4, SIZE, SIZE, 3] of a server."""
    audio, _ = soundfile.read(ROOT / "demo" / "speech.wav", dtype="float32", frames=3 * clock.SAMPLE_RATE)
    windows = framing.windows(audio)
    inputs = [
        tensor("AUDIO", windows, "FP32"),
        tensor("AVATAR", np.full((len(windows), 1), AVATAR.encode(), np.object_), "BYTES"),
        tensor("FRAME_INDEX", clock.CHUNK_FRAMES * np.arange(len(windows), dtype=np.int64)[:, None], "INT64"),
    ]

    def show(server: Server) -> npt.NDArray[np.float64]:
        with triton.InferenceServerClient(server.grpc_url, channel_args=CHANNEL) as client:
            asked = {"format": "raw", "size": SIZE}
            rows = client.infer("animate", inputs, parameters=asked, client_timeout=60).as_numpy("FRAMES")
        pixels = np.frombuffer(b"".join(rows.ravel()), np.uint8)
        return pixels.reshape(len(windows), clock.CHUNK_FRAMES, SIZE, SIZE, 3).astype(np.float64)

    return show


@pytest.fixture(scope="module")
def committed(server: Server, show: Show) -> npt.NDArray[np.float64]:
    if not (server.avatars / AVATAR).is_dir():
        pytest.skip(f"the avatar {AVATAR} has not been fitted")
    return show(server)


def say(server: Server) -> npt.NDArray[np.float32]:
    """The first piece of a prepared reply."""
    text = tensor("TEXT", np.array([b"Hello!"], np.object_), "BYTES")
    with triton.InferenceServerClient(server.grpc_url, channel_args=CHANNEL) as client:
        start = tensor("START", np.zeros(1, np.int64), "INT64")
        return np.asarray(client.infer("tts", [text, start]).as_numpy("AUDIO"), np.float32)


def tensor(name: str, array: Any, dtype: str) -> Any:
    return triton.InferInput(name, array.shape, dtype).set_data_from_numpy(array)


@pytest.mark.usefixtures("hurried")
def test_more_instances_threads_and_a_delay_elsewhere_draw_the_same_frames(
    server: Server, show: Show, committed: npt.NDArray[np.float64], tmp_path: Path
) -> None:
    more = ModelChange(instances=2, parameters={"intra_op_thread_count": "2"})
    changes = {
        "vad": more,
        "deformation": more,
        "audio_encoder": ModelChange(queue_delay_us=0),
        "rasterizer": ModelChange(queue_delay_us=1500, preferred_batch_sizes=(4, 8)),
        "tts": ModelChange(parameters={"networks": "triton"}),
    }
    derive(tmp_path / "repository", changes)
    with Server(tmp_path / "repository", server.avatars, ports=Ports.free()) as derived:
        with triton.InferenceServerClient(derived.grpc_url, channel_args=CHANNEL) as client:
            vad, rasterizer = (client.get_model_config(name).config for name in ("vad", "rasterizer"))
        frames = show(derived)
        np.testing.assert_allclose(say(derived), say(server), atol=1e-4)
    assert [group.count for group in vad.instance_group] == [2]
    assert rasterizer.dynamic_batching.max_queue_delay_microseconds == 1500
    np.testing.assert_array_equal(frames, committed)


@pytest.mark.usefixtures("hurried")
@pytest.mark.timeout(300)  # another process of the tests may be exporting
def test_nets_in_int8_draw_nearly_the_same_frames(
    server: Server, show: Show, committed: npt.NDArray[np.float64], tmp_path: Path
) -> None:
    names = ["vad", "audio_encoder"]
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / "exports.lock").open("w") as lock:  # one of the processes that tests run in at a time
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = [model for model in models.models() if model.name in names]
        models.export(ROOT / "model_repository", wanted, Console(quiet=True), ["int8"])
    derive(tmp_path / "repository", {name: ModelChange(precision="int8", kind="cpu") for name in names})
    with Server(tmp_path / "repository", server.avatars, ports=Ports.free()) as derived:
        frames = show(derived)
    error = np.square(frames - committed).mean()
    assert error > 0  # else it was served in fp32
    assert 10 * np.log10(255**2 / error) >= 38
