"""What no client should send, at every door: a clear answer in time each, and the same server afterwards.

FUZZ_INPUTS says how many inputs there are in all: some hundred in the suite, `make fuzz` sends 5,000 and more.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2
from tritonclient.utils import serialize_byte_tensor, triton_to_np_dtype

from talksplat import clock
from talksplat.server import HOST, NO_PROXY, ROOT, Server

INPUTS = int(os.environ.get("FUZZ_INPUTS", "500"))
IN_TIME = 20.0  # seconds for any answer
CLEAN = {"INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "UNAVAILABLE", "CANCELLED", "RESOURCE_EXHAUSTED"}
NOT_OURS = (  # INTERNAL, but in other people's words
    "could not be run: [ONNXRuntimeError]",  # of a bare net, as Triton's native backend has them
    "Unable to parse",  # of gRPC, and of Triton's HTTP
    "failed to parse",
)
DIRTY = ("Traceback", "At:", ".py", 'File "', str(ROOT))
MODELS = sorted(path.parent.name for path in (ROOT / "model_repository").glob("*/config.pbtxt"))
TYPES = ["BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64"]
TYPES += ["BYTES", "BF16"]
METHOD = "/inference.GRPCInferenceService/"


def inputs(share: float) -> Callable[..., Any]:
    """So many of all inputs; the same ones each time in the suite, others each time where there are thousands."""
    return settings(
        max_examples=max(1, int(share * INPUTS)),
        database=None,
        derandomize="FUZZ_INPUTS" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc_url, NO_PROXY) as channel:
        yield channel


@pytest.fixture(scope="module", autouse=True)
def same_and_healthy(server: Server) -> Iterator[None]:
    before = {process.pid for process in server._processes()}
    yield
    server.canary(30)
    assert {process.pid for process in server._processes()} == before


def require_clean(ask: Callable[[], object]) -> None:
    """It is answered, or refused in a sentence that is a client's business."""
    try:
        ask()
    except grpc.RpcError as error:
        refusal = error
    else:
        return
    code, sentence = refusal.code().name, str(refusal.details())
    assert code in CLEAN or any(words in sentence for words in NOT_OURS), f"{code}: {sentence}"
    assert not any(word in sentence for word in DIRTY), sentence


# what a sound request to each model holds: datatype and shape of each input
SOUND: dict[str, dict[str, tuple[str, list[int]]]] = {
    "animate": {"AUDIO": ("FP32", [1, clock.WINDOW]), "AVATAR": ("BYTES", [1, 1]), "FRAME_INDEX": ("INT64", [1, 1])},
    "asr": {"AUDIO": ("FP32", [4000])},
    "asr_decoder": {
        "TOKEN": ("INT64", [1, 1]),
        "CROSS_KV": ("FP32", [1, 2, 8, 8, 3, 52]),
        "PAST_KV": ("FP32", [1, 2, 8, 8, 1, 52]),
    },
    "asr_encoder": {"AUDIO": ("FP32", [1, 4000])},
    "audio_encoder": {"AUDIO": ("FP32", [1, clock.WINDOW])},
    "avatar": {"AVATAR": ("BYTES", [1, 1])},
    "deformation": {
        "FEATURES": ("FP32", [1, 4, 128]),
        "ADAPTER_IN": ("FP32", [1, 129, 64]),
        "ADAPTER_OUT": ("FP32", [1, 65, 20]),
    },
    "deformation_huma1": {
        "HIDDEN": ("FP32", [1, 37, 416]),
        "TABLE": ("FP32", [1, 32, 10]),
        "SPEECH_IN": ("FP32", [1, 417, 64]),
        "POSITIONS": ("FP32", [1, 13, 64]),
        "KEYS_VALUES": ("FP32", [1, 65, 192]),
        "QUERY_BASE": ("FP32", [1, 33, 128]),
        "MIXING": ("FP32", [1, 65, 64]),
        "OFFSETS_OUT": ("FP32", [1, 65, 14]),
    },
    "framing": {"AUDIO": ("FP32", [4000]), "AVATAR": ("BYTES", [1]), "FRAME_INDEX": ("INT64", [1])},
    "rasterizer": {
        "AVATAR": ("BYTES", [1, 1]),
        "COEFFICIENTS": ("FP32", [1, 4, 20]),
        "SPEECH": ("FP32", [1, 4]),
        "FRAME_INDEX": ("INT64", [1, 1]),
    },
    "tts": {"TEXT": ("BYTES", [1]), "START": ("INT64", [1])},
    "tts_encoder": {"TOKENS": ("INT64", [1, 30]), "NOISE": ("FP32", [1, 2, 30])},
    "tts_flow": {"PRIOR": ("FP32", [1, 192, 40])},
    "tts_decoder": {"LATENT": ("FP32", [1, 192, 40])},
    "vad": {"AUDIO": ("FP32", [1, clock.WINDOW])},
}
SOUND["animate_huma1"], SOUND["avatar_huma1"], SOUND["transcribe"] = SOUND["animate"], SOUND["avatar"], SOUND["asr"]
SOUND["speech_to_animation"] = SOUND["framing"]

IDS = st.one_of(
    st.sampled_from(["red", "violet", "", "../red", "/etc/passwd", "red/../green", "red\0", "RED", "..", "r" * 65536]),
    st.text(max_size=80),
).map(lambda text: text.encode("utf-8", "surrogatepass"))
BYTES = st.one_of(IDS, st.binary(max_size=80))
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2**53, -(2**63), 2**63 - 1, 2**31, 8, 64, 85]), st.integers(-(2**63), 2**63 - 1)
)
PARAMETERS = st.dictionaries(
    st.one_of(
        st.sampled_from(["format", "quality", "size", "seed", "deadline_ms", "operation", "arrived"]),
        st.sampled_from(["x-talksplat-tenant", "X-Talksplat-Tenant", "X-Talksplat-Stream", "triton_final_response"]),
        st.sampled_from(
            ["priority", "timeout", "sequence_id", "sequence_start", "binary_data_output", "classification"]
        ),
        st.sampled_from(["shared_memory_region", "shared_memory_offset", "shared_memory_byte_size"]),
        st.text(max_size=20),
    ),
    st.one_of(
        st.booleans(),
        NUMBERS,
        st.floats(),
        st.sampled_from(["jpeg", "raw", "preload", "list", "unload", "explode", "png"]),
        st.text(max_size=200),
    ),
    max_size=4,
)
SIZES = st.sampled_from([0, 1, 2, 3, 4, 20, 64, 128, 1000, clock.WINDOW, -1, -5, 2**31, 2**62])


def values(draw: st.DrawFn, datatype: str, shape: list[int]) -> bytes:
    """Of a tensor of this type and shape, as Triton wants them: whatever fits."""
    count = int(np.prod(shape)) if shape and min(shape) >= 0 and max(shape) < 1e6 else 1
    count = min(count, 300_000)
    if datatype == "BYTES":
        tensor = np.empty(min(count, 100), np.object_)
        tensor[:] = draw(BYTES)
        return b"" if not tensor.size else bytes(serialize_byte_tensor(tensor).item())
    kind = triton_to_np_dtype(datatype)
    numbers = st.sampled_from([0, 1, -1, 0.1, 1e30, -1e30, np.nan, np.inf, 2**62])
    with np.errstate(all="ignore"):
        return bytes(np.full(count, draw(numbers)).astype(kind or np.uint16).tobytes())


@st.composite
def requests(draw: st.DrawFn) -> service_pb2.ModelInferRequest:
    """A sound request, spoilt in some places."""
    model = draw(st.sampled_from(MODELS))
    request = service_pb2.ModelInferRequest(model_name=model)
    tensors = [(name, datatype, list(shape)) for name, (datatype, shape) in SOUND[model].items()]
    spoilt = draw(
        st.sets(st.sampled_from(["type", "shape", "name", "missing", "extra", "twice", "parameters", "bytes"]))
    )
    victim = draw(st.integers(0, len(tensors) - 1))
    name, datatype, shape = tensors[victim]
    if "type" in spoilt:
        datatype = draw(st.one_of(st.sampled_from(TYPES), st.text(max_size=10)))
    if "shape" in spoilt:
        shapes = st.lists(SIZES, max_size=6), st.permutations(shape), st.tuples(SIZES, *map(st.just, shape[1:]))
        shape = list(draw(st.one_of(*shapes)))
    if "name" in spoilt:
        name = draw(st.one_of(st.sampled_from(["AUDIO", "OFFSETS", "ARRIVED", "avatar", ""]), st.text(max_size=30)))
    tensors[victim] = name, datatype, shape
    if "missing" in spoilt:
        del tensors[draw(st.integers(0, len(tensors) - 1))]
    if "extra" in spoilt:
        extra = st.sampled_from(["OFFSETS", "SPEECH", "TEXT", "ARRIVED", "WINDOW", "EXTRA"])
        tensors.append((draw(extra), draw(st.sampled_from(TYPES)), draw(st.lists(SIZES, max_size=4))))
    if "twice" in spoilt and tensors:
        tensors.append(tensors[0])
    for name, datatype, shape in tensors:
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(values(draw, datatype, shape))
    if "bytes" in spoilt and tensors:
        which = draw(st.integers(0, len(tensors) - 1))
        raw = request.raw_input_contents[which]
        request.raw_input_contents[which] = draw(
            st.one_of(st.binary(max_size=100), st.integers(0, len(raw)).map(lambda end: raw[:end]), st.just(raw + b"x"))
        )
        if draw(st.booleans()):
            del request.raw_input_contents[draw(st.integers(0, len(tensors) - 1))]
    if "parameters" in spoilt:
        for key, value in draw(PARAMETERS).items():
            set_parameter(request.parameters[key], value)
        for output in draw(st.lists(st.sampled_from(["FRAMES", "REPORT", "SPEECH", "NOTHING", ""]), max_size=3)):
            added = request.outputs.add(name=output)
            for key, value in draw(PARAMETERS).items():
                set_parameter(added.parameters[key], value)
        request.model_version = draw(st.sampled_from(["", "1", "2", "-1", "first"]))
        request.id = draw(st.text(max_size=100))
    return request


def set_parameter(parameter: Any, value: bool | int | float | str) -> None:
    for kind, field in ((bool, "bool_param"), (int, "int64_param"), (float, "double_param"), (str, "string_param")):
        if isinstance(value, kind):
            setattr(parameter, field, value)
            return


@given(request=requests())
@inputs(0.6)
def test_spoilt_requests_are_refused_in_a_sentence(channel: grpc.Channel, request: Any) -> None:
    infer = channel.unary_unary(
        METHOD + "ModelInfer",
        request_serializer=service_pb2.ModelInferRequest.SerializeToString,
        response_deserializer=service_pb2.ModelInferResponse.FromString,
    )
    require_clean(lambda: infer(request, timeout=IN_TIME))


@st.composite
def messages(draw: st.DrawFn) -> tuple[str, bytes]:
    """A method, and bytes that are no message of it, or one that nobody would send."""
    method = draw(
        st.sampled_from(["ModelInfer", "ModelStreamInfer", "ModelConfig", "ModelMetadata", "ModelStatistics"])
    )
    model = draw(st.sampled_from(MODELS))
    request = service_pb2.ModelInferRequest(model_name=model)
    for name, (datatype, shape) in SOUND[model].items():
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(bytes(8))
    sound = request.SerializeToString()
    if draw(st.booleans()):
        return method, draw(st.binary(max_size=300))
    cut, place = draw(st.integers(0, len(sound))), draw(st.integers(0, len(sound)))
    return method, draw(st.sampled_from([sound[:cut], sound[cut:], sound[:place] + draw(st.binary()) + sound[place:]]))


@given(message=messages())
@inputs(0.2)
def test_bytes_that_are_no_message_are_refused_in_a_sentence(channel: grpc.Channel, message: tuple[str, bytes]) -> None:
    method, data = message
    if method == "ModelStreamInfer":
        stream = channel.stream_stream(METHOD + method)
        require_clean(lambda: list(stream(iter([data]), timeout=IN_TIME)))
    else:
        require_clean(lambda: channel.unary_unary(METHOD + method)(data, timeout=IN_TIME))


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.text(max_size=20)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(st.sampled_from(["inputs", "outputs", "parameters", "id", "name", "data"]), st.text(max_size=9)),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)
BODIES = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=100).map(str.encode),
    JSON.map(lambda document: json.dumps(document).encode()),
)
HEADERS = st.dictionaries(
    st.one_of(
        st.sampled_from(
            ["Content-Type", "Content-Encoding", "Accept-Encoding", "Transfer-Encoding", "Connection", "Expect", "Host"]
        ),
        st.sampled_from(["Inference-Header-Content-Length", "X-Talksplat-Tenant", "X-Talksplat-Stream", "X-Other"]),
    ),
    st.one_of(
        st.sampled_from(
            ["application/json", "application/octet-stream", "text/html", "gzip", "deflate", "chunked", "100-continue"]
        ),
        st.sampled_from(["0", "-1", "5", "1000000", "99999999999999999999", "a" * 70_000]),
        st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40),
    ),
    max_size=4,
)
PATHS = st.one_of(
    st.sampled_from(MODELS).map(lambda model: f"/v2/models/{model}/infer"),
    st.sampled_from(["/v2/models/../../etc/passwd", "/v2/models/animate/versions/9/infer", "/v2/models//infer"]),
    st.sampled_from(["/v2/repository/index", "/v2/health/ready", "/v2/logging", "/v2/models/%00/infer", "//", "*"]),
    st.just(f"/v2/models/{'a' * 20_000}/infer"),
)
PIECES = st.one_of(  # of a chunked body
    st.binary(max_size=60).map(lambda data: b"%x\r\n%s\r\n" % (len(data), data)),
    st.sampled_from([b"zz\r\n", b"-1\r\n", b"ffffffffffffffff\r\n", b"5\r\nab\r\n", b"\r\n", b"5;a=b\r\nabcde\r\n"]),
)


@st.composite
def http_requests(draw: st.DrawFn) -> bytes:
    """A request as it goes over the wire, sound or not, and often not all of it."""
    method = draw(st.sampled_from(["POST", "POST", "POST", "GET", "PUT", "DELETE", "HEAD", "OPTIONS", "", "P\0ST"]))
    version = draw(st.sampled_from(["HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/9", ""]))
    headers, body = draw(HEADERS), draw(BODIES)
    if draw(st.booleans()):  # a sound request, but for what its headers say of it
        inputs = [
            {"name": name, "datatype": datatype, "shape": shape, "data": draw(st.lists(st.integers(-9, 9), max_size=4))}
            for name, (datatype, shape) in SOUND[draw(st.sampled_from(MODELS))].items()
        ]
        body = json.dumps({"inputs": inputs, "parameters": {"size": draw(NUMBERS)}}).encode()
    if headers.get("Transfer-Encoding") == "chunked":
        body = b"".join(draw(st.lists(PIECES, max_size=5))) + draw(st.sampled_from([b"0\r\n\r\n", b"0\r\n", b""]))
    else:
        headers["Content-Length"] = str(draw(st.sampled_from([len(body), len(body), 0, len(body) + 9, -1, 10**30])))
    lines = [f"{method} {draw(PATHS)} {version}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@given(data=st.one_of(http_requests(), st.binary(max_size=200)))
@inputs(0.2)
def test_spoilt_http_is_answered_or_dropped(server: Server, data: bytes) -> None:
    """Nobody waits here: a request that promises more than it sends is only complete once this end is shut."""
    with socket.create_connection((HOST, server.ports.http), timeout=IN_TIME) as connection:
        answer = b""
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(1 << 16):
                answer += part
        except TimeoutError:
            raise
        except OSError:  # it has had enough
            return
        assert answer == b"" or answer.startswith(b"HTTP/")
        assert not any(word.encode() in answer for word in DIRTY)
        if b" 500 " in answer.partition(b"\r\n")[0]:
            assert any(words.encode() in answer for words in NOT_OURS)
