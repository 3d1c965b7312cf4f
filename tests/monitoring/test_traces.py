"""Spans of the real server, taken by a stand-in for a collector that reads them as OpenTelemetry's own messages."""

import secrets
import time

import pytest
from collector import Span
from waiting import wait_for
from watched import TRACED, Watched

from talksplat.cli import main
from talksplat.server import ServerError, Trace

STEPS = ["audio_encoder", "vad", "avatar", "deformation", "rasterizer"]  # of `animate`


def test_a_traceparent_makes_the_request_a_child_with_a_span_for_each_step(watched: Watched) -> None:
    traces, parent = [], secrets.token_hex(8)

    def arrived() -> list[Span]:
        """Asks again each time: Triton's exporter drops what a busy machine does not take in time."""
        traces.append(trace := secrets.token_hex(16))
        watched.chunk(index=8, request_id="stream-8", headers={"traceparent": f"00-{trace}-{parent}-01"})
        time.sleep(0.5)
        return [span for trace in traces for span in watched.spans(trace=trace, name="InferRequest")]  # which ends last

    (trace, *_) = [span.trace for span in wait_for(arrived)]
    spans = watched.spans(trace=trace)
    named = {span.name: span for span in spans if span.name != "compute"}
    assert set(named) == {"InferRequest", "animate", *STEPS}
    assert named["InferRequest"].parent == parent
    assert named["animate"].parent == named["InferRequest"].id
    for step in STEPS:
        assert named[step].parent == named["animate"].id
        assert named[step].attributes["triton.model_name"] == step
    for name in ("animate", *STEPS):
        assert named[name].request_id == "stream-8"
        assert 0 < named[name].milliseconds <= named["InferRequest"].milliseconds
    assert {span.service for span in spans} == {"talksplat"}


def test_without_one_a_share_of_the_requests_is_traced(watched: Watched) -> None:
    run = secrets.token_hex(4)
    for index in range(3 * TRACED):
        watched.idle(index=index, request_id=f"{run}-{index}")

    def traced() -> int:
        return sum(span.request_id.startswith(run) for span in watched.spans(name="rasterizer"))

    wait_for(lambda: traced() >= 3)
    assert traced() == 3


def test_nothing_that_a_client_said_is_in_a_span(watched: Watched) -> None:
    wait_for(watched.spans)
    known = {f"triton.{name}" for name in ("model_name", "model_version", "trace_id", "trace_parent_id", "request_id")}
    assert {name for span in watched.collector.spans() for name in span.attributes} <= known


@pytest.mark.parametrize(
    "url", ["", "collector:4318", "ftp://collector/v1/traces", "http://a b/", "http://a/v1,rate=1"]
)
def test_what_is_no_collectors_address_is_refused(url: str) -> None:
    with pytest.raises(ServerError, match="collector's address"):
        Trace(url)


def test_rates_and_delays_below_one_are_refused() -> None:
    for wrong in ({"every": 0}, {"delay_ms": 0}):
        with pytest.raises(ServerError, match="expected 1 or more"):
            Trace("http://127.0.0.1:4318/v1/traces", **wrong)


def test_the_command_says_so_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--free-ports", "--trace", "nowhere"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
