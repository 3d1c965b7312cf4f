"""API keys and certificates: who asks, and over which wire."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted_server import ScriptedServer

from talksplat_client import (
    AsyncClient,
    Client,
    InvalidRequestError,
    Retry,
    ServerUnavailableError,
    TalksplatError,
    Timeout,
    Tls,
    TlsError,
    cli,
)

KEY = "tsk_0123456789abcdef"
SILENCE = np.zeros(8_000, np.float32)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Make a self-signed certificate for a subject alternative name; its key lies beside it as ``.key``."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificates, is not installed")
    folder = tmp_path_factory.mktemp("certificates")

    def make(name: str) -> Path:
        path = folder / f"{re.sub('[^a-z0-9]', '-', name.lower())}.pem"
        if not path.exists():
            command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
            command += ["-days", "2", "-subj", "/CN=test", "-addext", f"subjectAltName={name}"]
            command += ["-out", str(path), "-keyout", str(path.with_suffix(".key"))]
            subprocess.run(command, check=True, capture_output=True)
        return path

    return make


def serving(path: Path) -> ScriptedServer:
    return ScriptedServer(certificate=(path.with_suffix(".key").read_bytes(), path.read_bytes()))


async def _list_asynchronously(url: str, **options: Any) -> None:
    async with AsyncClient(url, **options) as client:
        await client.avatars()


def _list(url: str, **options: Any) -> None:
    with Client(url, **options) as client:
        client.avatars()


@pytest.fixture(params=["blocking", "asyncio"])
def ask(request: pytest.FixtureRequest) -> Callable[..., None]:
    """One request through a fresh client with these options."""
    if request.param == "blocking":
        return _list
    return lambda url, **options: asyncio.run(_list_asynchronously(url, **options))


def test_the_key_goes_with_every_request_and_stays_out_of_sight(certificate: Callable[[str], Path]) -> None:
    own = certificate("IP:127.0.0.1")
    with serving(own) as server, Client(server.url, api_key=KEY, tls=Tls(own)) as client:
        client.preload("ava")
        client.health()
        stream = client.animate(SILENCE, avatar="ava")
        assert len(list(stream)) == 13
        assert {asked.metadata["authorization"] for asked in server.asked} == {f"Bearer {KEY}"}
        with pytest.raises(TalksplatError) as caught:
            client.preload("eve")
    for seen in (repr(client), repr(stream), repr(vars(client)), str(caught.value), repr(caught.value)):
        assert KEY not in seen


@pytest.mark.parametrize("key", ["", "two words", "line\nbreak", "schlüssel"])
def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(InvalidRequestError, match="API key") as caught:
        Client(api_key=key)
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize("url", ["talk.example:443", "10.1.2.3:8001", "[2001:db8::1]:8001"])
def test_a_key_does_not_leave_the_machine_in_the_clear(url: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"in the clear: expected tls=Tls\(\)") as caught:
        Client(url, api_key=KEY)
    assert KEY not in str(caught.value)
    Client(url, api_key=KEY, tls=Tls()).close()
    for local in ("localhost:8001", "127.0.0.1:8001", "[::1]:8001"):
        Client(local, api_key=KEY).close()


@pytest.mark.parametrize(
    ("served", "believed", "reason"),
    [
        ("IP:127.0.0.1", None, r"not trusted \(self.signed certificate\)"),
        ("IP:127.0.0.1", "IP:127.0.0.1,DNS:another", "not trusted"),
        ("DNS:talk.example", "DNS:talk.example", "for another name"),
        (None, "IP:127.0.0.1", "does not speak TLS"),
    ],
    ids=["unknown authority", "other authority", "other name", "no TLS"],
)
def test_a_wrong_certificate_is_an_error_of_its_own_and_not_tried_again(
    ask: Callable[..., None],
    certificate: Callable[[str], Path],
    served: str | None,
    believed: str | None,
    reason: str,
) -> None:
    tls = Tls(certificate(believed) if believed else None)
    with serving(certificate(served)) if served else ScriptedServer() as server:
        with pytest.raises(TlsError, match=f"no secure connection to {server.url}: .*{reason}"):
            ask(server.url, tls=tls, retry=Retry(first=60, longest=60))
        assert server.count == 0


def test_a_client_without_tls_gets_nothing_from_a_server_with_it(
    ask: Callable[..., None], certificate: Callable[[str], Path]
) -> None:
    with serving(certificate("IP:127.0.0.1")) as server, pytest.raises(ServerUnavailableError):
        ask(server.url, timeout=Timeout(connect=1))


def test_who_comes_without_tls_to_nginx_learns_what_is_missing(ask: Callable[..., None]) -> None:
    refusal = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as door:

        def answer() -> None:
            with contextlib.suppress(OSError):  # the door is closed
                while True:
                    visitor, _ = door.accept()
                    with visitor:
                        visitor.recv(4096)
                        visitor.sendall(refusal)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(ServerUnavailableError, match="without TLS: see --tls, --ca"):
            ask(f"127.0.0.1:{door.getsockname()[1]}", timeout=Timeout(connect=1))


def test_a_ca_file_that_is_none_is_refused_at_once(tmp_path: Path) -> None:
    junk = tmp_path / "junk.pem"
    for content in (b"hello", b"\xff\xfe", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
        junk.write_bytes(content)
        with pytest.raises(InvalidRequestError, match=r"junk\.pem holds no PEM certificate"):
            Client(tls=Tls(junk))
    with pytest.raises(InvalidRequestError, match=r"none\.pem can't be read: No such file"):
        AsyncClient(tls=Tls(tmp_path / "none.pem"))


@pytest.mark.parametrize("source", ["environment", "file"])
def test_the_command_takes_the_key_from_where_nobody_sees_it(
    certificate: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: str,
) -> None:
    own = certificate("IP:127.0.0.1")
    options = ["--ca", str(own)]
    if source == "environment":
        monkeypatch.setenv(cli.API_KEY, KEY)
    else:
        monkeypatch.setenv(cli.API_KEY, "another")
        (tmp_path / "key").write_text(f"{KEY}\n")
        options += ["--api-key-file", str(tmp_path / "key")]
    with serving(own) as server:
        assert cli.main(["avatars", "--url", server.url, *options]) == 0
        assert [asked.metadata["authorization"] for asked in server.asked] == [f"Bearer {KEY}"]
        assert cli.main(["avatars", "--url", server.url, "--tls"]) == 1
    assert re.search(r"^talksplat: no secure connection to .* not trusted", capsys.readouterr().err, re.MULTILINE)
