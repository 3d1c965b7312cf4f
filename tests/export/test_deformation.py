from pathlib import Path

import numpy as np
import torch

from talksplat.avatar import COEFFICIENTS, FEATURES, HIDDEN
from talksplat.clock import CHUNK_FRAMES
from talksplat_export import feeds
from talksplat_export.deformation import Deformation


def random_inputs(batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return {
        "FEATURES": torch.randn(batch, CHUNK_FRAMES, FEATURES, generator=generator),
        "ADAPTER_IN": 0.2 * torch.randn(batch, FEATURES + 1, HIDDEN, generator=generator),
        "ADAPTER_OUT": torch.randn(batch, HIDDEN + 1, COEFFICIENTS, generator=generator),
    }


def test_it_is_a_two_layer_network_with_the_biases_in_the_last_rows() -> None:
    inputs = random_inputs(2)
    first, second = inputs["ADAPTER_IN"].double().numpy(), inputs["ADAPTER_OUT"].double().numpy()
    features = inputs["FEATURES"].double().numpy()
    expected = np.stack(
        [
            np.tanh(features[row] @ first[row, :FEATURES] + first[row, FEATURES]) @ second[row, :HIDDEN]
            + second[row, HIDDEN]
            for row in range(2)
        ]
    )
    np.testing.assert_allclose(Deformation()(*inputs.values()).numpy(), expected, atol=1e-4)


def test_export_has_the_promised_tensors_and_computes_the_same(repository: Path) -> None:
    session = feeds.session(repository / "deformation" / "1" / "model.onnx")
    assert {x.name: x.shape[1:] for x in session.get_inputs()} == {
        "FEATURES": [4, 128],
        "ADAPTER_IN": [129, 64],
        "ADAPTER_OUT": [65, 20],
    }
    assert {x.name: x.shape[1:] for x in session.get_outputs()} == {"COEFFICIENTS": [4, 20]}
    for batch in (1, 3, 16):
        inputs = random_inputs(batch)
        expected = Deformation()(*inputs.values()).numpy()
        (actual,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        np.testing.assert_allclose(actual, expected, atol=5e-5 * np.abs(expected).max(), rtol=0)


def test_a_row_of_a_batch_does_not_depend_on_its_neighbours(repository: Path) -> None:
    session = feeds.session(repository / "deformation" / "1" / "model.onnx")
    inputs = {name: tensor.numpy() for name, tensor in random_inputs(8).items()}
    (together,) = session.run(None, inputs)
    for row in range(8):
        (alone,) = session.run(None, {name: array[row : row + 1] for name, array in inputs.items()})
        np.testing.assert_allclose(together[row], alone[0], atol=1e-5)
