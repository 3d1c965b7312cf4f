"""The model repository, checked without a server: configs, wiring of the ensembles, ONNX files, the clock."""

from collections.abc import Iterable, Sequence
from typing import Any

import onnxruntime as ort
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from talksplat import avatar as bundle
from talksplat import clock, framing
from talksplat.server import ROOT

REPOSITORY = ROOT / "model_repository"
NAMES = sorted(path.parent.name for path in REPOSITORY.glob("*/config.pbtxt"))
ELEMENT_TYPES = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64", "tensor(bool)": "TYPE_BOOL"}


def config(name: str) -> Any:
    return text_format.Parse((REPOSITORY / name / "config.pbtxt").read_text(), ModelConfig())


CONFIGS = {name: config(name) for name in NAMES}
ENSEMBLES = [name for name in NAMES if CONFIGS[name].platform == "ensemble"]
GRAPHS = [name for name in NAMES if CONFIGS[name].backend == "onnxruntime"]


def fits(a: Sequence[int], b: Sequence[int]) -> bool:
    return len(a) == len(b) and all(x == y or -1 in (x, y) for x, y in zip(a, b, strict=True))


def full_dims(tensor: Any, batched: bool) -> list[int]:
    return [-1, *tensor.dims] if batched else list(tensor.dims)


def test_every_model_of_the_design_is_there() -> None:
    assert set(NAMES) == {
        *(
            "vad",
            "audio_encoder",
            "avatar",
            "deformation",
            "rasterizer",
            "framing",
            "asr",
            "asr_encoder",
            "asr_decoder",
        ),
        *("tts", "tts_encoder", "tts_flow", "tts_decoder"),
        *("animate", "transcribe", "speech_to_animation"),
        *("animate_huma1", "avatar_huma1", "deformation_huma1"),
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_config_follows_the_house_rules(name: str) -> None:
    model = CONFIGS[name]
    assert model.name in ("", name)
    assert any(path.is_dir() and path.name.isdigit() for path in (REPOSITORY / name).iterdir())
    assert not model.dynamic_batching.priority_levels
    assert not model.dynamic_batching.HasField("default_queue_policy")  # queue policies stall for 500 ms
    assert not model.model_transaction_policy.decoupled
    if model.max_batch_size and model.platform != "ensemble":
        assert model.HasField("dynamic_batching")
        whole_utterances = not name.startswith(("asr_", "tts_")) and not name.endswith("_huma1")
        assert not whole_utterances or model.max_batch_size * clock.CHUNK_SAMPLES >= framing.MAX_SAMPLES


def test_at_most_one_step_waits_for_company() -> None:
    delays = [name for name in NAMES if CONFIGS[name].dynamic_batching.max_queue_delay_microseconds]
    assert len(delays) <= 1


@pytest.mark.parametrize("name", ENSEMBLES)
def test_the_steps_of_an_ensemble_fit_together_and_form_a_chain(name: str) -> None:
    """No two steps may run at a time: Triton 2.51 loses track of a request whose step fails beside another one."""
    ensemble = CONFIGS[name]
    known = {tensor.name: (tensor, bool(ensemble.max_batch_size)) for tensor in ensemble.input}
    pending = list(ensemble.ensemble_scheduling.step)
    while pending:
        ready = [step for step in pending if set(step.input_map.values()) <= set(known)]
        assert len(ready) == 1, "a tensor has no producer" if not ready else "steps run side by side"
        step = ready[0]
        pending.remove(step)
        model = CONFIGS[step.model_name]
        batched = bool(model.max_batch_size)
        assert model.max_batch_size >= ensemble.max_batch_size
        inputs, outputs = ({tensor.name: tensor for tensor in side} for side in (model.input, model.output))
        assert {tensor.name for tensor in model.input if not tensor.optional} <= set(step.input_map)
        assert not set(step.input_map.values()) & {tensor.name for tensor in ensemble.output}, "see `animate`'s config"
        for own, value in step.input_map.items():
            compare(inputs[own], batched, *known[value])
        for own, value in step.output_map.items():
            known[value] = outputs[own], batched
    for tensor in ensemble.output:
        compare(tensor, bool(ensemble.max_batch_size), *known[tensor.name])


def compare(wanted: Any, wanted_batched: bool, given: Any, given_batched: bool) -> None:
    label = f"{given.name} -> {wanted.name}"
    assert DataType.Name(wanted.data_type) == DataType.Name(given.data_type), label
    assert fits(full_dims(wanted, wanted_batched), full_dims(given, given_batched)), label


@pytest.mark.parametrize("name", GRAPHS)
def test_a_config_says_what_its_graph_has(name: str) -> None:
    path = REPOSITORY / name / "1" / (CONFIGS[name].default_model_filename or "model.onnx")
    assert path.is_file(), f"{path.name} of {name} is not exported: run `make models`"
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    batched = bool(CONFIGS[name].max_batch_size)
    for tensors, nodes in (
        (CONFIGS[name].input, session.get_inputs()),
        (CONFIGS[name].output, session.get_outputs()),
    ):
        assert {tensor.name: described(tensor, batched) for tensor in tensors} == graph_tensors(nodes)


def described(tensor: Any, batched: bool) -> tuple[str, list[int]]:
    return DataType.Name(tensor.data_type), full_dims(tensor, batched)


def graph_tensors(nodes: Iterable[Any]) -> dict[str, tuple[str, list[int]]]:
    return {
        node.name: (ELEMENT_TYPES[node.type], [size if isinstance(size, int) else -1 for size in node.shape])
        for node in nodes
    }


@pytest.mark.parametrize("name", [kind.model for kind in bundle.PROFILES.values()])
def test_animate_tells_clients_the_clock(name: str) -> None:
    told = {key: int(parameter.string_value) for key, parameter in CONFIGS[name].parameters.items()}
    assert told == {
        "sample_rate": clock.SAMPLE_RATE,
        "fps": clock.FPS,
        "chunk_frames": clock.CHUNK_FRAMES,
        "left_context": clock.LEFT_CONTEXT,
        "look_ahead": clock.LOOK_AHEAD,
        "max_utterance_seconds": clock.MAX_UTTERANCE_SECONDS,
    }


def test_clients_use_every_profile_alike() -> None:
    huma2, huma1 = (CONFIGS[bundle.PROFILES[profile].model] for profile in ("huma2", "huma1"))
    assert (list(huma1.input), list(huma1.output)) == (list(huma2.input), list(huma2.output))


def test_the_configs_of_huma1_have_the_sizes_of_clock_and_bundle() -> None:
    net = CONFIGS["deformation_huma1"]
    dims = {tensor.name: tuple(tensor.dims) for side in (net.input, net.output) for tensor in side}
    assert dims == {
        "HIDDEN": (bundle.WINDOW_TOKENS, bundle.SPEECH_WIDTH),
        "TABLE": (bundle.HUMA1_FEATURES, -1),
        **{name.upper(): shape for name, shape in bundle.HUMA1_WEIGHTS.items()},
        "OFFSETS": (clock.CHUNK_FRAMES, bundle.ATTRIBUTES, -1),
    }


def test_the_configs_have_the_sizes_of_clock_and_bundle() -> None:
    dims = {
        tensor.name: list(tensor.dims)
        for name in ("animate", "deformation")
        for side in (CONFIGS[name].input, CONFIGS[name].output)
        for tensor in side
    }
    assert dims["AUDIO"] == [clock.WINDOW]
    assert dims["FRAMES"] == dims["SPEECH"] == [clock.CHUNK_FRAMES]
    assert dims["FEATURES"] == [clock.CHUNK_FRAMES, bundle.FEATURES]
    assert dims["ADAPTER_IN"] == [bundle.FEATURES + 1, bundle.HIDDEN]
    assert dims["ADAPTER_OUT"] == [bundle.HIDDEN + 1, bundle.COEFFICIENTS]
    assert dims["COEFFICIENTS"] == [clock.CHUNK_FRAMES, bundle.COEFFICIENTS]
