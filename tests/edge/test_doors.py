"""What the server opens to those who reach it without the edge: nothing that changes it."""

import http.client
from collections.abc import Iterator
from pathlib import Path

import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from talksplat import cli, tenants
from talksplat.server import HOST, Ports, Server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.grpc_url) as client:
        yield client


@pytest.mark.parametrize(
    ("door", "arguments"),
    [
        ("get_model_repository_index", ()),
        ("load_model", ("animate",)),
        ("unload_model", ("animate",)),
        ("get_system_shared_memory_status", ()),
        ("register_system_shared_memory", ("region", "/region", 64)),
        ("unregister_system_shared_memory", ()),
        ("get_cuda_shared_memory_status", ()),
        ("unregister_cuda_shared_memory", ()),
        ("get_trace_settings", ()),
        ("update_trace_settings", ("animate", {"trace_level": "TIMESTAMPS"})),
        ("get_log_settings", ()),
        ("update_log_settings", ({"log_verbose_level": 1},)),
    ],
)
def test_grpc_does_not_let_anybody_control_the_server(
    client: triton.InferenceServerClient, door: str, arguments: tuple[object, ...]
) -> None:
    with pytest.raises(InferenceServerException, match="restricted") as caught:
        getattr(client, door)(*arguments)
    assert "0x" not in str(caught.value)
    assert client.is_model_ready("animate")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("POST", f"/v2/repository/{path}") for path in ("index", "models/animate/load", "models/animate/unload")),
        *(("GET", f"/v2/{kind}sharedmemory/status") for kind in ("system", "cuda")),
        ("POST", "/v2/systemsharedmemory/region/r/register"),
        *((method, path) for method in ("GET", "POST") for path in ("/v2/trace/setting", "/v2/logging")),
        ("POST", "/v2/models/animate/trace/setting"),
    ],
)
def test_http_does_not_let_anybody_control_the_server(server: Server, method: str, path: str) -> None:
    connection = http.client.HTTPConnection(HOST, server.ports.http, timeout=10)
    connection.request(method, path, body="{}" if method == "POST" else None)
    response = connection.getresponse()
    assert response.status == http.HTTPStatus.FORBIDDEN
    assert b"restricted" in response.read()
    connection.close()


def test_what_only_tells_stays_open_on_the_loopback(client: triton.InferenceServerClient) -> None:
    assert client.get_inference_statistics("rasterizer").model_stats
    assert client.get_model_config("animate").config.name == "animate"


def test_the_key_command_prints_a_key_and_the_hash_that_the_file_wants(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["key", "--tenant", "acme"]) == 0
    key, _, rest = capsys.readouterr().out.partition("\n")
    table = rest[rest.index("[tenants.acme]") :]
    limits = 'avatars = ["ava"]\nstreams = 1\nrequests_per_second = 9'
    owner = tenants.Tenants.parse(f"streams = 1\n{table}\n{limits}").of_key(key)
    assert owner is not None
    assert owner.name == "acme"


def test_the_key_command_refuses_a_name_that_no_tenant_can_have(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["key", "--tenant", "a b"]) == 1
    assert "'a b' is no tenant's name" in capsys.readouterr().err


def test_a_broken_tenants_file_stops_the_start_in_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text("streams = 0\n[tenants]\n")
    with pytest.raises(tenants.TenantsError, match="streams of the file is 0, expected a whole number of at least 1"):
        Server(tenants=file, ports=Ports.free()).start()
