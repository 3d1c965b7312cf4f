"""The wall clock jumps under a server: nothing in it may go by that one."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from viewers import Verdict, Viewers

from talksplat.server import Ports, Server

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
CACHED = 1  # seconds after which the library looks at its file again


@pytest.mark.skipif(not FAKETIME.exists(), reason="libfaketime is not installed (apt install libfaketime)")
def test_a_clock_that_jumps_costs_no_frame(
    marked_avatars: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    judge: Callable[[str, Verdict], None],
) -> None:
    offset = tmp_path / "offset"
    offset.write_text("+0\n")
    monkeypatch.setenv("LD_PRELOAD", str(FAKETIME))
    monkeypatch.setenv("FAKETIME_TIMESTAMP_FILE", str(offset))
    monkeypatch.setenv("FAKETIME_CACHE_DURATION", str(CACHED))
    monkeypatch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
    monkeypatch.setenv("NO_FAKE_STAT", "1")
    with Server(avatars=marked_avatars, ports=Ports.free(), run_dir=tmp_path) as server:
        monkeypatch.delenv("LD_PRELOAD")
        with Viewers([server.grpc_url]) as viewers:
            viewers.fault()
            for jump in ("+3h\n", "-2d\n", "+3h\n"):
                offset.write_text(jump)
                time.sleep(1.5 * CACHED)
                viewers.wait_until_all_see()
            server.canary(20)
            judge("clock jumps by hours and days", viewers.verdict())
        assert server.dead_processes() is None
    hours = [int(found) for found in re.findall(r"^(\d\d):\d\d:\d\d\.", (tmp_path / "triton.log").read_text(), re.M)]
    assert (hours[-1] - hours[0]) % 24 in (3, 4), "the server did not see the jumps"
