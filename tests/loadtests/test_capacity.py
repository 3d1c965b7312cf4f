import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_avatar import write_avatar
from PIL import Image

from loadtests import capacity, streams
from loadtests.capacity import QUICK, Bench, decisive, largest
from loadtests.cast import cast, crowd
from loadtests.streams import Generator, Triton
from talksplat import avatar as bundle
from talksplat.bench._report import Row
from talksplat.server import Server


def up_to(limit: int, asked: list[int]) -> Callable[[int], bool]:
    def holds(number: int) -> bool:
        asked.append(number)
        return number <= limit

    return holds


@given(st.integers(0, 60), st.integers(1, 10))
def test_the_largest_number_that_holds_is_found(limit: int, stride: int) -> None:
    asked: list[int] = []
    assert largest(up_to(limit, asked), stride, 1) == limit
    assert len(asked) == len(set(asked))  # each is a run of many seconds
    assert len(asked) <= 3 + limit // stride + math.ceil(math.log2(stride) if stride > 1 else 0)


@given(st.integers(1, 60), st.integers(2, 10))
def test_a_coarse_search_ends_below_the_limit_and_near_it(limit: int, stride: int) -> None:
    found = largest(up_to(limit, []), stride, 2)
    assert limit - 2 < found <= limit


def test_a_search_can_be_bounded() -> None:
    assert largest(lambda _: True, 3, 1, most=7) == 6


def test_the_longest_and_last_run_of_a_number_counts() -> None:
    def run(streams: int, seconds: float, ok: bool, size: int = 512) -> Row:
        return {"size": size, "streams": streams, "seconds": seconds, "slo_ok": ok}

    runs = [
        run(1, 9, True),
        run(8, 9, False),
        run(8, 9, True),
        run(8, 25, False),
        run(7, 25, True),
        run(8, 9, True, 256),
    ]
    assert decisive(runs) == [run(1, 9, True), run(7, 25, True), run(8, 25, False), run(8, 9, True, 256)]


def test_a_cast_is_of_separate_avatars_and_a_crowd_of_links(tmp_path: Path) -> None:
    write_avatar(tmp_path / "source", "red")
    names = cast(tmp_path / "source" / "red", tmp_path / "avatars", 3)
    avatars = [bundle.read(tmp_path / "avatars", name) for name in names]
    assert len({avatar.canonical.tobytes() for avatar in avatars}) == 3

    extras = crowd(tmp_path / "avatars" / names[0], tmp_path / "avatars", 2)
    assert set(bundle.available(tmp_path / "avatars")) == {*names, *extras}
    assert bundle.read(tmp_path / "avatars", extras[1]).id == extras[1]
    packs = [(tmp_path / "avatars" / name / "plates.bin").stat().st_ino for name in (names[0], *extras)]
    assert len(set(packs)) == 1


def test_a_server_is_measured_from_streams_to_memory(
    server: Server, generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "LEAD_SECONDS", 0.2)
    assert server.pid is not None
    plan = dataclasses.replace(QUICK, switches=5)
    bench = Bench(generator, Triton(server.grpc_url), server.pid, ("red", "green"), plan, server, most=1)
    rows: list[Row] = []
    held = bench.search(rows)
    flat_out = bench.flat_out()
    preloads = bench.preload_under_load(("red", "blue"), held)
    still = bench.avatars_at_rest(("red", "blue"))
    switches = bench.switches(("red", "blue", "green"))
    wanted = ["size", "streams", "first_frame_p95_ms", "deadline_miss_pct", "frames_per_s", "slo_ok"]
    assert all(list(row)[:6] == wanted for row in rows)
    assert held[64] in (0, 1)  # a machine under other load may not hold even one
    assert flat_out[0]["server"] == "talksplat"
    assert float(flat_out[0]["frames_per_s"] or 0) > 0
    assert [row["preloads"] for row in preloads] == [0, 1]
    assert [row["avatars_loaded"] for row in still] == [1, 2]
    assert [row["switches"] for row in switches] == [0, 5]

    never = {**rows[0], "streams": 2, "first_frame_p95_ms": None}
    capacity.plot(rows, [*rows, never], tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").size[0] > 300
    json.dumps(rows, allow_nan=False)
