"""The page without keys: the real nginx of `talksplat-server web` before the real server. tests/web has the browser."""

import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import page_files
import pytest

from talksplat import cli, clock, edge, web
from talksplat.edge import EdgeError, MissingNginxError
from talksplat.server import HOST, ROOT, PortInUseError, Ports, Server
from talksplat.web import Page, PublicAddressError

FOREIGN = [
    *("http://evil.example", "https://127.0.0.1", "http://127.0.0.1", "http://127.0.0.1:1", "null"),
    *("http://localhost", "http://127.0.0.1.evil.example", "http://127.0.0.1:{port}.evil.example"),
]


class Visitor:
    def __init__(self, port: int) -> None:
        self.port = port

    def ask(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> tuple[int, Mapping[str, str], Any]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=20)
        connection.request(method, path, body, dict(headers))
        response = connection.getresponse()
        text = response.read()
        connection.close()
        answered = {name.lower(): value for name, value in response.getheaders()}
        return response.status, answered, json.loads(text) if text.startswith(b"{") else text

    def infer(self, model: str, body: bytes, **headers: str) -> tuple[int, Mapping[str, str], Any]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.ask("POST", f"/v2/models/{model}/infer", named, body)


@pytest.fixture(scope="module")
def visitor(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visitor]:
    port = Ports.free().http
    try:
        page = Page(server.ports, HOST, port, tmp_path_factory.mktemp("page"))
    except MissingNginxError as error:
        pytest.skip(str(error))
    page.start()
    yield Visitor(port)
    page.stop()


def window() -> bytes:
    audio = {"name": "AUDIO", "datatype": "FP32", "shape": [1, clock.WINDOW], "data": [0.0] * clock.WINDOW}
    return json.dumps({"inputs": [audio]}).encode()


def test_the_page_is_served(visitor: Visitor) -> None:
    page_files.check(visitor.ask)


def test_models_answer_without_a_key(visitor: Visitor) -> None:
    status, _, answer = visitor.infer("vad", window(), origin=f"http://{HOST}:{visitor.port}")
    assert status == 200, answer
    assert np.shape(answer["outputs"][0]["data"]) == (clock.CHUNK_FRAMES,)
    parameters = visitor.ask("GET", "/v2/models/animate/config", {})[2]["parameters"]
    assert parameters["sample_rate"]["string_value"] == str(clock.SAMPLE_RATE)
    assert visitor.ask("GET", "/v2/health/ready", {})[0] == 200
    assert visitor.ask("GET", "/v2/health/ready", {"Host": f"localhost:{visitor.port}"})[0] == 200


def test_what_may_be_asked_is_what_the_edge_lets_through() -> None:
    models = web.models()
    assert set(models) == {
        *("animate", "animate_huma1", "rasterizer", "vad", "transcribe", "tts", "speech_to_animation"),
    }
    assert set(models) <= {folder.name for folder in (ROOT / "model_repository").iterdir()}
    assert models["transcribe"] >= clock.MAX_UTTERANCE_SECONDS * clock.SAMPLE_RATE * 4
    assert models["rasterizer"] == 4096


@pytest.mark.parametrize(
    "path",
    [
        *("/v2", "/v2/", "/metrics", "/v2/models/stats", "/v2/models/animate", "/v2/models/animate/stats"),
        *("/v2/models/animate/versions/1/infer", "/v2/models/animate/generate", "/v2/models/ANIMATE/infer"),
        *("/v2/repository/index", "/v2/repository/models/animate/load", "/v2/systemsharedmemory/status"),
        *("/v2/trace/setting", "/v2/logging", "/v2/models/avatar/infer", "/v2/models/asr/config", "/nothing"),
        *("/v2/models/animate/../avatar/infer", "/v2/models/animate%2finfer%2f..", "/inference.GRPCInferenceService/x"),
    ],
)
def test_nothing_else_of_triton_is_open(visitor: Visitor, path: str) -> None:
    for method in ("GET", "POST", "PUT", "DELETE"):
        status, headers, answer = visitor.ask(method, path, {}, b"{}" if method == "POST" else None)
        assert (status, headers["content-type"]) == (403, "application/json"), method
        assert answer == {"error": "This is not served here."}


def test_each_door_has_its_method(visitor: Visitor) -> None:
    for method in ("GET", "PUT", "DELETE"):
        assert visitor.ask(method, "/v2/models/vad/infer", {})[0] == 403
    for path in ("/v2/models/vad/config", "/v2/models/vad/ready", "/v2/health/live"):
        assert visitor.ask("POST", path, {}, b"{}")[0] == 403


@pytest.mark.parametrize("model", sorted(web.models()))
def test_a_request_that_is_too_large_is_refused(visitor: Visitor, model: str) -> None:
    status, _, answer = visitor.infer(model, bytes(web.models()[model] + 1))
    assert (status, answer) == (413, {"error": "The request is larger than this model takes."})


def test_what_is_packed_is_refused(visitor: Visitor) -> None:
    assert visitor.infer("vad", window(), content_encoding="gzip")[0] == 415


@pytest.mark.parametrize("origin", FOREIGN)
def test_a_page_of_another_origin_can_ask_for_nothing(visitor: Visitor, origin: str) -> None:
    origin = origin.format(port=visitor.port)
    assert visitor.infer("vad", window(), origin=origin)[0] == 403
    assert visitor.ask("OPTIONS", "/v2/models/vad/infer", {"Origin": origin})[0] == 403


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "192.168.0.1", "_"])
def test_a_name_that_leads_here_opens_nothing(visitor: Visitor, host: str) -> None:
    """A website may have its own name lead to the loopback, and would be of one origin with the page then."""
    for path in ("/", "/v2/models/animate/config"):
        status, _, answer = visitor.ask("GET", path, {"Host": host})
        assert (status, answer) == (421, {"error": f"This page is at http://{HOST}:{visitor.port}."})


def test_only_the_loopback_is_listened_on(visitor: Visitor) -> None:
    for family, _, _, _, address in socket.getaddrinfo(socket.gethostname(), visitor.port, type=socket.SOCK_STREAM):
        if not str(address[0]).startswith(("127.", "::1")):
            with socket.socket(family) as probe:
                probe.settimeout(1)
                assert probe.connect_ex(address) != 0


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.1", "::", "::1", "localhost", "example.org", ""])
def test_another_address_than_the_loopbacks_is_refused(host: str, tmp_path: Path) -> None:
    with pytest.raises(PublicAddressError, match=r"expected an address of this machine alone.*secure"):
        Page(Ports(), host, 1, tmp_path)


def test_the_command_says_why_it_does_not_serve(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["web", "--host", "0.0.0.0", "--run-dir", str(tmp_path)]) == 1
    assert "talksplat-server: --host is 0.0.0.0, expected an address of this machine alone" in capfd.readouterr().err


def test_a_server_that_is_away_is_said_to_be(visitor: Visitor, tmp_path: Path) -> None:
    port = Ports.free().http
    page = Page(Ports.free(), HOST, port, tmp_path)
    page.start()
    status, headers, answer = Visitor(port).infer("vad", window())
    page.stop()
    assert (status, answer) == (503, {"error": "No server answers."})
    assert headers["retry-after"] == "1"


def test_a_port_that_is_taken_is_named(visitor: Visitor, tmp_path: Path) -> None:
    with pytest.raises(PortInUseError, match=f"{HOST}:{visitor.port} can't be used .*--port"):
        Page(Ports(), HOST, visitor.port, tmp_path).start()


def test_a_missing_nginx_is_named_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(MissingNginxError, match=r"^nginx is not installed: apt install nginx-light\.$"):
        Page(Ports(), HOST, 1, tmp_path)


def test_the_page_needs_no_lua_module(visitor: Visitor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "MODULES", tmp_path)
    Page(Ports(), HOST, 1, tmp_path)
    assert "load_module" not in (edge.SOURCE / "web.conf.template").read_text()


def test_a_configuration_that_nginx_refuses_is_shown(
    visitor: Visitor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "models", lambda: {"animate": "much"})
    with pytest.raises(EdgeError, match=r"nginx does not start, it ended with 1:\n.*client_max_body_size"):
        Page(Ports(), HOST, Ports.free().http, tmp_path).start()
