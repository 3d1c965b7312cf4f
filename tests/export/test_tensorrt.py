"""Plans, as far as they can be made without a GPU.

Run for real: the whole builder, by TensorRT-RTX, which speaks TensorRT's API; every name and signature of that API
against the pinned bindings of TensorRT. Not run here: TensorRT's own builder, and a plan on a GPU; where that is
needed, ONNX Runtime stands in. `test_plans_are_right_on_this_gpu` runs it all where there is a GPU.
"""

import ast
import contextlib
import ctypes
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from rich.console import Console

from talksplat_export import _trt, cli, feeds, models, registry, tensorrt
from talksplat_export._trt import MissingTensorRTError
from talksplat_export.feeds import Feed
from talksplat_export.registry import Graph, Precision
from talksplat_export.tensorrt import Options, PlanError, Results, Run

pytestmark = pytest.mark.filterwarnings("ignore:Use .* instead:DeprecationWarning")  # RTX measures, and keeps, nothing

DEFORMATION = registry.graph("deformation")
QUIET = Console(quiet=True)


def tensorrt_rtx_instead() -> ModuleType:
    """TensorRT-RTX in TensorRT's place, told which GPU to build for, as there is none."""
    rtx = importlib.import_module("tensorrt_rtx")

    def create_builder_config(self: Any) -> Any:
        config = rtx.Builder.create_builder_config(self)
        config.num_compute_capabilities = 1
        config.set_compute_capability(rtx.ComputeCapability.SM86, 0)
        return config

    module = ModuleType("tensorrt")
    vars(module).update(vars(rtx))
    vars(module)["Builder"] = type("Builder", (rtx.Builder,), {"create_builder_config": create_builder_config})
    return module


class OnnxRuntimeInsteadOfGpu:
    """Runs the graph where a GPU would run the plan; `spoil` is what the GPU gets wrong."""

    def __init__(self, repository: Path) -> None:
        self.trt = tensorrt_rtx_instead()
        self.facts = {
            "tensorrt": "10.13.3.9",
            "cuda": "13.0",
            "driver": "580.95.05",
            "gpu": "none, ONNX Runtime",
            "compute_capability": "8.6",
        }
        self.repository = repository
        self.loaded: list[str] = []
        self.spoil: dict[str, Callable[[npt.NDArray[Any]], npt.NDArray[Any]]] = {}

    def describe(self) -> dict[str, str]:
        return dict(self.facts)

    def load(self, plan: bytes, graph: Graph) -> Run:
        assert len(plan) > 1_000
        self.loaded.append(graph.name)
        session = feeds.session(models.path(graph.name, "fp32", self.repository))
        spoil = self.spoil.get(graph.name, np.asarray)

        def run(feed: Feed) -> Results:
            return [spoil(array) for array in session.run([tensor.name for tensor in graph.outputs], feed)]

        return run


@pytest.fixture
def device(repository: Path) -> OnnxRuntimeInsteadOfGpu:
    return OnnxRuntimeInsteadOfGpu(repository)


@pytest.fixture(autouse=True)
def _short_speech(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some seconds of the unheard half are enough to tell right from wrong."""
    heard, unheard = feeds.halves()
    monkeypatch.setattr(feeds, "halves", lambda: (heard, unheard[: 5 * 16_000]))


def build(device: OnnxRuntimeInsteadOfGpu, folder: Path, graph: Graph = DEFORMATION, **further: Any) -> str:
    row = tensorrt.build(graph, "fp32", folder, device, repository=device.repository, **further)
    return str(row["state"])


def test_a_plan_lies_beside_where_it_comes_from(device: OnnxRuntimeInsteadOfGpu, tmp_path: Path) -> None:
    assert build(device, tmp_path) == "built"
    plan = tmp_path / "deformation" / "1" / "model.plan"
    record = json.loads(plan.with_name("model.plan.json").read_text())
    assert record.items() >= device.facts.items()
    assert record["precision"] == "fp32"
    assert record["profile"]["FEATURES"] == [[1, 4, 128], [4, 4, 128], [192, 4, 128]]
    assert record["options"] == {"version_compatible": False, "hardware": "none"}
    assert record["onnx_sha256"] == sha256(models.path("deformation", "fp32", device.repository))
    assert record["plan_sha256"] == sha256(plan)
    assert record["deviations"] == [{"output": "COEFFICIENTS", "difference": 0.0, "correlation": 1.0}]
    assert (tmp_path / "timing.cache").is_file()
    assert {path.name for path in plan.parent.iterdir()} == {"model.plan", "model.plan.json"}


def sha256(path: Path) -> str:
    return subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]


def test_what_is_still_right_is_left_alone_and_what_is_not_is_built_anew(
    device: OnnxRuntimeInsteadOfGpu, tmp_path: Path
) -> None:
    plan = tmp_path / "deformation" / "1" / "model.plan"
    assert build(device, tmp_path) == "built"
    device.facts["driver"] = "590.1"  # a plan outlives it
    assert build(device, tmp_path) == "kept"
    assert device.loaded == ["deformation"]
    for key, value in (("tensorrt", "10.14.1"), ("gpu", "another"), ("compute_capability", "8.9")):
        device.facts[key] = value
        assert build(device, tmp_path) == "built", key
    assert build(device, tmp_path, options=Options(hardware="ampere-plus")) == "built"
    assert build(device, tmp_path, options=Options(hardware="ampere-plus")) == "kept"
    ranges = {registry.BATCH: registry.Range(1, 4, 8)}
    assert build(device, tmp_path, replace(DEFORMATION, ranges=ranges)) == "built"  # another profile
    stricter: dict[Precision, registry.Tolerance] = {"fp32": registry.Tolerance(difference=1e-6)}
    assert build(device, tmp_path, replace(DEFORMATION, tolerances=stricter)) == "built"
    assert build(device, tmp_path) == "built"
    plan.write_bytes(plan.read_bytes()[:-1])
    assert build(device, tmp_path) == "built"
    plan.with_name("model.plan.json").unlink()
    assert build(device, tmp_path) == "built"
    plan.with_name("model.plan.json").write_text("{")
    assert build(device, tmp_path) == "built"


def test_another_graph_is_another_plan(device: OnnxRuntimeInsteadOfGpu, tmp_path: Path) -> None:
    repository = tmp_path / "model_repository"
    for name in ("deformation", "audio_encoder"):
        file = models.path(name, "fp32", repository)
        file.parent.mkdir(parents=True)
        shutil.copy(models.path(name, "fp32", device.repository), file)
    device.repository = repository
    assert build(device, tmp_path / "plans") == "built"
    file = models.path("deformation", "fp32", repository)
    proto = onnx.load(file)
    proto.producer_version = "another"
    file.write_bytes(proto.SerializeToString())
    assert build(device, tmp_path / "plans") == "built"


SPOILT: dict[str, tuple[Callable[[npt.NDArray[Any]], npt.NDArray[Any]], str]] = {
    "a little off": (lambda array: array + np.float32(1e-3) * np.abs(array).max(), "COEFFICIENTS differs"),
    "not a number": (lambda array: array * np.float32(np.nan), "COEFFICIENTS differs"),
    "another shape": (lambda array: array[:, :3], r"COEFFICIENTS is \(\d+, 3, 20\) where"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_plan_that_computes_something_else_is_never_written(
    how: str, device: OnnxRuntimeInsteadOfGpu, tmp_path: Path
) -> None:
    spoil, message = SPOILT[how]
    device.spoil["deformation"] = spoil
    with pytest.raises(PlanError, match=message):
        build(device, tmp_path)
    assert not list(tmp_path.rglob("model.plan*"))
    device.spoil.clear()
    build(device, tmp_path)
    before = sha256(tmp_path / "deformation" / "1" / "model.plan")
    device.facts["gpu"], device.spoil["deformation"] = "another", spoil
    with pytest.raises(PlanError, match=message):
        build(device, tmp_path)
    assert sha256(tmp_path / "deformation" / "1" / "model.plan") == before  # with its provenance, which says of whom


def test_int8_is_held_to_its_correlation(device: OnnxRuntimeInsteadOfGpu) -> None:
    vad = registry.graph("vad")
    draw = np.random.default_rng(0)
    right = device.load(bytes(2_000), vad)

    def noisy(share: float) -> Run:
        return lambda feed: [array + share * draw.standard_normal(array.shape, np.float32) for array in right(feed)]

    for found in tensorrt.check(noisy(0.01), vad, "int8", device.repository):
        assert 0.99 < found.correlation < 1
    with pytest.raises(PlanError, match="correlates by"):
        tensorrt.check(noisy(0.5), vad, "int8", device.repository)


def test_one_that_fails_does_not_stop_the_others(
    device: OnnxRuntimeInsteadOfGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device.spoil["audio_encoder"] = lambda array: array * 2
    monkeypatch.setattr(tensorrt, "Gpu", lambda: device)
    command = ["tensorrt", "--plans", str(tmp_path), "--repository", str(device.repository), "--precision", "fp32"]
    assert cli.main([*command, "--only", "audio_encoder", "deformation"]) == 1
    said = capsys.readouterr().out
    assert "audio_encoder: fp32: FEATURES differs from ONNX Runtime" in said
    assert "deformation: built" in said
    assert [path.parts[-3] for path in tmp_path.rglob("model.plan")] == ["deformation"]
    device.spoil.clear()
    assert cli.main([*command, "--only", "audio_encoder", "deformation"]) == 0
    said = capsys.readouterr().out
    assert "audio_encoder: built" in said
    assert "deformation: kept" in said


def test_a_graph_that_does_not_parse_is_a_row(device: OnnxRuntimeInsteadOfGpu, tmp_path: Path) -> None:
    repository = tmp_path / "model_repository"
    file = models.path("vad", "fp32", repository)
    file.parent.mkdir(parents=True)
    file.write_bytes(models.path("vad", "fp32", device.repository).read_bytes()[:-100])
    rows = tensorrt.build_all(
        [registry.graph("vad"), DEFORMATION], "fp32", tmp_path, device, QUIET, repository=repository
    )
    assert [row["state"] for row in rows] == ["failed", "failed"]
    assert "talksplat-export models --precision fp32" in str(rows[1]["problem"])  # is missing there


def test_where_a_precision_is_not_offered_the_next_finer_one_is_built(
    device: OnnxRuntimeInsteadOfGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "build", lambda _, precision, *__: {"state": precision})
    rows = tensorrt.build_all([registry.graph("vad"), DEFORMATION], "int8", tmp_path, device, QUIET)
    assert [row["state"] for row in rows] == ["int8", "fp16"]


def test_where_a_plan_is_too_far_off_the_next_finer_precision_is_built(
    device: OnnxRuntimeInsteadOfGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(graph: Any, precision: str, *_: object) -> dict[str, str]:
        if precision in ("int8", "fp16") or graph is DEFORMATION:
            raise tensorrt.PlanError("it differs")
        return {"state": precision}

    monkeypatch.setattr(tensorrt, "build", build)
    rows = tensorrt.build_all([registry.graph("vad"), DEFORMATION], "int8", tmp_path, device, QUIET)
    assert rows[0] == {"state": "fp32", "refused": "int8: it differs; fp16: it differs"}
    assert (rows[1]["state"], rows[1]["problem"]) == ("failed", "fp16: it differs; fp32: it differs")


def test_options_reach_tensorrt() -> None:
    class ConfigInstead:
        """An `IBuilderConfig` that remembers; TensorRT-RTX knows no compatible hardware."""

        def __init__(self) -> None:
            self.flags = {trt.BuilderFlag.TF32}
            self.set_flag, self.clear_flag = self.flags.add, self.flags.discard

    trt = tensorrt_rtx_instead()
    levels = trt.HardwareCompatibilityLevel
    for options, flags, level in (
        (Options(), set(), levels.NONE),
        (Options(version_compatible=True), {trt.BuilderFlag.VERSION_COMPATIBLE}, levels.NONE),
        (Options(hardware="ampere-plus"), set(), levels.AMPERE_PLUS),
        (Options(hardware="same-compute-capability"), set(), levels.SAME_COMPUTE_CAPABILITY),
    ):
        config: Any = ConfigInstead()
        tensorrt.configure(trt, config, options)
        assert (config.flags, config.hardware_compatibility_level) == (flags, level)


def test_timings_are_kept_and_forgotten_on_another_gpu(tmp_path: Path) -> None:
    class ConfigInstead:
        """An `IBuilderConfig` of a GPU whose timings begin with its name."""

        def __init__(self, gpu: bytes) -> None:
            self.gpu = gpu
            self.cache = b""

        def create_timing_cache(self, data: bytes) -> bytes:
            return data or self.gpu

        def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            self.cache = cache if cache.startswith(self.gpu) else self.cache
            return self.cache == cache

        def get_timing_cache(self) -> SimpleNamespace:
            return SimpleNamespace(serialize=lambda: self.cache + b"+")  # as this build has measured something

    found = []
    for gpu in (b"A", b"A", b"B"):
        timings = tensorrt._Timings(tmp_path / "timing.cache")
        timings.attach(ConfigInstead(gpu))
        timings.save()
        found.append((tmp_path / "timing.cache").read_bytes())
    assert found == [b"A+", b"A++", b"B+"]


class EngineInstead:
    """Runtime, engine and context in one: finds its tensors at the addresses it is given, in the CPU's memory."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.inputs = {each.name: each.type for each in session.get_inputs()}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.results: dict[str, npt.NDArray[Any]] = {}

    def deserialize_cuda_engine(self, plan: bytes) -> "EngineInstead | None":
        return self if plan else None

    def create_execution_context(self) -> "EngineInstead":
        return self

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return len(shape) > 0 and shape[0] <= 8  # of the profile

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address != 0

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if not self.results:
            feed = {name: np.zeros(self.shapes[name], self._dtype(name)) for name in self.inputs}
            names = [each.name for each in self.session.get_outputs()]
            self.results = dict(zip(names, self.session.run(names, feed), strict=True))
        return self.results[name].shape

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert all(self.addresses.values())
        feed = {}
        for name in self.inputs:
            feed[name] = np.empty(self.shapes[name], self._dtype(name))
            ctypes.memmove(feed[name].ctypes.data, self.addresses[name], feed[name].nbytes)
        names = list(self.results)
        for name, array in zip(names, self.session.run(names, feed), strict=True):
            ctypes.memmove(self.addresses[name], np.ascontiguousarray(array).ctypes.data, array.nbytes)
        self.results = {}
        return True

    def _dtype(self, name: str) -> str:
        return {"tensor(float)": "float32", "tensor(int64)": "int64"}[self.inputs[name]]


@pytest.fixture
def cpu_instead_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(cuda_stream=1, synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "cuda", torch.Tensor.clone)


@pytest.mark.usefixtures("cpu_instead_of_cuda")
def test_a_plan_gets_its_inputs_and_gives_its_outputs_empty_ones_too(repository: Path) -> None:
    graph = registry.graph("asr_decoder")  # an int64 input, and a cache that is empty at first
    session = feeds.session(models.path(graph.name, "fp32", repository))
    trt: Any = SimpleNamespace(ILogger=importlib.import_module("tensorrt_rtx").ILogger)
    trt.Runtime = lambda _: EngineInstead(session)
    run = tensorrt._Plan(trt, b"plan", graph)
    draw = np.random.default_rng(0)
    batches: list[Feed] = [
        {
            "TOKEN": draw.integers(3, 30_000, (size, 1)),
            "CROSS_KV": draw.standard_normal((size, 2, 8, 8, 5, 52), np.float32),
            "PAST_KV": draw.standard_normal((size, 2, 8, 8, past, 52), np.float32),
        }
        for size, past in ((2, 0), (1, 3))
    ]
    for feed in batches:
        for mine, theirs in zip(run(feed), session.run(None, feed), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    with pytest.raises(PlanError, match=r"does not take TOKEN of \(9, 1\)"):
        run({name: np.repeat(array[:1], 9, 0) for name, array in batches[0].items()})
    with pytest.raises(PlanError, match="does not load"):
        tensorrt._Plan(trt, b"", graph)


# ---- TensorRT's own API, as the pinned bindings have it


@pytest.fixture(scope="module")
def bindings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of empty libraries with the names of TensorRT's, over which its bindings can be imported."""
    folder = tmp_path_factory.mktemp("libraries")
    symbols = ("getNvOnnxParserVersion", "getPluginRegistry", "getBuilderPluginRegistry", "initLibNvInferPlugins")
    source = "".join(f"void *{symbol}() {{ return 0; }}\n" for symbol in symbols)
    (folder / "nvinfer.c").write_text(source + "int getInferLibVersion() { return 101303; }\n")
    for name in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
        library = f"lib{name}.so.10"
        code = folder / "nvinfer.c" if name == "nvinfer" else "/dev/null"
        subprocess.run(
            ["cc", "-shared", "-x", "c", code, f"-Wl,-soname,{library}", "-o", folder / library], check=True, cwd=folder
        )
    return folder


def over(bindings: Path, code: str) -> str:
    """What ``code`` prints in a process where TensorRT's bindings can be imported."""
    done = subprocess.run(
        [sys.executable, "-c", f"import os, sys\nsys.setdlopenflags(os.RTLD_LAZY)\n{code}"],
        env={"LD_LIBRARY_PATH": str(bindings), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def api(bindings: Path) -> dict[str, dict[str, str]]:
    """By class of the pinned TensorRT: its attributes, and their docstrings, which hold the signatures."""
    code = """if True:
        import json
        import tensorrt_bindings as trt
        print(json.dumps({
            name: {attribute: str(getattr(each, attribute).__doc__) for attribute in dir(each)}
            for name, each in vars(trt).items() if isinstance(each, type)
        } | {"": {name: "" for name in vars(trt)}}))
    """
    return dict(json.loads(over(bindings, code)))


CLASSES = {  # what variables of _trt.py and tensorrt.py are
    "self._builder": "Builder",
    "self._network": "INetworkDefinition",
    "network": "INetworkDefinition",
    "tensor": "ITensor",
    "layer": "ILayer",
    "self._parser": "OnnxParser",
    "error": "ParserError",
    "profile": "IOptimizationProfile",
    "config": "IBuilderConfig",
    "self._config": "IBuilderConfig",
    "interface": "ILogger",
    "self._runtime": "Runtime",
    "self._engine": "ICudaEngine",
    "self._context": "IExecutionContext",
    "context": "IExecutionContext",
}


def uses(module: ModuleType) -> Iterator[tuple[str, str, ast.Call | None]]:
    """Class, attribute and, if it is called, the call, for all that a module wants of TensorRT."""
    tree = ast.parse(inspect.getsource(module))
    calls = {id(each.func): each for each in ast.walk(tree) if isinstance(each, ast.Call)}
    for each in ast.walk(tree):
        if isinstance(each, ast.Attribute):
            owner = ast.unparse(each.value)
            names = re.fullmatch(r"(?:self\.|device\.)?_?trt(?:\.(\w+))?", owner)
            if names is not None and names[1] != "__version__":
                yield names[1] or "", each.attr, calls.get(id(each))
            elif owner in CLASSES:
                yield CLASSES[owner], each.attr, calls.get(id(each))


@pytest.mark.parametrize("module", [_trt, tensorrt])
def test_everything_that_is_used_of_tensorrt_is_in_the_pinned_version(
    module: ModuleType, api: dict[str, dict[str, str]]
) -> None:
    found = list(uses(module))
    assert len(found) > 20
    assert {tensor.dtype for graph in registry.GRAPHS for tensor in (*graph.inputs, *graph.outputs)} <= set(api[""])
    for name, attribute, call in found:
        assert attribute in api[name], f"{name}.{attribute}"
        signature = re.match(rf"{attribute}\(self: [\w.]+(?:, )?(.*)\) -> ", api[name][attribute])
        if call is not None and name and signature is not None:
            parameters = re.findall(r"(\w+): ", signature[1])
            positional = sum(not isinstance(each, ast.Starred) for each in call.args)
            assert positional + len(call.keywords) <= len(parameters), f"{name}.{attribute}"
            assert {each.arg for each in call.keywords} <= set(parameters), f"{name}.{attribute}"


def test_a_name_that_tensorrt_lacks_would_be_found(api: dict[str, dict[str, str]]) -> None:
    assert "set_input_shape" in api["IExecutionContext"]
    assert "execute_async_v2" not in api["IExecutionContext"]  # was TensorRT 8's
    assert "max_workspace_size" not in api["IBuilderConfig"]


def test_bindings_and_libraries_are_of_one_version(bindings: Path) -> None:
    code = """if True:
        import tensorrt_bindings as trt
        from talksplat_export._trt import MissingTensorRTError, check_libraries
        check_libraries(trt)
        trt.__version__ = "10.14.1.48"
        try:
            check_libraries(trt)
        except MissingTensorRTError as error:
            print(error)
    """
    assert over(bindings, code) == "TensorRT's bindings are of 10.14.1, its libraries of 10.13.3.\n"


def test_without_tensorrts_libraries_it_is_said_where_plans_are_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(OSError):
        ctypes.CDLL("libnvinfer.so.10")
        pytest.skip("TensorRT is installed here")
    assert cli.main(["tensorrt", "--plans", str(tmp_path / "plans")]) == 1
    assert "plans are built in the container" in capsys.readouterr().err
    assert not (tmp_path / "plans").exists()


def test_other_versions_of_the_bindings_are_refused_before_anything_is_built() -> None:
    with pytest.raises((MissingTensorRTError, OSError)):
        _trt.check_libraries(SimpleNamespace(__version__="99.1.2.3"))  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.timeout(3_600)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_plans_are_right_on_this_gpu(every_precision: Path, tmp_path: Path) -> None:
    try:
        gpu = tensorrt.Gpu()
    except MissingTensorRTError as error:
        pytest.skip(str(error))
    rows = tensorrt.build_all(registry.GRAPHS, "fp16", tmp_path, gpu, QUIET, repository=every_precision)
    assert [row.get("problem") for row in rows] == [None] * len(registry.GRAPHS)
    rows = tensorrt.build_all(registry.GRAPHS, "fp16", tmp_path, gpu, QUIET, repository=every_precision)
    assert {row["state"] for row in rows} == {"kept"}
