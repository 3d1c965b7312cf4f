"""The studies of GPUs, as far as they can be looked at without one: every repository that they serve is derived."""

import hashlib
import itertools
import json
import shutil
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from talksplat.server import ROOT
from talksplat_export import experiment, models
from talksplat_export.registry import PRECISIONS
from talksplat_export.study import NETS, Study


@pytest.fixture
def fake_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files that are no plans, of ONNX files that are none, with true hashes: there is no GPU to build any on."""
    plans = tmp_path / "plans"
    for name, precision in itertools.product(NETS, PRECISIONS):
        onnx, plan = tmp_path / f"{precision}-{name}.onnx", plans / precision / name / "1" / "model.plan"
        plan.parent.mkdir(parents=True)
        for path in (onnx, plan):
            path.write_text(f"{path.suffix} of {name} in {precision}")
        hashes = {key: hashlib.sha256(path.read_bytes()).hexdigest() for key, path in (("onnx", onnx), ("plan", plan))}
        record = {"precision": precision, **{f"{key}_sha256": digest for key, digest in hashes.items()}}
        plan.with_name("model.plan.json").write_text(json.dumps(record))
    monkeypatch.setattr(models, "path", lambda name, precision, source: tmp_path / f"{precision}-{name}.onnx")
    return plans


@pytest.mark.parametrize("name", ["gpu-precision", "gpu-batching"])
def test_every_repository_of_the_gpu_studies_can_be_derived(name: str, fake_plans: Path) -> None:
    study = Study.read(ROOT / "export" / "experiments" / f"{name}.toml")
    assert experiment.check(study, fake_plans) == {study.label(point): None for point in study.points}
    with experiment._derived(study.baseline, fake_plans) as repository:
        assert (repository / "vad" / "1" / "model.plan").read_text() == ".plan of vad in fp16"
        config = text_format.Parse((repository / "vad" / "config.pbtxt").read_text(), ModelConfig())
        assert config.backend == "tensorrt"
        rasterizer = text_format.Parse((repository / "rasterizer" / "config.pbtxt").read_text(), ModelConfig())
        assert rasterizer.parameters["device"].string_value == "cuda"


def test_a_plan_that_is_not_there_is_a_reason(fake_plans: Path) -> None:
    study = Study.read(ROOT / "export" / "experiments" / "gpu-precision.toml")
    shutil.rmtree(fake_plans / "int8" / "vad")
    found = experiment.check(study, fake_plans)
    assert {label for label, reason in found.items() if reason} == {"vad int8", "audio_encoder int8, vad int8"}
    assert "talksplat-export tensorrt --plans" in str(found["vad int8"])
