"""The examples: short, and run where what they need can be had here."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp
import av
import numpy as np
import pytest
import soxr
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from presence import loud, wait_until
from webrtc_viewer import Viewer

from talksplat.server import Ports, Server
from talksplat_client import read_audio

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "client" / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 40


@pytest.mark.parametrize(("name", "entry"), [("livekit_agent", "talk"), ("pipecat_bot", "bot")])
def test_an_example_that_needs_a_service_elsewhere_loads(name: str, entry: str) -> None:
    pytest.importorskip("fastapi")  # Pipecat's runner
    assert callable(getattr(example(name), entry))


def test_the_client_needs_none_of_the_frameworks() -> None:
    optional = {"livekit", "pipecat", "aiortc", "aiohttp", "openai", "av", "soxr"}
    code = f"import sys, talksplat_client; print(*{optional} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


class SpeechApi(BaseHTTPRequestHandler):
    """``POST /v1/audio/speech`` as OpenAI documents it: JSON in, sound out, in chunks while it is made."""

    protocol_version = "HTTP/1.1"
    pcm = b""  # 24 kHz
    asked: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path != "/v1/audio/speech" or self.headers["authorization"] != "Bearer a-key":
            self.send_error(404)
            return
        if not {"model", "input", "voice"} <= body.keys() or body.get("response_format") != "pcm":
            self.send_error(400)
            return
        self.asked.append(body)
        self.send_response(200)
        self.send_header("content-type", "audio/pcm")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for begin in range(0, len(self.pcm), 3_001):  # which cuts samples in half
            piece = self.pcm[begin : begin + 3_001]
            self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def speech_api(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[SpeechApi]]:
    recording = read_audio(ROOT / "demo" / "speech.wav")
    samples = soxr.resample(np.concatenate(list(recording.packets)), recording.sample_rate, 24_000)[: 2 * 24_000]
    SpeechApi.pcm = (32767 * np.clip(samples, -1, 1)).astype("<i2").tobytes()
    SpeechApi.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), SpeechApi) as api:
        thread = threading.Thread(target=api.serve_forever)
        thread.start()
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{api.server_port}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "a-key")
        yield SpeechApi
        api.shutdown()
        thread.join()


def test_a_voice_behind_openais_api_speaks_through_an_avatar(
    server: Server, speech_api: type[SpeechApi], tmp_path: Path
) -> None:
    film = tmp_path / "out.mp4"
    example("openai_speech").main("Hello there.", str(film), server.grpc_url, "red")
    [asked] = speech_api.asked
    assert (asked["input"], asked["response_format"]) == ("Hello there.", "pcm")
    with av.open(str(film)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 50
    with av.open(str(film)) as container:
        sound = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    assert sound.size / 48_000 == pytest.approx(2, abs=0.1)
    assert np.abs(sound).max() > 0.1


async def test_a_browsers_words_are_spoken_over_webrtc(server: Server) -> None:
    runner = web.AppRunner(await example("webrtc_server").main(server.grpc_url))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    [address] = runner.addresses
    url = f"http://127.0.0.1:{address[1]}"
    viewer = Viewer()
    words = viewer.connection.createDataChannel("words")
    async with aiohttp.ClientSession() as session:
        async with session.get(url) as response:
            assert "RTCPeerConnection" in await response.text()
            assert response.content_type == "text/html"
        async with session.post(f"{url}/offer", json=await viewer.offer()) as response:
            answer = await response.json()
    assert "H264/90000" in answer["sdp"]
    await viewer.accept(answer)
    await wait_until(lambda: words.readyState == "open" and len(viewer.pictures) > 3)
    assert not loud(viewer.sounds)
    words.send("You are welcome.")  # a prepared sentence
    await wait_until(lambda: len(loud(viewer.sounds)) > 3)
    await viewer.close()
    await runner.cleanup()


async def test_a_browser_is_told_that_there_is_no_server() -> None:
    app = await example("webrtc_server").main(f"127.0.0.1:{Ports.free().grpc}")
    async with TestClient(TestServer(app)) as browser, browser.post("/offer", json={}) as response:
        assert (response.status, "no talksplat server answers" in await response.text()) == (502, True)
