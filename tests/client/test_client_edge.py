"""The client at the real edge: one place for a whole conversation, and what those are told who get none."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest

from talksplat import edge, tenants
from talksplat.edge import Address, Edge, MissingNginxError
from talksplat.server import Ports, Server
from talksplat_client import AsyncClient, Client, OverloadedError, Tls, UnauthenticatedError, UnknownAvatarError

AUDIO = np.random.default_rng(0).uniform(-0.3, 0.3, 16_000).astype(np.float32)


class Door(NamedTuple):
    url: str
    key: str  # of a tenant with one stream at a time
    tls: Tls

    def client(self) -> Client:
        return Client(self.url, api_key=self.key, tls=self.tls)


@pytest.fixture(scope="module")
def door(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    try:
        edge.find_nginx()
    except MissingNginxError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("edge")
    key, hashed = tenants.key()
    file = folder / "tenants.toml"
    file.write_text(
        f'streams = 4\n[tenants.acme]\nkeys = ["{hashed}"]\navatars = ["red"]\nstreams = 1\nrequests_per_second = 500\n'
    )
    address = Address(folder / "certificate.pem", folder / "key.pem", port=Ports.free().http)
    edge.make_certificate(address.certificate, folder / "key.pem", "127.0.0.1")
    made = Edge(file, [server.ports], address, folder / "run")
    made.start()
    yield Door(f"127.0.0.1:{address.port}", key, Tls(address.certificate))
    made.stop()


def test_a_tenant_with_one_place_has_a_whole_conversation(door: Door) -> None:
    with door.client() as client:
        client.preload("red")
        frames = list(itertools.islice(stream := client.idle("red", seed=1), 8))
        stream.cancel()
        frames += list(itertools.islice(stream := client.resume(AUDIO, stream.state), 13))
        stream.cancel()  # somebody interrupts
        frames += list(itertools.islice(stream := client.resume(None, stream.state), 20))
        stream.cancel()
        assert [frame.index for frame in frames] == list(range(41))
        assert len(list(client.animate(AUDIO, avatar="red", deadline=30))) == 25  # another stream, in the same place
        with pytest.raises(UnknownAvatarError):
            list(client.animate(AUDIO, avatar="nobody"))


async def test_who_gets_no_place_is_told_when_to_ask_again_and_gets_it_then(door: Door) -> None:
    time.sleep(2.5)  # the places of the tests before come free
    with door.client() as client, client.animate(itertools.repeat(AUDIO), avatar="red") as stream:
        next(stream)
        async with AsyncClient(door.url, api_key=door.key, tls=door.tls) as other:
            await other.clock()
            began = time.monotonic()
            with pytest.raises(OverloadedError, match="as many streams as it may") as caught:
                async for _ in await other.animate(AUDIO, avatar="red"):
                    pass
            assert time.monotonic() - began < 2
            assert caught.value.retry_after is not None
            await other.preload("red")  # takes no place
            stream.cancel()
            time.sleep(caught.value.retry_after + 0.5)
            assert caught.value.state is not None
            assert len([frame async for frame in await other.resume((), caught.value.state)]) == 25


def test_a_wrong_key_is_said_at_once(door: Door) -> None:
    with pytest.raises(UnauthenticatedError) as caught, Client(door.url, api_key="wrong", tls=door.tls) as client:
        client.clock()
    assert "wrong" not in str(caught.value)
