"""Requests and answers as Triton's messages. Nothing here does I/O."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2

from ._audio import Samples
from ._exceptions import ServerError
from ._frame import AvatarInfo, Frame, Health, Preloaded, Utterance
from ._state import StreamState

Request = Any  # tritonclient's messages carry no types
Response = Any

LENGTH_BYTES = 4  # that stand before each string, little-endian
RASTERIZER = "rasterizer"
CLOCK = service_pb2.ModelConfigRequest(name="animate")


def animate(
    audio: Samples,  # [WINDOW]
    frame: int,  # index of the chunk's first
    state: StreamState,
    listening: tuple[int, int] = (0, 0),
) -> Request:
    """One chunk of a stream.

    Args:
        listening: how much the face does at the chunk's start and at its end, 0 to 100.
    """
    return _infer(
        state.model,
        [
            _floats("AUDIO", audio[None]),
            _strings("AVATAR", state.avatar, [1, 1]),
            _integer("FRAME_INDEX", frame, [1, 1]),
        ],
        ["FRAMES", "SPEECH"],
        _look(state) | _attention(listening),
        f"{state.id}-{frame}",
    )


def idle(
    frame: int,  # index of the chunk's first
    state: StreamState,
    listening: tuple[int, int] = (0, 0),
) -> Request:
    """One chunk of the face at rest; see `animate`."""
    inputs = [_strings("AVATAR", state.avatar, [1, 1]), _integer("FRAME_INDEX", frame, [1, 1])]
    return _infer(RASTERIZER, inputs, ["FRAMES"], _look(state) | _attention(listening), f"{state.id}-{frame}")


def expire(
    request: Request,
    seconds: float,  # from its arrival
) -> None:
    """Have the server drop a chunk that it has not begun to render by then."""
    request.parameters["deadline_ms"].int64_param = max(1, round(1e3 * seconds))


def speech_to_animation(
    audio: Samples,  # [T]
    frame: int,  # index of the first
    state: StreamState,
) -> Request:
    """A whole utterance."""
    return _infer(
        "speech_to_animation",
        [_floats("AUDIO", audio), _strings("AVATAR", state.avatar, [1]), _integer("FRAME_INDEX", frame, [1])],
        ["TEXT", "FRAMES", "SPEECH"],
        _look(state),
        f"{state.id}-{frame}",
    )


def transcribe(
    audio: Samples,  # [T]
    frame: int,  # index of the first
    stream: str,  # id
) -> Request:
    """An utterance whose text alone is wanted."""
    return _infer("transcribe", [_floats("AUDIO", audio)], ["TEXT"], {}, f"{stream}-{frame}")


def synthesize(
    sentence: str,
    start: int,  # first sample wanted
    stream: str,  # id
) -> Request:
    """A piece of a sentence's speech."""
    inputs = [_strings("TEXT", sentence, [1]), _integer("START", start, [1])]
    return _infer("tts", inputs, ["AUDIO", "SAMPLES"], {}, f"{stream}-tts-{start}")


def detect(
    audio: Samples,  # [WINDOW]
    end: int,  # frame that comes after it
    stream: str,  # id
) -> Request:
    """Which of a window's last frames are speech."""
    return _infer("vad", [_floats("AUDIO", audio[None])], ["LATEST"], {}, f"{stream}-vad-{end}")


def operation(name: str, avatar: str, stream: str) -> Request:
    """An operation of the rasterizer: ``list``, ``preload`` or ``unload``."""
    tensor = _strings("AVATAR", avatar, [1, 1])
    return _infer(RASTERIZER, [tensor], ["REPORT"], {"operation": name}, f"{stream}-{name}")


def clock_parameters(response: Response) -> dict[str, str]:
    """From the answer to `CLOCK`."""
    return {key: value.string_value for key, value in response.config.parameters.items()}


def frames(response: Response, first: int, state: StreamState) -> list[Frame]:
    """Every frame of a response, numbered from ``first``. At rest there is no speech."""
    pictures = _strings_of(response, "FRAMES")
    at_rest = response.model_name == RASTERIZER
    speech = [0.0] * len(pictures) if at_rest else _floats_of(response, "SPEECH")
    if len(pictures) != len(speech):
        raise ServerError(f"the server answered with {len(pictures)} frames and {len(speech)} speech probabilities")
    return [
        Frame(index, index / state.clock.fps, probability, state.format, data)
        for index, (data, probability) in enumerate(zip(pictures, speech, strict=True), first)
    ]


def text(response: Response) -> str:
    """The transcript in a response."""
    return _string_of(response, "TEXT").decode()


def speech(response: Response) -> tuple[Samples, int]:
    """A piece [T] of a sentence's speech, and how many samples the sentence has."""
    shape, data = _output(response, "SAMPLES", "INT64")
    if len(data) != 8:
        raise ServerError(f"the server's output SAMPLES has shape {list(shape)}, expected [1]")
    return np.array(_floats_of(response, "AUDIO"), np.float32), int.from_bytes(data, "little", signed=True)


def probabilities(response: Response) -> list[float]:
    """Of speech, one a frame, in an answer to `detect`."""
    return _floats_of(response, "LATEST")


def utterance(response: Response, first: int, count: int, state: StreamState) -> Utterance:
    """Text and the first ``count`` frames of a response, numbered from ``first``."""
    return Utterance(text(response), frames(response, first, state)[:count])


def avatars(response: Response) -> list[AvatarInfo]:
    """The answer to the operation ``list``."""
    try:
        return [AvatarInfo(entry["id"], entry["loaded"]) for entry in _report(response)["avatars"]]
    except (KeyError, TypeError) as error:
        raise ServerError(f"the server's list of avatars is malformed: {error!r}") from error


def preloaded(response: Response) -> Preloaded:
    """The answer to the operation ``preload``."""
    content = _report(response)
    try:
        return Preloaded(**{field.name: content[field.name] for field in fields(Preloaded)})
    except KeyError as error:
        raise ServerError(f"the server's report of a preload lacks {error}") from error


def health(url: str, response: Response) -> Health:
    """A replica that has answered the operation ``list``."""
    return Health(url, True, f"serves {len(avatars(response))} avatars")


def _report(response: Response) -> dict[str, Any]:
    try:
        content = json.loads(_string_of(response, "REPORT"))
    except ValueError as error:
        raise ServerError(f"the server's report is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ServerError(f"the server's report is no JSON object: {content!r}")
    return content


def _look(state: StreamState) -> dict[str, str | int]:
    look: dict[str, str | int] = {"format": state.format, "quality": state.quality, "seed": state.seed}
    return look if state.size is None else look | {"size": state.size}


def _attention(listening: tuple[int, int]) -> dict[str, str | int]:
    """Nothing for a face that does not listen: older servers do not know the parameters."""
    before, after = listening
    return {"listening_before": before, "listening": after} if before or after else {}


_Tensor = tuple[Any, bytes]


def _floats(name: str, values: Samples) -> _Tensor:
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name=name, datatype="FP32", shape=values.shape)
    return tensor, values.astype("<f4", copy=False).tobytes()


def _integer(name: str, value: int, shape: list[int]) -> _Tensor:
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name=name, datatype="INT64", shape=shape)
    return tensor, struct.pack("<q", value)


def _strings(name: str, value: str, shape: list[int]) -> _Tensor:
    data = value.encode()
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name=name, datatype="BYTES", shape=shape)
    return tensor, len(data).to_bytes(LENGTH_BYTES, "little") + data


def _infer(
    model: str,
    inputs: list[_Tensor],
    outputs: list[str],
    parameters: Mapping[str, str | int],
    request_id: str,  # <stream's id>-<what>, for the server's logs and traces
) -> Request:
    request = service_pb2.ModelInferRequest(
        model_name=model,
        id=request_id,
        inputs=[tensor for tensor, _ in inputs],
        raw_input_contents=[data for _, data in inputs],
        outputs=[service_pb2.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs],
    )
    for key, value in parameters.items():
        if isinstance(value, str):
            request.parameters[key].string_param = value
        else:
            request.parameters[key].int64_param = value
    return request


def _string_of(response: Response, name: str) -> bytes:
    strings = _strings_of(response, name)
    if len(strings) != 1:
        raise ServerError(f"the server's output {name} has {len(strings)} strings, expected one")
    return strings[0]


def _strings_of(response: Response, name: str) -> list[bytes]:
    shape, data = _output(response, name, "BYTES")
    count = math.prod(shape)
    strings: list[bytes] = []
    end = 0
    while len(strings) < count and end < len(data):
        begin = end + LENGTH_BYTES
        end = begin + int.from_bytes(data[end:begin], "little")
        strings.append(data[begin:end])
    if len(strings) != count or end != len(data):
        raise ServerError(f"the server's output {name} is malformed: {len(data)} bytes are not {count} strings")
    return strings


def _floats_of(response: Response, name: str) -> list[float]:
    shape, data = _output(response, name, "FP32")
    count = math.prod(shape)
    if len(data) != 4 * count:
        raise ServerError(f"the server's output {name} is malformed: {len(data)} bytes are not {count} floats")
    return list(struct.unpack(f"<{count}f", data))


def _output(response: Response, name: str, datatype: str) -> tuple[Sequence[int], bytes]:
    """Shape and bytes of an output; touches no other's bytes, since each touch copies them."""
    for number, tensor in enumerate(response.outputs):
        if tensor.name == name and tensor.datatype == datatype and number < len(response.raw_output_contents):
            return tensor.shape, response.raw_output_contents[number]
    raise ServerError(f"the server's answer lacks {name}")
