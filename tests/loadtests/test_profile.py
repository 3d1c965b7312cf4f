import os
from pathlib import Path

import pytest
from make_avatar import write_avatar

from loadtests import profile
from loadtests.streams import Generator
from loadtests.usage import Usage, batching
from talksplat.server import Server


def test_every_part_of_the_path_has_its_share(
    server: Server, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "LOADS", (("flat_out", 2),))
    rows = profile.measure(server, generator, "red", 64, 1.0, chunks=5)
    parts = {(row["view"], row["part"]): row for row in rows}
    for stage in (*profile.DRAWN, *profile.NETS, "avatar"):
        assert float(parts["stage", stage]["cpu_ms"] or 0) > -0.2  # some are differences of times
    for process in ("generator", "tritonserver", "rasterizer", "vad", "audio_encoder"):
        assert float(parts["process", process]["cpu_ms"] or 0) > 0
    shares = [float(row["share_pct"] or 0) for row in rows if row["view"] == "process" and row["part"] != "all"]
    assert sum(shares) == pytest.approx(100, abs=2)
    assert float(parts["process", "rasterizer"]["batch"] or 0) >= 1


def test_usage_of_a_process_counts_from_a_moment() -> None:
    before = Usage.of(os.getpid())
    sum(range(3_000_000))
    after = Usage.of(os.getpid())
    assert after.rss_bytes > 1 << 20
    assert after.total > before.total
    assert sum(after.since(before).values()) == pytest.approx(after.total - before.total)


def test_models_that_were_not_asked_have_no_batches() -> None:
    before = {"vad": (1, 1, 1, 0, 0, 0, 0), "asr": (5, 5, 5, 0, 0, 0, 0)}
    after = {"vad": (9, 3, 9, 8_000_000, 0, 16_000_000, 0), "asr": (5, 5, 5, 0, 0, 0, 0)}
    found = batching(before, after)
    assert list(found) == ["vad"]
    assert (found["vad"].batch, found["vad"].queue_ms, found["vad"].infer_ms) == (4, 1, 2)


def test_a_second_processor_is_worth_something(tmp_path: Path) -> None:
    write_avatar(tmp_path, "red")
    row = profile.second_processor(tmp_path, "red", 0.1)
    assert float(row["one_process_frames_per_s"] or 0) > 0
    assert float(row["worth_of_processors"] or 0) > 0
