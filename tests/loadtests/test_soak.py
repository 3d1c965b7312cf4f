"""The soak: what it judges, and one that is far too short, on the real server."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from loadtests.slo import Playout, due
from loadtests.soak import Round, Soak, streams_of
from loadtests.streams import Generator
from talksplat.server import Server


def soaked(*, rasterizer: Mapping[float, int] | None = None, late: float = 0.0, lost: int = 0) -> Soak:
    """A soak of 100 s and two rounds: memory from so many seconds on; chunks come later and later, up to ``late`` s."""
    playouts = [Playout.of(0.0, [due(0.0, chunk) + 0.02 + late * chunk / 29 for chunk in range(30)])]
    soak = Soak(2, 64, 1.5, rounds=[Round(50.0, 2, playouts, lost), Round(100.0, 2, playouts, 0)])
    for second in range(101):
        megabytes = [size for since, size in (rasterizer or {0: 200}).items() if since <= second][-1]
        soak.looks.append((float(second), {"rasterizer": megabytes * 10**6, "vad": 80 * 10**6}))
    return soak


def test_a_calm_soak_has_no_problem() -> None:
    assert soaked().problems() == []


def test_what_grows_after_the_warm_up_is_named_and_what_grew_before_is_not() -> None:
    assert soaked(rasterizer={0: 50, 20: 200}).problems() == []
    assert soaked(rasterizer={0: 200, 60: 203}).problems() == []
    rasterizer, whole = soaked(rasterizer={0: 200, 60: 210}).problems()
    assert rasterizer == "The memory of rasterizer grew by 5 %, beyond 2 %."
    assert "of all grew by 3.571 %" in whole


def test_memory_that_comes_and_goes_does_not_grow() -> None:
    assert soaked(rasterizer={0: 200, 26: 190, 44: 200, 55: 190, 77: 200}).problems() == []


def test_lost_frames_are_counted() -> None:
    assert soaked(lost=8).problems() == ["8 frames were lost."]


def test_frames_that_fall_behind_their_audio_are_a_drift() -> None:
    assert soaked(late=0.05).problems() == []
    assert "drifted by 76 ms from their audio" in soaked(late=0.11).problems()[-1]
    assert soaked(late=0.11).rounds[0].drift_ms == pytest.approx(1e3 * 0.11 * 20 / 29)


def test_the_streams_are_a_share_of_what_held(tmp_path: Path) -> None:
    path = tmp_path / "capacity.json"
    assert streams_of(path, 512) == 0
    rows = [
        {"size": size, "streams": streams, "slo_ok": ok}
        for size, streams, ok in ((512, 1, True), (512, 10, True), (512, 12, False), (256, 20, True))
    ]
    path.write_text(json.dumps({"rows": rows}))
    assert streams_of(path, 512) == 8
    assert streams_of(path, 64) == 0


def test_a_short_soak_of_the_real_server(server: Server, generator: Generator, tmp_path: Path) -> None:
    soak = Soak(2, 64, minutes=0.01, round_seconds=1.5, chunks=5)
    soak.run(server, generator, ("red", "green", "blue"))
    (row,) = soak.rows()
    assert row["lost"] == 0
    assert int(row["frames"] or 0) >= 20
    assert np.isfinite(soak.rounds[0].drift_ms)
    assert {entry["process"] for entry in soak.memory()} >= {"tritonserver", "rasterizer", "audio_encoder", "all"}
    soak.plot(tmp_path / "soak.png")
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


def test_a_server_that_dies_ends_the_soak() -> None:
    soak = soaked()
    soak.died = "1 of 11 backend stubs ended"
    assert soak.problems() == ["The server died: 1 of 11 backend stubs ended."]
