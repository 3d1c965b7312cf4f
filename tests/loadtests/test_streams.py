import threading
import time
import wave
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_server import ScriptedServer, inputs
from tritonclient.grpc import service_pb2

from loadtests import streams
from loadtests.slo import CHUNK_SECONDS, Summary, due
from loadtests.streams import JPEG_BEGINS, SILENCE, Ask, Generator, Load, Triton, schedule, windows
from talksplat import clock
from talksplat.animator import gate
from talksplat.server import ROOT, Server

loads = st.builds(
    Load,
    streams=st.integers(1, 12),
    avatars=st.just(("red", "green", "blue")),
    seconds=st.floats(0.5, 20),
    kinds=st.sampled_from([("speaking",), ("speaking", "idle", "listening")]),
    chunks=st.integers(1, 30),
    seed=st.integers(0, 5),
)


@given(loads)
def test_a_schedule_is_fixed_in_advance_and_carries_every_viewer_in_real_time(load: Load) -> None:
    planned = schedule(load)
    assert planned == schedule(load)
    middle = load.warm_up_seconds + load.seconds / 2
    asked: dict[int, list[float]] = {viewer: [] for viewer in range(load.streams)}
    for stream in planned:
        asked[stream.viewer] += [due(stream.start, chunk) for chunk in range(stream.chunks)]
    end = load.warm_up_seconds + load.seconds
    for times in asked.values():
        assert max(times) < end <= max(times) + 2 * CHUNK_SECONDS + 1e-9  # to the very end
        assert min(times) <= load.warm_up_seconds + CHUNK_SECONDS
        assert min(abs(moment - middle) for moment in times) <= CHUNK_SECONDS


@given(loads)
def test_a_viewers_frame_index_goes_on_and_avatars_are_mixed(load: Load) -> None:
    planned = schedule(load)
    for viewer in range(load.streams):
        own = [stream for stream in planned if stream.viewer == viewer]
        assert [stream.first_frame_index for stream in own] == [4 * load.chunks * n for n in range(len(own))]
    assert {stream.avatar for stream in planned} == set(load.avatars[: load.streams])


def test_a_load_of_nothing_is_refused() -> None:
    for wrong in ({"streams": 0}, {"avatars": ()}, {"seconds": 0.0}, {"kinds": ()}, {"chunks": 0}):
        with pytest.raises(ValueError, match="A load needs"):
            Load(**{"streams": 1, "avatars": ("red",), **wrong})  # type: ignore[arg-type]


def test_a_request_is_one_message_with_all_inputs() -> None:
    audio = windows()[3]
    ask = Ask("red", 256, 7, 40, audio)
    request = service_pb2.ModelInferRequest.FromString(Triton("host:1", deadline_ms=160).request("viewer-2", ask))
    found = inputs(request)
    assert (request.model_name, request.id) == ("animate", "viewer-2-40")
    assert (found["AVATAR"], found["FRAME_INDEX"]) == ("red", 40)
    assert found["AUDIO"].tobytes() == audio
    parameters = {name: value.int64_param for name, value in request.parameters.items()}
    assert parameters == {"size": 256, "seed": 7, "deadline_ms": 160}

    idle = service_pb2.ModelInferRequest.FromString(Triton("host:1").request("viewer-2", Ask("red", 256, 7, 40, None)))
    assert idle.model_name == "rasterizer"
    assert set(inputs(idle)) == {"AVATAR", "FRAME_INDEX"}
    listening = service_pb2.ModelInferRequest.FromString(
        Triton("host:1").request("viewer-2", Ask("red", 256, 7, 40, None, listening=100))
    )
    parameters = {name: value.int64_param for name, value in listening.parameters.items()}
    assert parameters == {"size": 256, "seed": 7, "listening": 100, "listening_before": 100}


def recording(path: Path, *parts: np.ndarray[Any, Any], rate: int = clock.SAMPLE_RATE) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((32767 * np.concatenate(parts)).astype("<i2").tobytes())
    return path


def test_speech_is_cut_into_windows_and_its_pauses_are_left_out(tmp_path: Path) -> None:
    loud = np.random.default_rng(0).uniform(-0.5, 0.5, clock.WINDOW + 3 * clock.CHUNK_SAMPLES)
    pause = np.zeros(20 * clock.CHUNK_SAMPLES)
    without = windows(recording(tmp_path / "a.wav", loud))
    assert len(without) == 4
    first, second = (np.frombuffer(each, "<f4") for each in without[:2])
    np.testing.assert_array_equal(first[clock.CHUNK_SAMPLES :], second[: -clock.CHUNK_SAMPLES])
    whole = (clock.LEFT_CONTEXT + 4 * clock.CHUNK_SAMPLES) / clock.CHUNK_SAMPLES  # chunks that are heard at all
    assert len(without) <= len(windows(recording(tmp_path / "b.wav", loud, pause))) <= whole + 2


def test_the_projects_speech_never_rests() -> None:
    """Else streams would be cheaper than those of people who speak."""
    net = ort.InferenceSession(str(ROOT / "model_repository" / "vad" / "1" / "model.onnx"))
    for window in windows():
        [speech] = net.run(["SPEECH"], {"AUDIO": np.frombuffer(window, np.float32)[None]})
        assert (gate(speech[0]) > 0).all()


def test_a_recording_that_can_not_be_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        windows(tmp_path / "none.wav")
    with pytest.raises(ValueError, match="shorter than a window"):
        windows(recording(tmp_path / "short.wav", np.zeros(100)))
    with pytest.raises(ValueError, match="is not WAV of 16000 Hz"):
        windows(recording(tmp_path / "fast.wav", np.zeros(100), rate=48_000))


class _JpegServer(ScriptedServer):
    """Answers with what the generator counts as frames, and keeps who asked what."""

    def __init__(self, **script: Any) -> None:
        super().__init__(**script)
        self.wanted: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []

    def _frames(self, request: Any, given: dict[str, Any], chunks: int) -> np.ndarray[Any, Any]:
        self.wanted.append((given["AVATAR"], request.id))
        return np.full((chunks, clock.CHUNK_FRAMES), JPEG_BEGINS + b"...", object)

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.headers.append(dict(context.invocation_metadata()))
        return super().ModelInfer(request, context)


@pytest.fixture(autouse=True)
def _no_long_lead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LEAD_SECONDS", 0.2)


SHORT = Load(2, ("ava",), seconds=0.9, chunks=4)


def test_a_paced_run_sends_its_schedule_and_names_its_own_share(generator: Generator) -> None:
    moments = []
    with _JpegServer() as server:
        target = Triton(server.url, key="secret")
        seen = generator.paced(target, SHORT, lambda: moments.append(time.monotonic()))
    expected = [
        ("ava", f"viewer-{stream.viewer}-{stream.first_frame_index + 4 * chunk}")
        for stream in schedule(SHORT)
        for chunk in range(stream.chunks)
    ]
    assert Counter(server.wanted) == Counter(expected)
    assert server.headers[0]["authorization"] == "Bearer secret"
    assert server.headers[0]["x-talksplat-stream"] in ("viewer-0", "viewer-1")
    assert moments[1] - moments[0] == pytest.approx(SHORT.seconds, abs=0.3)
    assert 0 < seen.cpu_seconds < 2 * SHORT.seconds
    assert seen.frames_per_s > 0
    assert not seen.failed_ms
    assert not seen.refused
    assert Summary.of(seen.playouts).frames > 0


def test_a_server_that_stands_still_does_not_lighten_the_load(generator: Generator) -> None:
    """Coordinated omission: while one answer is held back, every request goes out, and each one's wait counts."""
    held = threading.Event()

    def hold(chunk: int) -> float:
        if chunk == 5 and not held.is_set():
            held.set()
            return 1.0
        return 0.0

    with _JpegServer(delay=hold) as server:
        seen = generator.paced(Triton(server.url), SHORT)
    assert len(server.wanted) == sum(stream.chunks for stream in schedule(SHORT))
    slow = [ms for playout in seen.playouts for ms in playout.chunk_ms if ms > 900]
    assert len(slow) == 1


def test_errors_are_lost_frames_and_refused_streams_are_counted_apart(generator: Generator) -> None:
    def script(chunk: int, before: int, context: Any) -> None:
        metadata = dict(context.invocation_metadata())
        if metadata["x-talksplat-stream"] == "viewer-1":
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        if chunk in (5, 6, 7):
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    with _JpegServer(script=script) as server:
        seen = generator.paced(Triton(server.url), SHORT)
    assert set(seen.failed_ms) == {"RESOURCE_EXHAUSTED", "UNAVAILABLE"}
    assert seen.refused == sum(
        stream.viewer == 1 and due(stream.start, 0) >= SHORT.warm_up_seconds for stream in schedule(SHORT)
    )
    assert sum(int(playout.missed.sum()) for playout in seen.playouts) >= 4


def test_a_closed_loop_counts_what_came_in_its_time(generator: Generator) -> None:
    with _JpegServer(delay=lambda chunk: 0.02) as server:
        seen = generator.flat_out(Triton(server.url), SHORT)
    assert seen.frames_per_s == pytest.approx(clock.CHUNK_FRAMES * len(seen.chunk_ms) / SHORT.seconds)
    assert 0 < len(seen.first_frame_ms) < len(seen.chunk_ms)
    assert seen.chunk_ms.min() >= 20


def test_a_closed_loop_ends_with_the_first_error(generator: Generator) -> None:
    def script(chunk: int, before: int, context: Any) -> None:
        context.abort(grpc.StatusCode.NOT_FOUND, "nobody")

    with _JpegServer(script=script) as server, pytest.raises(ExceptionGroup) as raised:
        generator.flat_out(Triton(server.url), SHORT)
    assert "NOT_FOUND" in str(raised.value.exceptions[0])


def test_the_real_server_carries_a_paced_stream(server: Server, generator: Generator) -> None:
    load = Load(2, ("red", "green"), size=64, seconds=0.9, chunks=4, kinds=("speaking", "silent", "listening"))
    seen = generator.paced(Triton(server.grpc_url), load)
    assert not seen.failed_ms
    assert Summary.of(seen.playouts).frames > 0
    assert bytes(len(SILENCE)) == SILENCE
