"""What the edge tells Prometheus."""

import http.client
import ssl
from pathlib import Path

import numpy as np
import pytest
from prometheus import Prometheus
from waiting import wait_for
from watched import KEY, Watched

from talksplat import clock
from talksplat.edge import Address
from talksplat_client import Client, TalksplatError, Tls


def page(address: Address) -> str:
    context = ssl.create_default_context(cafile=str(address.certificate))
    connection = http.client.HTTPSConnection(address.host, address.port, timeout=10, context=context)
    connection.request("GET", "/edge/metrics")
    response = connection.getresponse()
    assert response.status == 200
    text = response.read().decode()
    connection.close()
    return text


def test_answers_refusals_and_streams_reach_prometheus(
    watched: Watched, edge: Path, address: Address, prometheus: Prometheus
) -> None:
    def requests(tenant: str, status: int) -> float:
        return prometheus.value(f'talksplat_edge_requests_total{{tenant="{tenant}", status="{status}"}}')

    wait_for(lambda: prometheus.value("up{job='talksplat-edge'}") == 1)
    passed, unknown = requests("acme", 200), requests("", 401)
    tls = Tls(address.certificate)
    with Client(address.url, api_key=KEY, tls=tls) as client:
        noise = np.random.default_rng(0).normal(scale=0.1, size=clock.SAMPLE_RATE).astype(np.float32)
        assert len(list(client.animate([noise], avatar="red", sample_rate=clock.SAMPLE_RATE))) == clock.FPS
        wait_for(lambda: prometheus.value('talksplat_edge_streams{tenant="acme"}') >= 1)
    with Client(address.url, api_key="wrong", tls=tls) as client, pytest.raises(TalksplatError):
        client.avatars()
    wait_for(lambda: requests("acme", 200) >= passed + 7 and requests("", 401) > unknown)
    wait_for(lambda: prometheus.value('talksplat_edge_streams{tenant="acme"}') == 0)  # its lease has ended


def test_tenants_are_named_but_no_key_is(watched: Watched, edge: Path, address: Address) -> None:
    text = page(address)
    assert 'talksplat_edge_streams{tenant="acme"}' in text
    assert KEY not in text
