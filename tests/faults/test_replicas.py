"""Two replicas, and a client that knows both: one of them dies or hangs, the streams go on at the other."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import pytest
from supervised import Up
from viewers import Verdict, Viewers, thorough

from talksplat.server import Server

pytestmark = pytest.mark.usefixtures("marked")


@thorough
def test_a_replica_that_is_killed_costs_no_frame(up: Up, server: Server, judge: Callable[[str, Verdict], None]) -> None:
    judge("kill -9 of one of two replicas", lose(up, server, psutil.Process.kill))


def test_a_replica_that_hangs_costs_no_frame(up: Up, server: Server, judge: Callable[[str, Verdict], None]) -> None:
    judge("SIGSTOP of one of two replicas", lose(up, server, psutil.Process.suspend))


def lose(up: Up, other: Server, fault: Callable[[psutil.Process], None]) -> Verdict:
    """What viewers see of a fault at the replica that they have turned to."""
    broken = up.tritonserver()
    with Viewers([up.probe.grpc_url, other.grpc_url]) as viewers:
        time.sleep(1)
        viewers.fault()
        fault(broken)
        viewers.wait_until_all_see()
        verdict = viewers.verdict()
    up.wait_for_another(broken)
    return verdict
