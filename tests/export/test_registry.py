"""The registry against what is committed: the configs that Triton reads, and the sizes that its parts promise."""

import re

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from talksplat.server import ROOT
from talksplat_export import registry
from talksplat_export.registry import BATCH, GRAPHS, Graph, Tensor

DTYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}

every = pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.name)


@every
def test_the_config_has_the_graphs_tensors_and_its_largest_batch(graph: Graph) -> None:
    config = text_format.Parse((ROOT / "model_repository" / graph.name / "config.pbtxt").read_text(), ModelConfig())

    def promised(tensor: Tensor) -> tuple[str, str, list[int]]:
        return tensor.name, DTYPES[tensor.dtype], [dim if isinstance(dim, int) else -1 for dim in tensor.dims]

    for found, wanted in ((config.input, graph.inputs), (config.output, graph.outputs)):
        read = [(each.name, DataType.Name(each.data_type), list(each.dims)) for each in found]
        assert read == [promised(tensor) for tensor in wanted]
    assert config.max_batch_size == graph.ranges[BATCH].most


def test_every_onnx_model_of_the_repository_is_in_the_registry() -> None:
    configs = {path.parent.name: path.read_text() for path in (ROOT / "model_repository").glob("*/config.pbtxt")}
    served = {name for name, text in configs.items() if re.search(r'^backend: "onnxruntime"', text, re.MULTILINE)}
    assert served == {graph.name for graph in GRAPHS}


@every
def test_the_profile_rises_from_least_to_most_in_every_dim(graph: Graph) -> None:
    profile = graph.profile()
    assert list(profile) == [tensor.name for tensor in graph.inputs]
    for shapes in profile.values():
        least, usual, most = map(np.array, shapes)
        assert (least <= usual).all()
        assert (usual <= most).all()
    named = {dim for tensor in graph.inputs for dim in tensor.dims if isinstance(dim, str)}
    assert set(graph.ranges) == named | {BATCH}


@every
def test_what_is_kept_in_fp32_is_of_a_precision_that_is_offered(graph: Graph) -> None:
    assert "fp32" in graph.tolerances
    assert set(graph.keep) <= set(graph.tolerances) - {"fp32"}


def test_there_is_no_other_graph() -> None:
    with pytest.raises(KeyError):
        registry.graph("no_such_graph")
