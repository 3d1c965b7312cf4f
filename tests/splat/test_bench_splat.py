"""The benchmark: its rows, not its times."""

import argparse
import json
from pathlib import Path

import pytest
from make_avatar import write_avatar

from talksplat import splat
from talksplat.bench import splat as bench


def test_the_rows_say_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "QUICK_SCENES", ((300, 48),))
    monkeypatch.setattr(bench, "BACKWARD_SCENE", (200, 40))
    monkeypatch.setattr(bench, "DIRTY_SCENE", (300, 48))
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    arguments = parser.parse_args(
        ["--quick", "--avatar", str(write_avatar(tmp_path, "kim"))], argparse.Namespace(json=tmp_path / "splat.json")
    )
    assert bench.run(arguments) == 0

    rows = json.loads((tmp_path / "splat.json").read_text())["rows"]
    columns = ["scene", "gaussians", "size", "mode", "isa", "threads", "forward_ms"]
    columns += ["forward_least_ms", "backward_ms", "psnr_db"]
    assert all(list(row) == columns for row in rows)
    assert {row["mode"] for row in rows} == {"exact", "fast", "dirty exact", "dirty fast"}
    assert {row["scene"] for row in rows} == {"head", "kim"}
    assert {row["isa"] for row in rows} == set(splat.isas())
    assert all(row["forward_ms"] > 0 for row in rows)
    assert all(row["backward_ms"] > 0 for row in rows if row["mode"] == "exact" and row["threads"] == 1)
    assert all(row["psnr_db"] > 60 for row in rows)
