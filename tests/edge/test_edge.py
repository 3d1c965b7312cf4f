"""The real nginx before two real servers, as `talksplat-server secure` starts them; with honest and other clients."""

import functools
import http.client
import json
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import page_files
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_avatar import write_avatar
from tritonclient.grpc import service_pb2, service_pb2_grpc
from waiting import wait_for

from talksplat import clock, edge, tenants
from talksplat.edge import Address, Edge, EdgeError, MissingNginxError
from talksplat.server import HOST, ROOT, Ports, Server
from talksplat.tenants import Tenants, TenantsFile

PATIENCE = 60  # seconds
LEASE_SECONDS = 2.0
FAILED_SECONDS = 3.0  # that nginx leaves out a replica which failed: fail_timeout
TESTS = {"x-talksplat-stream": "tests"}  # of all requests that don't name another
OPTIONS = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
SERVICE = "/inference.GRPCInferenceService"
MACHINE_STREAMS = 6
KEYS: dict[str, str] = {}  # by tenant


@pytest.fixture(scope="module")
def nginx() -> None:
    try:
        edge.find_nginx()
    except MissingNginxError as error:
        pytest.skip(str(error))


def write_tenants(path: Path, **limits: tuple[str, int, float]) -> None:
    """A tenant a keyword: its avatar, streams and requests a second."""
    lines = [f"streams = {MACHINE_STREAMS}", "[tenants]"]
    for name, (avatar, streams, rate) in limits.items():
        if name not in KEYS:
            KEYS[name], _ = tenants.key()
        lines += [f"[tenants.{name}]", f'keys = ["{tenants.hash_of(KEYS[name])}"]', f'avatars = ["{avatar}"]']
        lines += [f"streams = {streams}", f"requests_per_second = {rate}"]
    path.write_text("\n".join(lines))


TENANTS = {
    "acme": ("red", 3, 500.0),
    "globex": ("green", 3, 500.0),
    "broad": ("*", 50, 500.0),
    "slow": ("red", 1, 2.0),
}


@dataclass
class Door:
    """The edge as a client sees it."""

    port: int
    certificate: Path

    @cached_property
    def channel(self) -> Any:
        return self.new_channel()

    def new_channel(self) -> Any:
        trusted = grpc.ssl_channel_credentials(self.certificate.read_bytes())
        return grpc.secure_channel(f"{HOST}:{self.port}", trusted, OPTIONS)

    def grpc(
        self,
        method: str,
        request: bytes = b"",
        *,
        tenant: str | None = "acme",
        headers: Mapping[str, str] | None = None,
        channel: Any = None,
        timeout: float = 20,
        **options: Any,
    ) -> bytes:
        metadata = list((TESTS if headers is None else headers).items())
        if tenant is not None:
            metadata.append(("authorization", f"Bearer {KEYS[tenant]}"))
        call = (channel or self.channel).unary_unary(method)
        return bytes(call(request, metadata=metadata, timeout=timeout, **options))

    def infer(self, request: Any, **options: Any) -> Any:
        answer = self.grpc(f"{SERVICE}/ModelInfer", request.SerializeToString(), **options)
        return service_pb2.ModelInferResponse.FromString(answer)

    def refused(self, request: Any, **options: Any) -> Any:
        with pytest.raises(grpc.RpcError) as caught:
            self.infer(request, **options)
        return caught.value

    @cached_property
    def tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.certificate))

    def http(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        tenant: str | None = "acme",
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Mapping[str, str], Any]:
        """Status, headers, and the body, which may be JSON."""
        connection = http.client.HTTPSConnection(HOST, self.port, timeout=20, context=self.tls)
        sent = dict(TESTS if headers is None else headers)
        if tenant is not None:
            sent["Authorization"] = f"Bearer {KEYS[tenant]}"
        connection.request(method, path, body, sent)
        response = connection.getresponse()
        text = response.read()
        connection.close()
        answered = {name.lower(): value for name, value in response.getheaders()}
        text = text[: int(answered.get("inference-header-content-length", len(text)))]
        return response.status, answered, json.loads(text) if text.startswith(b"{") else text


@dataclass
class Secure(Door):
    """The command, and what it runs."""

    run_dir: Path
    process: subprocess.Popen[bytes]
    output: Path
    tenants_file: Path

    def children(self, name: str) -> list[psutil.Process]:
        return [child for child in psutil.Process(self.process.pid).children() if name in child.name()]

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "edge" / "access.log").read_text().splitlines()]

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, f"{what} within {PATIENCE} s: {self.output.read_text()}"
            time.sleep(0.05)

    def is_healthy(self) -> bool:
        try:
            return self.http("GET", "/healthz", tenant=None)[0] == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False


@pytest.fixture(scope="module")
def secure(nginx: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    folder = tmp_path_factory.mktemp("secure")
    for avatar_id in ("red", "green"):
        write_avatar(folder / "avatars", avatar_id)
    file = folder / "tenants.toml"
    write_tenants(file, **TENANTS)
    run_dir, output, port = folder / "run", folder / "output.txt", Ports.free().http
    command = [sys.executable, "-m", "talksplat.cli", "secure", "--replicas", "2", "--free-ports"]
    command += [f"--port={port}", f"--avatars={folder / 'avatars'}", f"--tenants={file}", f"--run-dir={run_dir}"]
    with output.open("wb") as written:
        process = subprocess.Popen(command, cwd=ROOT, stdout=written, stderr=subprocess.STDOUT)
    found = Secure(port, run_dir / "certificate.pem", run_dir, process, output, file)
    try:
        found.wait_until(lambda: "Serving" in output.read_text(), "it serves")
        yield found
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert output.read_text().endswith("Stopped.\n")
        assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    finally:
        if process.poll() is None:
            process.kill()


def chunk(avatar: str = "red", model: str = "animate", **parameters: str) -> Any:
    request = service_pb2.ModelInferRequest(model_name=model, id="a-stream-0")
    audio = np.zeros((1, clock.WINDOW), np.float32)
    if model == "animate":
        request.inputs.add(name="AUDIO", datatype="FP32", shape=audio.shape)
        request.raw_input_contents.append(audio.tobytes())
    name = avatar.encode()
    request.inputs.add(name="AVATAR", datatype="BYTES", shape=[1, 1])
    request.raw_input_contents.append(len(name).to_bytes(4, "little") + name)
    if "operation" not in parameters:
        request.inputs.add(name="FRAME_INDEX", datatype="INT64", shape=[1, 1])
        request.raw_input_contents.append(bytes(8))
    for key, value in parameters.items():
        request.parameters[key].string_param = value
    return request


def idle(avatar: str = "red") -> Any:
    return chunk(avatar, "rasterizer")


def operation(name: str, avatar: str = "") -> Any:
    return chunk(avatar, "rasterizer", operation=name)


def http_chunk(avatar: str = "red", **parameters: str) -> bytes:
    inputs = [
        {"name": "AUDIO", "datatype": "FP32", "shape": [1, clock.WINDOW], "data": [0.0] * clock.WINDOW},
        {"name": "AVATAR", "datatype": "BYTES", "shape": [1, 1], "data": [avatar]},
        {"name": "FRAME_INDEX", "datatype": "INT64", "shape": [1, 1], "data": [0]},
    ]
    outputs = [{"name": "SPEECH"}, {"name": "FRAMES", "parameters": {"binary_data": True}}]
    return json.dumps({"inputs": inputs, "outputs": outputs, "parameters": parameters}).encode()


def stream(name: str) -> dict[str, str]:
    return {"x-talksplat-stream": name}


def retry_after(error: Any) -> str:
    return str({**dict(error.initial_metadata() or ()), **dict(error.trailing_metadata() or ())}["retry-after"])


# What honest clients get


def test_a_tenant_is_served_over_grpc_and_http_on_one_port(secure: Secure) -> None:
    frames = b"".join(secure.infer(chunk()).raw_output_contents)
    assert frames.count(b"\xff\xd8\xff") == clock.CHUNK_FRAMES
    status, _, answer = secure.http("POST", "/v2/models/animate/infer", http_chunk())
    assert status == http.HTTPStatus.OK, answer
    assert {output["name"] for output in answer["outputs"]} == {"SPEECH", "FRAMES"}


def test_the_page_is_served_without_a_key_and_nothing_beside_it(secure: Secure) -> None:
    page_files.check(lambda method, path, headers: secure.http(method, path, tenant=None, headers=headers))
    for path in ("/nothing", "/package.json", "/v2/models/vad/infer", "/v2/models/tts/infer"):
        assert secure.http("GET", path, tenant=None)[0] == http.HTTPStatus.UNAUTHORIZED, path


def test_speech_is_detected_for_a_tenant(secure: Secure) -> None:
    audio = {"name": "AUDIO", "datatype": "FP32", "shape": [1, clock.WINDOW], "data": [0.0] * clock.WINDOW}
    status, _, answer = secure.http("POST", "/v2/models/vad/infer", json.dumps({"inputs": [audio]}).encode())
    assert (status, len(answer["outputs"][0]["data"])) == (http.HTTPStatus.OK, clock.CHUNK_FRAMES)


def test_the_clock_and_health_can_be_read(secure: Secure) -> None:
    request = service_pb2.ModelConfigRequest(name="animate").SerializeToString()
    answer = service_pb2.ModelConfigResponse.FromString(secure.grpc(f"{SERVICE}/ModelConfig", request))
    assert answer.config.parameters["sample_rate"].string_value == str(clock.SAMPLE_RATE)
    assert secure.http("GET", "/v2/models/animate/config")[2]["name"] == "animate"
    assert service_pb2.ServerReadyResponse.FromString(secure.grpc(f"{SERVICE}/ServerReady")).ready
    ready = service_pb2.ModelReadyRequest(name="animate").SerializeToString()
    assert service_pb2.ModelReadyResponse.FromString(secure.grpc(f"{SERVICE}/ModelReady", ready)).ready
    assert secure.http("GET", "/v2/health/ready")[0] == http.HTTPStatus.OK
    secure.wait_until(secure.is_healthy, "a canary has been answered")


def test_a_request_is_logged_with_its_id_and_tenant(secure: Secure) -> None:
    request = chunk()
    request.id = "logged-40"
    secure.infer(request, headers=stream("logged"))
    secure.wait_until(lambda: any(line["id"] == "logged-40" for line in secure.log()), "the request is logged")
    (line,) = [line for line in secure.log() if line["id"] == "logged-40"]
    assert (line["tenant"], line["model"], line["stream"], line["status"]) == ("acme", "animate", "logged", 200)
    assert line["grpc_status"] == "0"
    assert 0 < line["seconds"] < PATIENCE


# Keys


@pytest.mark.parametrize("value", [None, "", "Bearer ", "Bearer wrong", "Basic wrong", "hash", "two"])
def test_without_the_right_key_nothing_is_served(secure: Secure, value: str | None) -> None:
    if value == "hash":  # what is written down opens nothing
        value = f"Bearer {tenants.hash_of(KEYS['acme'])}"
    elif value == "two":
        value = f"Bearer {KEYS['acme']} {KEYS['globex']}"
    headers = {} if value is None else {"authorization": value}
    error = secure.refused(chunk(), tenant=None, headers=headers)
    assert error.code() == grpc.StatusCode.UNAUTHENTICATED
    assert "API key" in error.details()
    for path in ("/v2/models/animate/infer", "/v2/models/vad/infer", "/nothing"):
        status, answered, answer = secure.http("POST", path, http_chunk(), tenant=None, headers=headers)
        assert status == http.HTTPStatus.UNAUTHORIZED
        assert answered["www-authenticate"] == "Bearer"
        assert "API key" in answer["error"]


def test_keys_are_in_no_file_and_no_command_line(secure: Secure) -> None:
    secure.infer(chunk())
    secure.http("GET", f"/v2/health/ready?key={KEYS['acme']}", tenant="globex")
    secure.refused(chunk(), tenant=None, headers={"authorization": f"Bearer {KEYS['acme']}x"})
    secure.wait_until(lambda: secure.log()[-1]["grpc_status"] == "16", "the refusal is logged")
    written = b"".join(path.read_bytes() for path in secure.run_dir.rglob("*") if path.is_file())
    written += secure.output.read_bytes()
    for process in [psutil.Process(secure.process.pid), *psutil.Process(secure.process.pid).children(recursive=True)]:
        written += " ".join([*process.cmdline(), *process.environ().values()]).encode()
    assert tenants.hash_of(KEYS["acme"]).encode() in written
    for key in KEYS.values():
        assert key.encode() not in written
    for name in ("certificate-key.pem", "edge/tenants", "edge/nginx.conf"):
        assert stat.S_IMODE((secure.run_dir / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(secure.run_dir.stat().st_mode) == 0o700


# Tenants


@pytest.mark.parametrize(
    "avatar", ["green", "nobody", "../green", "red/../green", "/etc/passwd", "..%2fgreen", "red\0", "", "*"]
)
def test_what_is_not_the_tenants_does_not_exist(secure: Secure, avatar: str) -> None:
    """Another tenant's avatar is answered exactly as none at all, whatever is asked of it."""
    for ask in (chunk, idle, functools.partial(operation, "preload"), functools.partial(operation, "unload")):
        error = secure.refused(ask(avatar))
        assert error.code() == grpc.StatusCode.NOT_FOUND, error
        if avatar == "green":
            assert error.details() == secure.refused(ask("nobody")).details().replace("nobody", avatar)
    answer = secure.http("POST", "/v2/models/animate/infer", http_chunk(avatar))
    assert re.search("there is no avatar|is no avatar id", answer[2]["error"], re.IGNORECASE)


def test_a_tenant_lists_its_own_avatars(secure: Secure) -> None:
    for tenant, own in (("acme", ["red"]), ("globex", ["green"]), ("broad", ["green", "red"])):
        report = secure.infer(operation("list"), tenant=tenant).raw_output_contents[0]
        assert [entry["id"] for entry in json.loads(report[4:])["avatars"]] == own


def test_a_shared_avatar_is_not_one_tenants_to_unload(secure: Secure) -> None:
    secure.infer(operation("preload", "red"))
    error = secure.refused(operation("unload", "red"))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "not yours alone" in error.details()


@pytest.mark.parametrize("header", ["x-talksplat-tenant", "X-Talksplat-Tenant", "x_talksplat_tenant"])
def test_a_tenant_header_of_the_client_is_overwritten(secure: Secure, header: str) -> None:
    forged = {**TESTS, header.lower(): "globex"}
    assert secure.refused(chunk("green"), headers=forged).code() == grpc.StatusCode.NOT_FOUND
    assert secure.infer(chunk("red"), headers=forged).raw_output_contents
    answer = secure.http("POST", "/v2/models/animate/infer", http_chunk("green"), headers={**TESTS, header: "globex"})
    assert "here is no avatar" in answer[2]["error"]
    assert secure.refused(chunk("green"), tenant=None, headers=forged).code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("name", ["x-talksplat-tenant", "X-Talksplat-Tenant"])
def test_a_tenant_as_a_request_parameter_is_refused(secure: Secure, name: str) -> None:
    for request in (chunk("green", **{name: "globex"}), operation("list")):
        request.parameters[name].string_param = "globex"
        error = secure.refused(request)
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "twice" in error.details()
    body = http_chunk("green", **{name: "globex"})
    status, _, answer = secure.http("POST", "/v2/models/animate/infer", body)
    assert status == http.HTTPStatus.BAD_REQUEST
    assert "twice" in answer["error"]


# Doors

OPEN = {"ModelInfer", "ServerReady", "ServerLive", "ModelReady", "ModelConfig"}


def test_of_tritons_grpc_only_inference_and_health_pass(secure: Secure) -> None:
    methods = {name for name in vars(service_pb2_grpc.GRPCInferenceServiceServicer) if name[0].isupper()}
    assert methods > OPEN
    others = [f"{SERVICE}/{name}" for name in sorted(methods - OPEN)]
    others += ["/grpc.health.v1.Health/Check", f"{SERVICE}/", f"{SERVICE}/ModelInfer/", f"{SERVICE}/modelinfer", "/x/y"]
    assert len(others) >= 18
    for method in others:
        with pytest.raises(grpc.RpcError) as caught:
            secure.grpc(method)
        assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED, method


@pytest.mark.parametrize(
    "path",
    [
        *("/v2", "/v2/", "/metrics", "/v2/models/stats", "/v2/models/animate", "/v2/models/animate/stats"),
        *("/v2/models/animate/versions/1/stats", "/v2/models/animate/versions/1/infer", "/v2/models/animate/generate"),
        *("/v2/repository/index", "/v2/repository/models/animate/load", "/v2/repository/models/animate/unload"),
        *("/v2/systemsharedmemory/status", "/v2/systemsharedmemory/region/r/register", "/v2/cudasharedmemory/status"),
        *("/v2/trace/setting", "/v2/models/animate/trace/setting", "/v2/logging", "/v2/health/", "/nginx_status"),
        *("/v2/models/asr/infer", "/v2/models/avatar/infer", "/v2/models/asr/config", "/v2/models/../metrics"),
        *("/v2/models/animate/../asr/infer", "/v2/models/animate/%2e%2e/asr/infer", "/v2/models/asr%2finfer"),
        *("//v2/models/stats", "/v2/models/animate/infer/", "/v2/models/ANIMATE/infer", "/v2/health/../models/stats"),
    ],
)
def test_of_tritons_http_only_inference_and_health_pass(secure: Secure, path: str) -> None:
    for method in ("GET", "POST", "PUT", "DELETE"):
        status, _, answer = secure.http(method, path, b"{}" if method == "POST" else None)
        assert status == http.HTTPStatus.FORBIDDEN, method
        assert answer == {"error": "This is not served here."}


@pytest.mark.parametrize("model", ["avatar", "deformation", "asr", "audio_encoder", "", "animate2", "VAD", "anim\0ate"])
def test_the_steps_inside_pipelines_cannot_be_asked_for(secure: Secure, model: str) -> None:
    request = chunk(model=model)
    assert secure.refused(request).code() == grpc.StatusCode.PERMISSION_DENIED
    twice = chunk().SerializeToString() + request.SerializeToString()  # the last of two names counts
    if model:
        with pytest.raises(grpc.RpcError) as caught:
            secure.grpc(f"{SERVICE}/ModelInfer", twice)
        assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    named = service_pb2.ModelConfigRequest(name=model).SerializeToString()
    with pytest.raises(grpc.RpcError) as caught:
        secure.grpc(f"{SERVICE}/ModelConfig", named)
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(
    "body", [b"\xff" * 30, b"\x0a\x7fanimate", b"\x0b", b"\x0a", b"\x08" + b"\x80" * 12, b"\x0d\0"]
)
def test_what_is_no_message_is_refused(secure: Secure, body: bytes) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        secure.grpc(f"{SERVICE}/ModelInfer", body)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=300), name=st.none() | st.text(max_size=20))
def test_any_bytes_are_answered_cleanly(secure: Secure, body: bytes, name: str | None) -> None:
    if name is not None:
        body = service_pb2.ModelInferRequest(model_name=name).SerializeToString() + body
    with pytest.raises(grpc.RpcError) as caught:
        secure.grpc(f"{SERVICE}/ModelInfer", body)
    assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED)


def test_what_is_packed_is_refused(secure: Secure) -> None:
    """A small packed request may unpack to any size."""
    error = secure.refused(chunk(), compression=grpc.Compression.Gzip)
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED
    headers = {"Content-Encoding": "gzip"}
    assert secure.http("POST", "/v2/models/animate/infer", http_chunk(), headers=headers)[0] == 415


@pytest.mark.parametrize(
    ("model", "size"),
    [("transcribe", 3 << 20), ("animate", 400_000), ("vad", 400_000), ("rasterizer", 5000), ("tts", 5000)],
)
def test_an_oversized_request_is_refused(secure: Secure, model: str, size: int) -> None:
    request = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=[bytes(size)])
    error = secure.refused(request)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "larger" in error.details()
    status, _, answer = secure.http("POST", f"/v2/models/{model}/infer", bytes(size))
    assert status == http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    assert "larger" in answer["error"]


def test_thirty_seconds_of_audio_are_not_oversized(secure: Secure) -> None:
    audio = np.zeros(30 * clock.SAMPLE_RATE, np.float32)
    request = service_pb2.ModelInferRequest(model_name="transcribe", raw_input_contents=[audio.tobytes()])
    request.inputs.add(name="AUDIO", datatype="FP32", shape=audio.shape)
    assert secure.infer(request).outputs[0].name == "TEXT"


def test_plain_http_is_refused_on_the_tls_port(secure: Secure) -> None:
    connection = http.client.HTTPConnection(HOST, secure.port, timeout=10)
    connection.request("GET", "/v2/health/ready", headers={"Authorization": f"Bearer {KEYS['acme']}"})
    response = connection.getresponse()
    assert response.status == http.HTTPStatus.BAD_REQUEST
    assert b"TLS only" in response.read()
    with grpc.insecure_channel(f"{HOST}:{secure.port}", OPTIONS) as channel:
        assert secure.refused(chunk(), channel=channel, timeout=5).code() == grpc.StatusCode.UNAVAILABLE


def test_old_tls_is_refused_and_the_server_does_not_say_its_version(secure: Secure) -> None:
    old = ssl.create_default_context(cafile=str(secure.certificate))
    old.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings(action="ignore"):
        old.minimum_version = ssl.TLSVersion.TLSv1
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection((HOST, secure.port), 10) as plain, pytest.raises(ssl.SSLError):
        old.wrap_socket(plain, server_hostname=HOST)
    assert secure.http("GET", "/nothing")[1]["server"] == "nginx"


@pytest.mark.parametrize("line", ["GET /../x", "GET /%zz", "GET /a%00b", "OPTIONS *", "get /", "GET x", "\0"])
def test_what_is_no_request_is_refused(secure: Secure, line: str) -> None:
    with socket.create_connection((HOST, secure.port), 10) as plain:
        asking = secure.tls.wrap_socket(plain, server_hostname=HOST)
        asking.sendall(f"{line} HTTP/1.1\r\nHost: edge\r\nConnection: close\r\n\r\n".encode())
        response = http.client.HTTPResponse(asking)
        response.begin()
        assert response.status == http.HTTPStatus.BAD_REQUEST
        assert json.loads(response.read()) == {"error": "This is no request that the edge understands."}


def test_slow_requests_are_dropped(secure: Secure) -> None:
    head = b"POST /v2/models/animate/infer HTTP/1.1\r\nHost: edge\r\n"
    body = head + f"Authorization: Bearer {KEYS['acme']}\r\nContent-Length: 9000\r\n\r\n{{".encode()

    def seconds(sent: bytes) -> float:
        with socket.create_connection((HOST, secure.port), 10) as plain:
            slow = secure.tls.wrap_socket(plain, server_hostname=HOST)
            slow.settimeout(PATIENCE)
            slow.sendall(sent)
            began = time.monotonic()
            while slow.recv(4096):
                pass
            return time.monotonic() - began

    with ThreadPoolExecutor() as pool:
        assert all(3 < each < 20 for each in pool.map(seconds, (head, body, b"")))
    assert secure.infer(chunk()).raw_output_contents


# Overload


def test_a_tenants_rate_is_limited(secure: Secure) -> None:
    begun = time.monotonic()
    statuses = []
    while time.monotonic() < begun + 1.2:
        statuses.append(secure.http("GET", "/v2/health/ready", tenant="slow"))
        time.sleep(0.02)
    refused = [each for each in statuses if each[0] == http.HTTPStatus.TOO_MANY_REQUESTS]
    assert 2 <= len(statuses) - len(refused) <= 2 * 3  # at most three seconds of the clock are touched
    assert refused[0][1]["retry-after"] == "1"
    assert secure.http("GET", "/v2/health/ready")[0] == http.HTTPStatus.OK  # others are not limited by it
    secure.wait_until(lambda: time.time() % 1 < 0.3, "a second begins")
    error = None
    for _ in range(3):
        try:
            secure.infer(operation("list"), tenant="slow")
        except grpc.RpcError as caught:
            error = caught
    assert error is not None
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert retry_after(error) == "1"


@pytest.mark.parametrize(("size", "then"), [(60_000, 200), (600_000, 429)])
def test_a_large_request_counts_as_several(secure: Secure, size: int, then: int) -> None:
    """So that what a tenant can have the edge decrypt is bounded too."""
    secure.wait_until(lambda: time.time() % 1 > 0.9, "a second ends")
    secure.wait_until(lambda: time.time() % 1 < 0.3, "another one begins")
    body = b" " * size
    assert (
        secure.http("POST", "/v2/models/tts/infer", body, tenant="slow")[0] == http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    )
    assert secure.http("GET", "/v2/health/ready", tenant="slow")[0] == then


def test_streams_are_let_in_while_there_is_room_and_leases_end(secure: Secure) -> None:
    time.sleep(LEASE_SECONDS + 0.2)  # other tests' streams are over
    for number in range(3):
        secure.infer(chunk(), headers=stream(f"acme-{number}"))
    error = secure.refused(chunk(), headers=stream("acme-3"))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "The tenant has as many streams" in error.details()
    assert retry_after(error) == "2"
    for number in range(3):
        secure.infer(chunk(), tenant="broad", headers=stream(f"broad-{number}"))
    began = time.monotonic()
    error = secure.refused(chunk("green"), tenant="globex", headers=stream("globex"))
    assert 1e3 * (time.monotonic() - began) < 1000
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "The machine has as many streams" in error.details()
    status, headers, answer = secure.http("POST", "/v2/models/animate/infer", http_chunk(), tenant="broad")
    assert (status, headers["retry-after"]) == (http.HTTPStatus.TOO_MANY_REQUESTS, "2")
    assert "machine" in answer["error"]
    secure.infer(operation("list"), tenant="globex", headers={})  # which belongs to no stream
    until = time.monotonic() + LEASE_SECONDS + 0.5
    while time.monotonic() < until:  # whoever is in stays in, as long as it sends
        secure.infer(chunk(), headers=stream("acme-0"))
        secure.infer(idle(), headers=stream("acme-1"))
        time.sleep(0.1)
    secure.infer(chunk("green"), tenant="globex", headers=stream("globex"))  # the others' leases have ended
    secure.infer(chunk(), headers=stream("acme-3"))
    assert secure.refused(chunk(), headers=stream("acme-2")).code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_connection_stands_for_a_stream_without_an_id(secure: Secure) -> None:
    time.sleep(LEASE_SECONDS + 0.2)
    channels = [secure.new_channel() for _ in range(4)]
    try:
        for _ in range(2):
            for channel in channels[:3]:
                secure.infer(chunk(), channel=channel, headers={})
        assert secure.refused(chunk(), channel=channels[3], headers={}).code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    finally:
        for channel in channels:
            channel.close()


@pytest.mark.parametrize("name", ["a b", "x" * 65, "a/b", "'", "é"])
def test_a_stream_id_of_other_characters_is_refused(secure: Secure, name: str) -> None:
    status, _, answer = secure.http(
        "POST", "/v2/models/animate/infer", http_chunk(), headers={"x-talksplat-stream": name}
    )
    assert status == http.HTTPStatus.BAD_REQUEST
    assert "x-talksplat-stream" in answer["error"]


# Faults and changes


def test_a_changed_tenants_file_is_followed(secure: Secure) -> None:
    write_tenants(secure.tenants_file, **{**TENANTS, "fresh": ("red", 1, 50.0)})
    ready = f"{SERVICE}/ServerReady"

    def code(tenant: str) -> object:
        try:
            secure.grpc(ready, tenant=tenant)
        except grpc.RpcError as error:
            return error.code()
        return None

    secure.wait_until(lambda: code("fresh") is None, "the new key is known")
    assert code("acme") is None
    broken = secure.tenants_file.read_text()
    secure.tenants_file.write_text(broken + "streams = [")
    time.sleep(2.5)
    assert code("fresh") is None  # nobody is locked out by a slip
    write_tenants(secure.tenants_file, **TENANTS)
    secure.wait_until(lambda: code("fresh") == grpc.StatusCode.UNAUTHENTICATED, "the key is revoked")


def test_when_a_replica_is_killed_the_next_one_answers(secure: Secure) -> None:
    time.sleep(FAILED_SECONDS + 0.2)  # no replica is still left out for what an earlier test has done to it
    victim = secure.children("triton")[0]
    for number in range(60):
        if number == 20:
            victim.kill()
        assert secure.infer(chunk()).raw_output_contents, number  # without a retry of the client's
    assert secure.is_healthy()
    secure.wait_until(lambda: len(secure.children("triton")) == 2, "the replica is started again")


@pytest.mark.parametrize("name", ["master", "worker"])
def test_nginx_is_back_when_it_was_killed(secure: Secure, name: str) -> None:
    (master,) = secure.children("nginx")
    victim = master if name == "master" else master.children()[0]
    victim.kill()
    if name == "master":  # its orphans serve on until they are ended
        secure.wait_until(lambda: "nginx ended with -9: started again." in secure.output.read_text(), "it is noticed")
    secure.wait_until(secure.is_healthy, "nginx is back")
    with secure.new_channel() as channel:
        secure.infer(chunk(), channel=channel)


@dataclass
class Alone(Door):
    """An edge without the command."""

    edge: Edge


@pytest.fixture
def alone(secure: Secure, tmp_path: Path) -> Iterator[Callable[..., Alone]]:
    """Starts an edge before given replicas."""
    started: list[Edge] = []

    def start(*replicas: Ports) -> Alone:
        address = Address(secure.certificate, secure.run_dir / "certificate-key.pem", port=Ports.free().http)
        made = Edge(secure.tenants_file, replicas, address, tmp_path / "edge")
        made.start()
        started.append(made)
        return Alone(address.port, secure.certificate, made)

    yield start
    for each in started:
        each.stop()


def test_without_a_replica_the_edge_says_so(alone: Callable[..., Alone]) -> None:
    door = alone(Ports.free())
    error = door.refused(chunk())
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert error.details() == "No replica answers."
    assert retry_after(error) == "1"
    assert door.http("POST", "/v2/models/animate/infer", http_chunk())[0] == http.HTTPStatus.SERVICE_UNAVAILABLE
    assert door.http("GET", "/healthz", tenant=None)[0] == http.HTTPStatus.SERVICE_UNAVAILABLE


def test_a_stream_whose_first_requests_come_at_once_takes_one_place(alone: Callable[..., Alone]) -> None:
    door = alone(Ports.free())  # nobody answers those that are let in
    channels = [door.new_channel() for _ in range(12)]  # for all of nginx's workers
    asked = [(channel, number) for number in range(MACHINE_STREAMS) for channel in channels]

    def code(asked: tuple[Any, int]) -> object:
        channel, number = asked
        return door.refused(idle(), tenant="broad", headers=stream(f"s-{number}"), channel=channel).code()

    with ThreadPoolExecutor(len(channels)) as pool:
        assert set(pool.map(code, asked)) == {grpc.StatusCode.UNAVAILABLE}
    assert code((channels[0], MACHINE_STREAMS)) == grpc.StatusCode.RESOURCE_EXHAUSTED
    for channel in channels:
        channel.close()


def test_a_replica_that_hangs_costs_two_seconds_once(alone: Callable[..., Alone], server: Server) -> None:
    with socket.socket() as hung:
        hung.bind((HOST, 0))
        hung.listen(64)
        port = hung.getsockname()[1]
        door = alone(Ports(port, port, port), server.ports)
        seconds = []
        for _ in range(6):
            began = time.monotonic()
            assert door.infer(chunk()).raw_output_contents
            seconds.append(time.monotonic() - began)
    slow = [each for each in seconds if each > 1.9]
    assert len(slow) == 1
    assert slow[0] < 10


def test_whatever_takes_the_port_of_a_dead_replica_is_not_asked(alone: Callable[..., Alone], server: Server) -> None:
    with socket.socket() as foreign:
        foreign.bind((HOST, 0))
        foreign.listen(64)
        foreign.setblocking(False)
        port = foreign.getsockname()[1]
        dead = Ports(port, port, port)
        door = alone(dead, server.ports)

        def hear(heard: Callable[[Ports], None]) -> None:
            """Tell the edge of a replica, and wait until its nginx goes by that."""
            master = psutil.Process(door.edge.pid)
            before = set(master.children())
            heard(dead)
            assert door.edge.look() is None
            wait_for(lambda: not before & set(master.children()))

        hear(door.edge.fell)
        for _ in range(6):
            assert door.infer(chunk()).raw_output_contents
        with pytest.raises(BlockingIOError):
            foreign.accept()
        hear(door.edge.passed)
        for _ in range(6):  # some of which it is asked first
            assert door.infer(chunk()).raw_output_contents
        foreign.accept()[0].close()


def test_a_tenant_can_not_fill_the_queue_of_a_model_that_takes_a_core(alone: Callable[..., Alone]) -> None:
    with socket.socket() as hung:  # answers nobody, so that what is let in stays under way
        hung.bind((HOST, 0))
        hung.listen(64)
        port = hung.getsockname()[1]
        door = alone(Ports(port, port, port))

        def code(model: str, tenant: str = "acme") -> object:
            return door.refused(chunk(model=model), tenant=tenant, timeout=0.3).code()

        def wait_until(condition: Callable[[], bool]) -> None:
            deadline = time.monotonic() + PATIENCE
            while not condition():
                assert time.monotonic() < deadline
                time.sleep(0.01)

        call = door.channel.unary_unary(f"{SERVICE}/ModelInfer")
        metadata = [("authorization", f"Bearer {KEYS['acme']}"), *TESTS.items()]
        body, places = chunk(model="tts").SerializeToString(), TENANTS["acme"][1] + 1
        asked = [call.future(body, metadata=metadata, timeout=PATIENCE) for _ in range(places + 2)]
        wait_until(lambda: sum(each.done() for each in asked) == 2)
        under_way = [each for each in asked if not each.done()]
        for error in (each.exception() for each in asked if each.done()):
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "as many requests to this model" in error.details()
            assert retry_after(error) == "1"
        for model, tenant in (("transcribe", "acme"), ("tts", "globex")):  # these wait for their answers
            assert code(model, tenant) == grpc.StatusCode.DEADLINE_EXCEEDED
        assert code("tts") == grpc.StatusCode.RESOURCE_EXHAUSTED
        under_way[0].cancel()
        wait_until(lambda: code("tts") == grpc.StatusCode.DEADLINE_EXCEEDED)  # there is room again
        for each in under_way:
            each.cancel()


def test_a_clock_that_is_set_back_leaves_no_stream_in_for_ever(
    alone: Callable[..., Alone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        pytest.skip("libfaketime is not installed")
    now = tmp_path / "now"
    now.write_text("+0")
    monkeypatch.setenv("LD_PRELOAD", str(library))
    kept = {"FAKETIME_TIMESTAMP_FILE": str(now), "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    source = shutil.copytree(edge.SOURCE, tmp_path / "source")
    template = source / "nginx.conf.template"  # nginx forgets its environment, but for what it is told to keep
    template.write_text("".join(f"env {name};\n" for name in kept) + template.read_text())
    monkeypatch.setattr(edge, "SOURCE", source)
    door = alone(Ports.free())  # nobody answers those that are let in

    def code(name: str) -> object:
        return door.refused(chunk(), tenant="slow", headers=stream(name)).code()

    assert code("first") == grpc.StatusCode.UNAVAILABLE
    assert code("second") == grpc.StatusCode.RESOURCE_EXHAUSTED
    now.write_text("-3600")
    time.sleep(LEASE_SECONDS + 0.5)
    assert code("second") == grpc.StatusCode.UNAVAILABLE


# Without nginx


def test_a_missing_nginx_is_named_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "MODULES", tmp_path)
    file = tmp_path / "tenants.toml"
    write_tenants(file)
    with pytest.raises(MissingNginxError, match="apt install nginx-light libnginx-mod-http-lua"):
        Edge(file, [Ports()], Address(tmp_path, tmp_path), tmp_path)


def test_a_first_tenants_file_holds_the_keys_hash_only(tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    made = edge.make_tenants(file)
    owner = Tenants.read(file).of_key(made)
    assert owner is not None
    assert owner.may_use("anything")
    assert made not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert edge.hashes(TenantsFile(file).tenants) == f"streams 8\n{tenants.hash_of(made)} first 8 200.0\n"


def test_a_broken_certificate_stops_the_start_in_a_sentence(nginx: None, tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    write_tenants(file)
    (tmp_path / "c.pem").write_text("none")
    broken = Edge(file, [Ports()], Address(tmp_path / "c.pem", tmp_path / "c.pem", port=Ports.free().http), tmp_path)
    with pytest.raises(EdgeError, match=r"does not start, it ended with 1:\n.*c\.pem"):
        broken.start()
    assert broken.pid is None
