"""Processes that die or are stopped under streams: the supervisor restarts the server, and every stream goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from supervised import Up
from viewers import Verdict, Viewers, thorough

from talksplat import supervisor

STUBS = sorted(
    path.parent.name
    for path in (Path(__file__).parents[2] / "model_repository").glob("*/config.pbtxt")
    if "backend:" in path.read_text()
)
FEW = ("audio_encoder", "rasterizer")


@pytest.mark.parametrize("model", [pytest.param(model, marks=() if model in FEW else thorough) for model in STUBS])
def test_a_killed_stub_costs_no_frame(up: Up, judge: Callable[[str, Verdict], None], model: str) -> None:
    judge(f"kill -9 of {model}", break_it(up, up.stub(model).kill))


def test_a_killed_tritonserver_costs_no_frame(up: Up, judge: Callable[[str, Verdict], None]) -> None:
    judge("kill -9 of tritonserver", break_it(up, up.tritonserver().kill))


@thorough
def test_a_stopped_stub_costs_no_frame(up: Up, judge: Callable[[str, Verdict], None]) -> None:
    judge("SIGSTOP of rasterizer", break_it(up, up.stub("rasterizer").suspend))


@thorough
def test_a_stopped_tritonserver_costs_no_frame(up: Up, judge: Callable[[str, Verdict], None]) -> None:
    judge("SIGSTOP of tritonserver", break_it(up, up.tritonserver().suspend))


def break_it(up: Up, fault: Callable[[], None]) -> Verdict:
    """What three viewers see of a fault that ends one tritonserver."""
    broken = up.tritonserver()
    with Viewers([up.probe.grpc_url]) as viewers:
        time.sleep(supervisor.STABLE_SECONDS)  # a server that breaks sooner is started again after a pause
        viewers.fault()
        fault()
        up.wait_for_another(broken)
        viewers.wait_until_all_see()
        return viewers.verdict()
