from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import tritonclient.grpc as triton
from make_avatar import write_avatar

from loadtests.plain import PlainServer
from loadtests.streams import Generator, Load, windows
from talksplat import clock
from talksplat.server import HOST, Server


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlainServer]:
    avatars = tmp_path_factory.mktemp("plain")
    for avatar_id in ("red", "green"):
        write_avatar(avatars, avatar_id)
    with PlainServer(avatars) as server:
        yield server


def post(server: PlainServer, path: str, body: bytes) -> tuple[int, bytes, str | None]:
    connection = HTTPConnection(HOST, server.port, timeout=20)
    connection.request("POST", path, body)
    response = connection.getresponse()
    found = response.status, response.read(), response.getheader("x-frame-bytes")
    connection.close()
    return found


def test_the_plain_server_draws_what_ours_draws(plain: PlainServer, server: Server) -> None:
    window = windows()[7]
    status, body, lengths = post(plain, "/animate?avatar=red&frame_index=8&size=64&seed=3", window)
    assert status == 200
    ends = np.cumsum([int(each) for each in (lengths or "").split(",")])
    theirs = [body[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]

    with triton.InferenceServerClient(server.grpc_url) as client:
        inputs = {
            "AUDIO": np.frombuffer(window, np.float32)[None],
            "AVATAR": np.array([[b"red"]], np.object_),
            "FRAME_INDEX": np.array([[8]], np.int64),
        }
        tensors = [
            triton.InferInput(name, array.shape, kind).set_data_from_numpy(array)
            for (name, array), kind in zip(inputs.items(), ("FP32", "BYTES", "INT64"), strict=True)
        ]
        ours = client.infer("animate", tensors, parameters={"size": 64, "seed": 3}).as_numpy("FRAMES")[0]
    assert len(theirs) == clock.CHUNK_FRAMES
    for mine, plainly in zip(ours, theirs, strict=True):
        difference = np.abs(simplejpeg.decode_jpeg(mine).astype(int) - simplejpeg.decode_jpeg(plainly))
        assert difference.mean() < 1


def test_what_makes_no_chunk_is_refused(plain: PlainServer) -> None:
    assert post(plain, "/animate?avatar=nobody&frame_index=0", windows()[0])[0] == 404
    status, body, _ = post(plain, "/animate?avatar=red&frame_index=0", b"short")
    assert status == 422
    assert b"expected 58880" in body
    assert post(plain, "/animate?avatar=red&frame_index=0&size=7", windows()[0])[0] == 422
    assert post(plain, "/animate?avatar=red", windows()[0])[0] == 422


def test_the_same_generator_drives_it(plain: PlainServer, generator: Generator) -> None:
    seen = generator.flat_out(plain.target, Load(2, ("red", "green"), size=64, seconds=1.0, chunks=4))
    assert seen.frames_per_s > 0
    idle = generator.paced(plain.target, Load(1, ("red",), size=64, seconds=0.5, chunks=2, kinds=("idle",)))
    assert set(idle.failed_ms) == {"UNIMPLEMENTED"}


def test_a_server_that_does_not_start_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended with 1"):
        PlainServer(tmp_path).__enter__()
