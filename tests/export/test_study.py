"""Studies as files: what they say, and what they are refused for."""

import itertools
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from talksplat.animator import Options
from talksplat.server import ROOT
from talksplat_export.derive import ModelChange
from talksplat_export.registry import PRECISIONS, graph
from talksplat_export.study import NETS, Limits, Loads, Settings, Study, StudyError

STUDIES = sorted((ROOT / "export" / "experiments").glob("*.toml"))
GRID = "[[grid]]\nnets.instances = [2]\n"


def read(tmp_path: Path, text: str) -> Study:
    path = tmp_path / "study.toml"
    path.write_text(text)
    return Study.read(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("title = ", "can't be read"),
        ('title = "a"', r"no \[\[grid\]\]"),
        (f"title = 1\n{GRID}", "title is 1, expected a valid string"),
        (GRID, "title: missing"),
        (f'title = "a"\nrepeats = 3\n{GRID}', "repeats: unknown, expected one of title, device, avatar"),
        (f'title = "a"\nname = "b"\n{GRID}', "name: not for a file to say"),
        ('title = "a"\n[[grid]]\nnets.thread = [2]', "nets.thread: unknown, expected one of precision, .* threads"),
        (f'title = "a"\n{GRID}[[grid]]\nnet.threads = [2]', "grid 2, net: unknown, expected one of nets, "),
        ('title = "a"\n[[grid]]\nnets.threads = ["2"]', "grid 1, nets.threads is '2', expected a valid integer"),
        ('title = "a"\n[[grid]]\nnets.threads = [true]', "nets.threads is True, expected a valid integer"),
        ('title = "a"\n[[grid]]\nnets.threads = [0]', "nets.threads is 0, expected greater than or equal to 1"),
        ('title = "a"\n[[grid]]\nnets.threads = 2', "nets.threads is 2, expected a list of the values that it takes"),
        ('title = "a"\n[[grid]]\nnets.threads = []', "expected a list of the values"),
        ('title = "a"\n[[grid]]\nvad.preferred_batch_sizes = [4]', "preferred_batch_sizes is 4, expected a list"),
        ('title = "a"\n[[grid]]\nvad.preferred_batch_sizes = [[4, "8"]]', "is '8', expected a valid integer"),
        ('title = "a"\n[[grid]]\nvad.precision = ["int4"]', "is 'int4', expected 'fp32', 'fp16' or 'int8'"),
        ('title = "a"\n[[grid]]\ndeformation.precision = ["int8"]', "deformation is not offered in int8, but in fp32"),
        ('title = "a"\n[[grid]]\nqueue.stage = ["rasteriser"]', "is 'rasteriser', expected 'audio_encoder', "),
        ('title = "a"\n[[grid]]\nqueue.delay_us = [5]', "stage and delay_us belong together"),
        ('title = "a"\n[[grid]]\nrequest = { format = ["raw"], quality = [70] }', "raw frames have no quality"),
        ('title = "a"\n[[grid]]\nrequest.quality = [101]', "is 101, expected less than or equal to 100"),
        ('title = "a"\n[[grid]]\nnets.cuda_graphs = [true]', "CUDA graphs need the platform tensorrt_plan"),
        (
            'title = "a"\n[[grid]]\nvad = { platform = ["tensorrt_plan"], threads = [2] }',
            "vad: threads and parameters are ONNX Runtime's",
        ),
        ('title = "a"\nloads.size = 12\n' + GRID, "loads.size is 12, expected a multiple of 8"),
        ('title = "a"\nloads.streams = []\n' + GRID, "loads.streams is empty"),
        ('title = "a"\nbaseline.nets = 3\n' + GRID, "baseline, nets is 3, expected a table"),
        ('title = "a"\n[[grid]]\nrequest.chunks = [1]', "no grid has a point that differs from the baseline"),
    ],
)  # fmt: skip
def test_what_can_not_be_meant_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(StudyError, match=said):
        read(tmp_path, text)


def test_a_file_that_is_not_there_is_a_study_error(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"none\.toml can't be read"):
        Study.read(tmp_path / "none.toml")


AXES: dict[str, st.SearchStrategy[Any]] = {
    "nets.instances": st.integers(1, 4),
    "audio_encoder.precision": st.sampled_from(PRECISIONS),
    "vad.preferred_batch_sizes": st.lists(st.integers(1, 9), min_size=1, max_size=3),
    "request.chunks": st.integers(1, 4),
    "request.transport": st.sampled_from(["grpc", "shared_memory"]),
}
grids = st.dictionaries(st.sampled_from(sorted(AXES)), st.just(None), min_size=1).flatmap(
    lambda chosen: st.fixed_dictionaries(
        {axis: st.lists(AXES[axis], min_size=1, max_size=3, unique_by=str) for axis in chosen}
    )
)


@given(grids)
def test_a_grid_is_every_value_with_every_other_one_and_no_point_twice(grid: dict[str, list[Any]]) -> None:
    lines = [f"{axis} = {values!r}".replace("'", '"') for axis, values in grid.items()]
    found = {"title": "a", **tomllib.loads("\n".join(["[[grid]]", *lines]))}
    expected = set(itertools.product(*([str(value) for value in values] for values in grid.values())))
    committed = tuple(
        "1" if axis == "request.chunks" else "grpc" if axis == "request.transport" else None for axis in grid
    )
    try:
        study = Study._of("study", found)
    except StudyError:  # of nothing but the baseline
        assert expected == {committed}
        return

    def value(point: Settings, axis: str) -> str:
        table, name = axis.split(".")
        said = getattr(getattr(point, table), name)
        return str(list(said) if isinstance(said, tuple) else said)

    points = [tuple(value(point, axis) for axis in grid) for point in study.points]
    assert set(points[1:]) == expected - {committed}
    assert len(points[1:]) == len(set(points[1:]))
    assert study.points[0] == study.baseline
    labels = [study.label(point) for point in study.points]
    assert labels[0] == "baseline"
    assert len(set(labels)) == len(labels)


def test_a_nets_own_table_goes_before_the_groups(tmp_path: Path) -> None:
    study = read(
        tmp_path,
        'title = "a"\n[baseline]\nnets = { threads = 2, instances = 3 }\n[[grid]]\nvad.threads = [1]\n',
    )
    changes = study.points[1].changes()
    assert set(changes) == set(NETS)
    assert changes["vad"] == ModelChange(instances=3, parameters={"intra_op_thread_count": "1"})
    assert changes["audio_encoder"] == ModelChange(instances=3, parameters={"intra_op_thread_count": "2"})
    assert study.label(study.points[1]) == "vad 1 thread"


@given(stage=st.sampled_from(["audio_encoder", "vad", "deformation", "rasterizer"]), delay=st.integers(0, 30_000))
def test_a_delay_stands_on_one_stage_alone(stage: str, delay: int) -> None:
    changes = Settings.model_validate({"queue": {"stage": stage, "delay_us": delay}}).changes()
    delays = {name: change.queue_delay_us for name, change in changes.items()}
    assert delays == {name: delay if name == stage else 0 for name in (*NETS, "rasterizer")}


def test_what_is_left_out_is_as_committed() -> None:
    settings = Settings()
    assert settings.changes() == {}
    assert settings.request.jpeg_quality == Options().quality
    assert {name: graph(name).name for name in NETS} == {name: name for name in NETS}


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_that_are_here_can_be_read(path: Path) -> None:
    study = Study.read(path)
    assert study.device == ("cuda" if path.stem.startswith("gpu-") else "cpu")
    assert len(study.points) >= 4


def test_the_example_is_one(tmp_path: Path) -> None:
    text = (ROOT / "export" / "experiments" / "README.md").read_text()
    [example] = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    study = read(tmp_path, example)
    assert len(study.points) == 5
    assert (study.loads, study.limits) == (Loads(), Limits())  # "these are the defaults"


def test_two_studies_are_about_gpus_and_all_others_are_run_by_make() -> None:
    cpu = {path.stem for path in STUDIES if not path.stem.startswith("gpu-")}
    assert len(STUDIES) - len(cpu) == 2
    [line] = [line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("STUDIES :=")]
    assert set(line.split()[2:]) == cpu
