"""Running studies: what is kept, what is measured again, what a failure leaves; one real study, the smallest."""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from talksplat.server import ROOT, SHARED_MEMORY, Ports
from talksplat_export import experiment
from talksplat_export.experiment import (
    IDENTICAL_DB,
    SCHEMA,
    ExperimentError,
    Measured,
    NoCheckoutError,
    NoGpuError,
    PointError,
    Results,
    on_front,
)
from talksplat_export.study import QUICK, Settings, Study

# ------------------------------------------------------------------------------------------------- fronts and ratios


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=30))
def test_the_front_is_what_no_other_point_beats(costs: list[tuple[float, float]]) -> None:
    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one[0] <= other[0] and one[1] <= other[1] and one != other

    assert on_front(costs) == [not any(beats(other, cost) for other in costs) for cost in costs]


speeds = st.lists(st.floats(0.2, 5), min_size=1, max_size=5)


@given(machine=speeds, faster=st.floats(0.5, 2))
def test_a_machine_that_changes_its_speed_changes_no_ratio(machine: list[float], faster: float) -> None:
    """As long as neighbours are hit alike."""
    found = experiment._summary(made_up_runs(machine, faster))
    assert found["throughput_ratio"] == pytest.approx(faster)
    assert found["latency_ratio"] == pytest.approx(1 / faster)
    assert found["throughput_spread_pct"] == pytest.approx(0, abs=1e-9)
    assert found["frames_per_s"] == pytest.approx(100 * faster * float(np.median(machine)))


def test_figures_are_those_of_the_largest_load() -> None:
    small = [{**run, "count": 1, "frames_per_s": 1.0, "chunk_p95_ms": 1.0} for run in made_up_runs([1.0], 3.0)]
    assert experiment._summary([*small, *made_up_runs([1.0], 3.0)])["frames_per_s"] == pytest.approx(300)


def test_frames_are_compared_all_together() -> None:
    """So that a frame that is wrong counts, however many are right."""
    black = np.zeros((10, 8, 8, 3), np.uint8)
    assert experiment._psnr(black, black) == IDENTICAL_DB
    wrong = black.copy()
    wrong[3] = 255
    assert experiment._psnr(wrong, black) == pytest.approx(10.0)
    assert experiment._psnr(black + np.uint8(1), black) == pytest.approx(20 * math.log10(255))


# ----------------------------------------------------------------------------------------------------------- results


def made_up_runs(machine: Sequence[float], faster: float) -> list[dict[str, Any]]:
    """Of a machine that is so fast in each repeat, and a point that is as much faster than the baseline."""
    runs = []
    for repeat, speed in enumerate(machine):
        for server, own in (("baseline", speed), ("point", speed * faster)):
            figures = dict.fromkeys(experiment._RUN_FIGURES, 1 / own) | {"frames_per_s": 100 * own}
            for kind in ("concurrency", "streams"):
                runs.append({"server": server, "kind": kind, "count": 8, "repeat": repeat, **figures})
    return runs


def made_up_row(point: str, faster: float = 1.0, reason: str | None = None) -> Measured:
    row = dict.fromkeys(SCHEMA) | {"point": point, "settings": "{}", "runs": [], "machine": "m", "commit": "c"}
    if reason is not None:
        return row | {"reason": reason, "key": "k"}
    runs = made_up_runs([1.0, 1.1], faster)
    quality = {"psnr_db": 100.0, "delivered_psnr_db": 40.0 + faster, "coefficients_r": 1.0}
    return row | experiment._summary(runs) | quality | {"runs": runs, "key": "k"}


rows = st.lists(
    st.builds(
        made_up_row,
        st.text(st.characters(codec="utf-8"), max_size=20),
        st.floats(0.1, 9),
        st.none() | st.text(st.characters(codec="utf-8")),
    ),
    max_size=5,
    unique_by=lambda row: row["point"],
)


@settings(max_examples=25)  # each writes files
@given(rows)
def test_rows_come_out_of_parquet_as_they_went_in(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Measured]
) -> None:
    path = tmp_path_factory.mktemp("results") / "a.parquet"
    results = Results(path)
    for row in rows:
        results.put(row)
    assert Results(path).rows == rows
    if rows:
        results.put(rows[0] | {"commit": "later"})  # in place of the earlier one
        assert [row["commit"] for row in Results(path).rows] == ["c"] * (len(rows) - 1) + ["later"]
        assert pl.read_parquet(path).schema == SCHEMA
    assert [file.name for file in path.parent.iterdir()] == (["a.parquet"] if rows else [])


def test_what_is_no_result_is_refused_and_left(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_text("something else")
    with pytest.raises(ExperimentError, match="holds no results of a study"):
        Results(path)
    assert path.read_text() == "something else"


# ------------------------------------------------------------------------------------ resuming, with made-up figures

STUDY = """
title = "Threads & <instances>"
[[grid]]
nets.threads = [2, 3]
[[grid]]
nets.instances = [2]
"""


class FakeBench:
    """Serves and measures nothing: says what a test wants of it."""

    asked: list[str]
    outcome: Callable[[str], Measured]

    def __init__(self, study: Study, plans: Path | None) -> None:
        self._study = study

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def measure(self, point: Settings) -> Measured:
        label = self._study.label(point)
        self.asked.append(label)
        return type(self).outcome(label)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> type[FakeBench]:
    FakeBench.asked = []
    FakeBench.outcome = staticmethod(made_up_row)
    monkeypatch.setattr(experiment, "_Bench", FakeBench)
    monkeypatch.setattr(experiment, "_require", lambda study: None)
    monkeypatch.setattr(experiment, "sources", lambda avatar, plans: "sources")
    monkeypatch.setattr(experiment, "_plot", lambda study, rows, path: path.touch())  # drawing takes half a second
    return FakeBench


@pytest.fixture
def study(tmp_path: Path) -> Study:
    path = tmp_path / "threads.toml"
    path.write_text(STUDY)
    return Study.read(path)


def test_an_interrupted_study_goes_on_where_it_was(tmp_path: Path, study: Study, bench: type[FakeBench]) -> None:
    def interrupt(label: str) -> Measured:
        if label == "3 threads":
            raise KeyboardInterrupt
        return made_up_row(label)

    bench.outcome = staticmethod(interrupt)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(study, tmp_path)
    assert bench.asked == ["baseline", "2 threads", "3 threads"]
    bench.asked, bench.outcome = [], staticmethod(made_up_row)
    rows = experiment.run(study, tmp_path)
    assert bench.asked == ["3 threads", "2 instances"]
    assert [row["point"] for row in rows] == ["baseline", "2 threads", "3 threads", "2 instances"]
    bench.asked = []
    assert experiment.run(study, tmp_path) == rows
    assert bench.asked == []


@pytest.mark.parametrize("what", ["loads", "sources", "machine", "baseline"])
def test_what_was_measured_otherwise_is_measured_again(
    tmp_path: Path, study: Study, bench: type[FakeBench], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    experiment.run(study, tmp_path)
    bench.asked = []
    if what == "loads":
        study = study.model_copy(update={"loads": QUICK})
    elif what == "baseline":
        study = study.model_copy(update={"avatar": "eve"})
    elif what == "sources":
        monkeypatch.setattr(experiment, "sources", lambda avatar, plans: "others")
    else:
        monkeypatch.setattr(experiment, "machine", lambda: "another")
    experiment.run(study, tmp_path)
    assert len(bench.asked) == len(study.points)


def test_a_failure_is_a_row_that_is_tried_again(tmp_path: Path, study: Study, bench: type[FakeBench]) -> None:
    bench.outcome = staticmethod(lambda label: made_up_row(label, reason="no" if label == "2 threads" else None))
    rows = experiment.run(study, tmp_path)
    assert [row["reason"] for row in rows] == [None, "no", None, None]
    assert "| 2 threads |  |  |  | no |" in (tmp_path / "threads.md").read_text()
    bench.asked, bench.outcome = [], staticmethod(made_up_row)
    assert [row["reason"] for row in experiment.run(study, tmp_path)] == [None] * 4
    assert bench.asked == ["2 threads"]


def test_a_study_that_failed_as_a_whole_has_a_table_and_no_plot(
    tmp_path: Path, study: Study, bench: type[FakeBench]
) -> None:
    bench.outcome = staticmethod(lambda label: made_up_row(label, reason="no"))
    experiment.run(study, tmp_path)
    assert (tmp_path / "threads.md").read_text().count("| no |") == 4
    assert not (tmp_path / "threads.png").exists()


def test_some_points_alone_leave_the_others(tmp_path: Path, study: Study, bench: type[FakeBench]) -> None:
    experiment.run(study, tmp_path, only=["threads"])
    assert bench.asked == ["2 threads", "3 threads"]
    assert len(experiment.run(study, tmp_path, only=["baseline"])) == 3


_plot = experiment._plot


def test_the_same_rows_make_the_same_files(
    tmp_path: Path, study: Study, bench: type[FakeBench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "_plot", _plot)
    contents = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        bench.outcome = staticmethod(lambda label: made_up_row(label, 1 + len(label) / 30))
        experiment.run(study, folder)
        contents.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {f"threads.{kind}" for kind in ("parquet", "json", "md", "png")}
    document = json.loads(contents[0]["threads.json"])
    assert [row["point"] for row in document["rows"]] == [study.label(point) for point in study.points]
    assert sum(map(len, contents[0].values())) < 300_000


# ------------------------------------------------------------------------------------------------- what must be here


def test_outside_a_checkout_it_says_so(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "LOADTESTS", tmp_path / "loadtests")
    with pytest.raises(NoCheckoutError, match="experiments run in a checkout"):
        experiment.run(study, tmp_path)


def test_a_study_of_gpus_wants_one(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(NoGpuError, match="this machine has none"):
        experiment.run(study.model_copy(update={"device": "cuda"}), tmp_path)


def test_sources_are_what_figures_depend_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config, unrelated = (
        tmp_path / "model_repository" / "vad" / "config.pbtxt",
        tmp_path / "talksplat" / "bench" / "a.py",
    )
    for path in (config, unrelated):
        path.parent.mkdir(parents=True)
        path.write_text("a")
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    before = experiment.sources("ava", None)
    unrelated.write_text("b")
    assert experiment.sources("ava", None) == before
    config.write_text("b")
    assert experiment.sources("ava", None) != before


# ---------------------------------------------------------------------------------------------------------- for real


def test_loads_that_fail_or_hang_are_said_and_the_next_one_is_taken() -> None:
    nobody = {"url": f"127.0.0.1:{Ports.free().grpc}", "pid": os.getpid(), "avatar": "ava", "size": 64}
    order = {**nobody, "kind": "concurrency", "count": 1, "seconds": 1.0}
    with experiment._LoadProcess() as loads:
        with pytest.raises(PointError, match="The load of 1 concurrency had not ended after 0 s"):
            loads.measure(order, 0)
        with pytest.raises(PointError, match="The load of 1 concurrency failed: InferenceServerException"):
            loads.measure(order, 60)
        with pytest.raises(PointError, match=r"ended with 1: .*unexpected keyword argument"):
            loads.measure({**order, "nonsense": 1}, 60)


@pytest.mark.usefixtures("hurried")
def test_a_small_study_runs(tmp_path: Path, repository: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text(
        'title = "Small"\n'
        '[[grid]]\nrequest = { format = ["raw"], transport = ["shared_memory"], chunks = [2] }\n'
        "[[grid]]\nvad.preferred_batch_sizes = [[1000]]\n"
    )
    study = Study.read(path).model_copy(update={"loads": QUICK})
    sound, failed = experiment.run(study, tmp_path, only=["raw", "1000"])
    assert sound["reason"] is None
    assert (sound["psnr_db"], sound["delivered_psnr_db"]) == (IDENTICAL_DB, IDENTICAL_DB)  # the same nets, and no JPEG
    assert sound["coefficients_r"] == pytest.approx(1)
    assert min(sound[name] for name in ("frames_per_s", "chunk_p95_ms", "server_cpu_s_per_stream_s")) > 0
    assert [(run["server"], run["kind"]) for run in sound["runs"]] == [
        ("baseline", "concurrency"),
        ("point", "concurrency"),
        ("baseline", "streams"),
        ("point", "streams"),
    ]
    assert sound["latency_ratio"] > 1  # the first of two chunks waits for the second
    assert "preferred batch sizes [1000]" in failed["reason"]
    assert not list((ROOT / "build").glob("experiment-*"))
    regions = [region.name.split("-") for region in SHARED_MEMORY.glob("talksplat-*-0-viewer-*")]
    assert all(psutil.pid_exists(int(pid)) for _, pid, *_ in regions)  # of another test
