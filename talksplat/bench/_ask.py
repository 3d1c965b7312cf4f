"""Single requests to a server: operations, and chunks of a stream."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton
from tritonclient.utils import np_to_triton_dtype

from talksplat import clock


def operate(client: triton.InferenceServerClient, operation: str, avatar: str) -> float:
    """Milliseconds that the operation took."""
    return _ask(client, "rasterizer", {"AVATAR": _name(avatar)}, {"operation": operation})


def animate(
    client: triton.InferenceServerClient,
    avatar: str,
    chunk: int,  # of the stream, from 0
    size: int,  # pixels a side
    model: str = "animate",
) -> float:
    """Milliseconds until the frames of a chunk of noise were here."""
    audio = np.random.default_rng(chunk).normal(scale=0.1, size=(1, clock.WINDOW)).astype(np.float32)
    index = np.array([[chunk * clock.CHUNK_FRAMES]], np.int64)
    return _ask(client, model, {"AUDIO": audio, "AVATAR": _name(avatar), "FRAME_INDEX": index}, {"size": size})


def _name(avatar: str) -> npt.NDArray[np.object_]:
    return np.array([[avatar.encode()]], np.object_)


def _ask(
    client: triton.InferenceServerClient,
    model: str,
    arrays: dict[str, npt.NDArray[np.generic]],
    parameters: dict[str, str | int],
) -> float:
    inputs = [
        triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)).set_data_from_numpy(array)
        for name, array in arrays.items()
    ]
    began = time.perf_counter()
    client.infer(model, inputs, parameters=parameters)
    return 1e3 * (time.perf_counter() - began)
