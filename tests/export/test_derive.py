"""Derived repositories, down to what the protobuf messages say.

Plans, GPUs and the container's backends are not here: that a derived config means what it should is checked against the
fields that Triton 2.62 has and the parameters that its backends read, as listed below. Not run here: such a server.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from talksplat.server import ROOT
from talksplat_export import cli, models, registry
from talksplat_export import derive as derive_module
from talksplat_export.derive import CONFIG, PLAN, DeriveError, ModelChange, derive, named

COMMITTED = ROOT / "model_repository"
NETS = [graph.name for graph in registry.GRAPHS]
FIXED = ("vad", "audio_encoder", "deformation")  # inputs that change in nothing but the batch
BATCHING = [path.parent.name for path in COMMITTED.glob(f"*/{CONFIG}") if "dynamic_batching" in path.read_text()]
# Fields that derived configs set, by message, as model_config.proto of the release 25.10 (Triton 2.62) has them.
FIELDS_2_62 = {
    "": {"backend", "default_model_filename", "dynamic_batching", "instance_group", "optimization", "parameters"},
    "instance_group": {"count", "kind"},
    "dynamic_batching": {"preferred_batch_size", "max_queue_delay_microseconds"},
    "optimization": {"graph", "cuda", "execution_accelerators"},
    "optimization.graph": {"level"},
    "optimization.cuda": {"graphs", "output_copy_stream", "graph_spec"},
    "optimization.cuda.graph_spec": {"batch_size", "input", "graph_lower_bound"},
    "optimization.cuda.graph_spec.graph_lower_bound": {"batch_size", "input"},
    "optimization.execution_accelerators": {"gpu_execution_accelerator"},
    "optimization.execution_accelerators.gpu_execution_accelerator": {"name", "parameters"},
}
# What onnxruntime_backend 25.10 reads of the accelerator "tensorrt", of what is written here; it refuses others.
ACCELERATOR_25_10 = {
    *("precision_mode", "max_workspace_size_bytes", "trt_min_subgraph_size", "trt_engine_cache_enable"),
    *("trt_engine_cache_path", "trt_engine_cache_prefix", "trt_context_memory_sharing_enable", "trt_cuda_graph_enable"),
    *("trt_layer_norm_fp32_fallback", "trt_timing_cache_enable", "trt_timing_cache_path", "trt_sparsity_enable"),
    *("trt_build_heuristics_enable", "trt_builder_optimization_level", "trt_auxiliary_streams", "trt_tactic_sources"),
    *("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed configs and code, with stand-ins for ONNX files, of which only the bytes count."""
    source = tmp_path_factory.mktemp("checkout") / "model_repository"
    shutil.copytree(COMMITTED, source, ignore=shutil.ignore_patterns("*.onnx", "*.stamp", "__pycache__"))
    for graph in registry.GRAPHS:
        for precision in graph.tolerances:
            file = models.path(graph.name, precision, source)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{graph.name} in {precision}")
    return source


@pytest.fixture(scope="module")
def plans(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins for plans, in fp16, with what `talksplat-export tensorrt` writes beside them."""
    folder = tmp_path_factory.mktemp("plans")
    for name in NETS:
        plan = folder / name / "1" / PLAN
        plan.parent.mkdir(parents=True)
        plan.write_bytes(b"a plan")
        onnx = models.path(name, "fp16", source).read_bytes()
        record = {"precision": "fp16", "onnx_sha256": sha256(onnx), "plan_sha256": sha256(b"a plan")}
        plan.with_name(f"{PLAN}.json").write_text(json.dumps(record))
    return folder


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def config(repository: Path, name: str) -> Any:
    return text_format.Parse((repository / name / CONFIG).read_text(), ModelConfig())


def cleared(message: Any, *fields: str) -> Any:
    """A copy without some fields."""
    copy = ModelConfig()
    copy.CopyFrom(message)
    for field in fields:
        copy.ClearField(field)
    return copy


def test_without_changes_every_config_says_the_same_and_every_file_is_there(source: Path, tmp_path: Path) -> None:
    derive(tmp_path / "same", {}, source=source)
    names = sorted(path.parent.name for path in source.glob(f"*/{CONFIG}"))
    assert sorted(path.name for path in (tmp_path / "same").iterdir()) == names
    for name in names:
        assert config(tmp_path / "same", name) == config(source, name)
    files = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path / "same") for path in (tmp_path / "same").rglob("*") if path.is_file()} == files


def test_the_first_line_says_what_it_was_made_of(source: Path, tmp_path: Path) -> None:
    derive(
        tmp_path / "two", {"vad": ModelChange(instances=2, parameters={"intra_op_thread_count": "4"})}, source=source
    )
    line = (tmp_path / "two" / "vad" / CONFIG).read_text().splitlines()[0]
    assert line.startswith("#")
    assert line.endswith("instances 2, intra_op_thread_count 4")
    assert sha256((source / "vad" / CONFIG).read_bytes())[:12] in line


@settings(max_examples=25)  # each writes a repository
@given(
    name=st.sampled_from(BATCHING),
    instances=st.none() | st.integers(1, 64),
    sizes=st.none() | st.lists(st.integers(1, 4), max_size=3).map(tuple),
    threads=st.none() | st.integers(0, 256),
)
def test_what_is_asked_for_changes_and_nothing_else(
    source: Path,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    instances: int | None,
    sizes: tuple[int, ...] | None,
    threads: int | None,
) -> None:
    target = tmp_path_factory.mktemp("derived")
    parameters = {} if threads is None or name not in NETS else {"intra_op_thread_count": str(threads)}
    change = ModelChange(instances=instances, preferred_batch_sizes=sizes, parameters=parameters)
    derive(target, {name: change}, source=source)
    was, now = config(source, name), config(target, name)
    changing = ("instance_group", "dynamic_batching", "parameters")
    assert cleared(now, *changing) == cleared(was, *changing)
    assert [group.count for group in now.instance_group] == [instances or group.count for group in was.instance_group]
    assert [group.kind for group in now.instance_group] == [group.kind for group in was.instance_group]
    wanted = was.dynamic_batching.preferred_batch_size if sizes is None else sizes
    assert list(now.dynamic_batching.preferred_batch_size) == list(wanted)
    delays = {each.dynamic_batching.max_queue_delay_microseconds for each in (was, now)}
    assert len(delays) == 1
    assert dict(now.parameters) == {**was.parameters, **{key: now.parameters[key] for key in parameters}}
    assert {key: now.parameters[key].string_value for key in parameters} == parameters
    for other in set(BATCHING) - {name}:
        assert config(target, other) == config(source, other)


@given(
    change=st.fixed_dictionaries(
        {},
        optional={
            "instances": st.integers(max_value=0),
            "queue_delay_us": st.integers(max_value=-1),
            "preferred_batch_sizes": st.lists(st.integers(max_value=0), min_size=1).map(tuple),
            "precision": st.text().filter(lambda text: text not in registry.PRECISIONS),
            "platform": st.sampled_from(["tensorrt", "onnxruntime_onnx", ""]),
            "kind": st.sampled_from(["tpu", "KIND_CPU"]),
            "parameters": st.fixed_dictionaries({"intra_op_thread_count": st.sampled_from(["-1", "", "two", "1.5"])}),
        },
    ).filter(bool)
)
def test_what_no_model_can_have_is_refused_at_once(change: dict[str, Any]) -> None:
    with pytest.raises(DeriveError, match="expected"):
        ModelChange(**change)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gaze": ModelChange(instances=2)}, "has no model gaze"),
        ({"animate": ModelChange(instances=2)}, "is an ensemble"),
        ({"framing": ModelChange(queue_delay_us=5)}, "gathers no batches"),
        ({"vad": ModelChange(parameters={"device": "cuda"})}, "vad has no parameter device"),
        ({"framing": ModelChange(parameters={"intra_op_thread_count": "1"})}, "framing has no parameter"),
        ({"vad": ModelChange(queue_delay_us=100)}, "audio_encoder, vad would each wait"),
        ({"avatar_huma1": ModelChange(preferred_batch_sizes=(8,))}, "expected 4 at most"),
        ({"rasterizer": ModelChange(precision="fp32")}, "rasterizer is no net"),
        ({"avatar": ModelChange(kind="gpu")}, "avatar is no net"),
        ({"deformation": ModelChange(precision="int8")}, "not offered in int8"),
        ({"vad": ModelChange(platform="tensorrt_plan")}, "expected the folder"),
        ({"vad": ModelChange(parameters={"trt_builder_optimization_level": "5"})}, "has no parameter trt_builder"),
    ],
)
def test_what_the_repository_cannot_have_is_refused_and_nothing_is_written(
    source: Path, tmp_path: Path, changes: dict[str, ModelChange], reason: str
) -> None:
    with pytest.raises(DeriveError, match=reason):
        derive(tmp_path / "refused", changes, source=source)
    assert not list(tmp_path.iterdir())


def test_a_delay_moves_from_one_stage_to_another(source: Path, tmp_path: Path) -> None:
    changes = {"audio_encoder": ModelChange(queue_delay_us=0), "rasterizer": ModelChange(queue_delay_us=700)}
    derive(tmp_path / "moved", changes, source=source)
    assert config(tmp_path / "moved", "audio_encoder").dynamic_batching.max_queue_delay_microseconds == 0
    assert config(tmp_path / "moved", "rasterizer").dynamic_batching.max_queue_delay_microseconds == 700


def test_the_source_and_what_was_not_derived_are_never_written_over(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    (tmp_path / "file").write_text("dear")
    committed = tmp_path / "committed"
    shutil.copytree(source, committed)
    for target in (source, source.parent, source / "vad", tmp_path / "mine", tmp_path / "file", committed):
        with pytest.raises(DeriveError, match="expected a"):
            derive(target, {}, source=source)
    assert (tmp_path / "mine" / "letter").read_text() == "dear"
    assert (committed / "vad" / "1" / "model.onnx").is_file()


def test_a_derived_repository_is_replaced_as_a_whole(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "derived"
    derive(target, {"vad": ModelChange(precision="int8")}, source=source)
    derive(target, {"vad": ModelChange(instances=3)}, source=source)
    assert config(target, "vad").instance_group[0].count == 3
    assert sorted(path.name for path in (target / "vad" / "1").iterdir()) == [
        *(path.name for path in sorted((source / "vad" / "1").iterdir()))
    ]
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_write_leaves_what_was_there(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "derived"
    derive(target, {"vad": ModelChange(instances=3)}, source=source)

    def full(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(derive_module, "_link", full)
    with pytest.raises(OSError, match="full"):
        derive(target, {}, source=source)
    assert config(target, "vad").instance_group[0].count == 3
    assert list(tmp_path.iterdir()) == [target]


def test_files_are_copied_where_they_cannot_be_linked(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", link)
    derive(tmp_path / "copied", {}, source=source)
    copied, original = (folder / "asr_decoder" / "1" / "model.onnx" for folder in (tmp_path / "copied", source))
    assert copied.read_bytes() == original.read_bytes()
    assert copied.stat().st_ino != original.stat().st_ino


@pytest.mark.parametrize(("precision", "level"), [("fp16", 1), ("int8", 0)])
def test_another_precision_is_served_beside_the_file_in_fp32(
    source: Path, tmp_path: Path, precision: registry.Precision, level: int
) -> None:
    derive(tmp_path / "small", {"vad": ModelChange(precision=precision, kind="cpu")}, source=source)
    vad, folder = config(tmp_path / "small", "vad"), tmp_path / "small" / "vad" / "1"
    assert (folder / vad.default_model_filename).read_text() == f"vad in {precision}"
    assert (folder / "model.onnx").read_text() == "vad in fp32"  # which `asr` runs in process
    assert vad.optimization.graph.level == level  # at 0, all optimisations, ONNX Runtime crashes on fp16
    assert vad.instance_group[0].kind == ModelInstanceGroup.KIND_CPU


def test_a_precision_that_was_not_exported_is_named_with_the_command(source: Path, tmp_path: Path) -> None:
    bare = tmp_path / "model_repository"
    shutil.copytree(source, bare)
    with pytest.raises(DeriveError, match="talksplat-export models --precision int8"):
        derive(tmp_path / "derived", {"vad": ModelChange(precision="int8")}, source=bare)


def test_a_plan_is_served_with_its_provenance_by_the_tensorrt_backend(
    source: Path, plans: Path, tmp_path: Path
) -> None:
    change = ModelChange(platform="tensorrt_plan", precision="fp16", preferred_batch_sizes=(8,), cuda_graphs=True)
    derive(tmp_path / "planned", {"deformation": change}, source=source, plans=plans)
    model, folder = config(tmp_path / "planned", "deformation"), tmp_path / "planned" / "deformation" / "1"
    assert (model.backend, model.default_model_filename) == ("tensorrt", PLAN)
    assert [group.kind for group in model.instance_group] == [ModelInstanceGroup.KIND_GPU]
    assert "intra_op_thread_count" not in model.parameters
    assert json.loads((folder / f"{PLAN}.json").read_text())["plan_sha256"] == sha256((folder / PLAN).read_bytes())
    cuda = model.optimization.cuda
    assert cuda.graphs
    assert cuda.output_copy_stream
    usual = registry.graph("deformation").ranges[registry.BATCH].usual
    assert [(spec.graph_lower_bound.batch_size, spec.batch_size) for spec in cuda.graph_spec] == [
        *((1, 1), (2, usual), (usual + 1, 8))  # each batch up to 8 fits one graph
    ]
    for spec in cuda.graph_spec:
        for inputs in (spec.input, spec.graph_lower_bound.input):
            assert {name: list(shape.dim) for name, shape in inputs.items()} == {
                tensor.name: list(tensor.dims) for tensor in model.input
            }


@pytest.mark.parametrize("name", sorted(set(NETS) - set(FIXED)))
def test_no_cuda_graph_is_captured_for_inputs_of_changing_size(
    source: Path, plans: Path, tmp_path: Path, name: str
) -> None:
    change = ModelChange(platform="tensorrt_plan", cuda_graphs=True)
    with pytest.raises(DeriveError, match="changing size"):
        derive(tmp_path / "derived", {name: change}, source=source, plans=plans)


def provenance(plans: Path, **changes: object) -> None:
    beside = plans / "vad" / "1" / f"{PLAN}.json"
    record = json.loads(beside.read_text()) | changes
    beside.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda plans: (plans / "vad" / "1" / f"{PLAN}.json").unlink(), "no plan with provenance"),
        (lambda plans: (plans / "vad" / "1" / PLAN).unlink(), "no plan with provenance"),
        (lambda plans: (plans / "vad" / "1" / f"{PLAN}.json").write_text("["), "is no provenance"),
        (lambda plans: provenance(plans, onnx_sha256=None), "is no provenance"),
        (lambda plans: provenance(plans, onnx_sha256=sha256(b"another")), "built from another graph"),
        (lambda plans: provenance(plans, plan_sha256=sha256(b"another")), "is not the plan of the provenance"),
        (lambda plans: provenance(plans, precision="fp32"), "was built in fp32"),
        (lambda plans: provenance(plans, precision=["fp16"]), "was built in"),
    ],
)
def test_a_plan_that_may_be_another_graphs_is_refused(
    source: Path, plans: Path, tmp_path: Path, spoil: Any, reason: str
) -> None:
    spoiled = tmp_path / "plans"
    shutil.copytree(plans, spoiled)
    spoil(spoiled)
    change = ModelChange(platform="tensorrt_plan", precision="fp16")
    with pytest.raises(DeriveError, match=reason):
        derive(tmp_path / "derived", {"vad": change}, source=source, plans=spoiled)
    assert not (tmp_path / "derived").exists()


@pytest.mark.parametrize("name", NETS)
def test_onnxruntimes_tensorrt_gets_the_registrys_profile_and_the_graphs_own_types(
    source: Path, tmp_path: Path, name: str
) -> None:
    change = ModelChange(
        platform="onnxruntime_tensorrt", precision="fp16", parameters={"trt_builder_optimization_level": "5"}
    )
    derive(tmp_path / "accelerated", {name: change}, source=source)
    model = config(tmp_path / "accelerated", name)
    assert model.backend == "onnxruntime"
    assert "trt_builder_optimization_level" not in model.parameters
    [accelerator] = model.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"
    assert set(accelerator.parameters) <= ACCELERATOR_25_10
    assert accelerator.parameters["precision_mode"] == "FP32"  # FP16 would let TensorRT choose
    assert accelerator.parameters["trt_builder_optimization_level"] == "5"
    read = [
        dict(shape.split(":") for shape in accelerator.parameters[f"trt_profile_{end}_shapes"].split(","))
        for end in ("min", "opt", "max")
    ]
    assert {
        each: tuple(tuple(map(int, shapes[each].split("x"))) for shapes in read) for each in read[0]
    } == registry.graph(name).profile()


def test_the_parameters_that_may_be_set_are_ones_that_the_backend_reads() -> None:
    assert set(derive_module._ACCELERATOR) <= ACCELERATOR_25_10


def set_fields(message: Any, prefix: str = "") -> set[tuple[str, str]]:
    """Every field that is set, with the path of its message."""
    found = set()
    for field, value in message.ListFields():
        found.add((prefix, field.name))
        path = f"{prefix}.{field.name}".lstrip(".")
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for each in value if field.is_repeated else [value]:
            found |= set_fields(each, path)
    return found


@pytest.mark.parametrize("target", derive_module.NAMED)
def test_a_named_target_changes_every_net_and_uses_fields_that_triton_2_62_has(
    source: Path, plans: Path, tmp_path: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["derive", target, "--output", str(tmp_path / "there"), "--repository", str(source)]
    assert cli.main([*command, "--plans", str(plans)]) == 0
    assert target in capsys.readouterr().out
    for name in named(target):
        was, now = config(source, name), config(tmp_path / "there", name)
        assert now != was
        for message, field in set_fields(now) - set_fields(was):
            assert field in FIELDS_2_62[message], f"{message}.{field}"
    if target != "cpu-int8":
        assert set(NETS) < set(named(target))
        assert config(tmp_path / "there", "asr").parameters["networks"].string_value == "triton"
        assert config(tmp_path / "there", "rasterizer").parameters["device"].string_value == "cuda"


def test_the_command_says_what_is_missing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["derive", "tensorrt", "--output", str(tmp_path / "there"), "--repository", str(source)]
    assert cli.main(command) == 1
    assert "expected the folder" in capsys.readouterr().err
    assert not (tmp_path / "there").exists()
