"""The greedy loop on scripted networks, and `transcribe` on the real server."""

import csv
import importlib.util
import json
import queue
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import tritonclient.grpc as triton
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

from talksplat import asr, clock
from talksplat.bench.asr import transcribe
from talksplat.server import ROOT, Server
from talksplat.tenants import HEADER

Float32 = npt.NDArray[np.float32]

CROSS = np.zeros((1, 2, 1, 1, 7, 4), np.float32)
VOCABULARY = 40


class Script:
    """A decoder that says the given tokens, and the last one for ever after."""

    def __init__(self, *tokens: int) -> None:
        self.script = tokens
        self.heard: list[int] = []

    def __call__(self, token: Any, cross: Any, past: Any) -> tuple[Any, Any]:
        assert token.shape == (1, 1)
        assert token.dtype == np.int64
        assert past.shape == (1, 2, 1, 1, len(self.heard), 4)
        logits = np.zeros((1, VOCABULARY), np.float32)
        logits[0, self.script[min(len(self.heard), len(self.script) - 1)]] = 1
        self.heard.append(int(token[0, 0]))
        return logits, np.concatenate([past, np.full((1, 2, 1, 1, 1, 4), token, np.float32)], axis=4)


def test_the_loop_begins_with_bos_feeds_back_what_it_hears_and_ends_at_eos() -> None:
    script = Script(5, 6, 7, asr.EOS)
    assert asr.greedy(script, CROSS, cap=20) == ([5, 6, 7], "end")
    assert script.heard == [asr.BOS, 5, 6, 7]


def test_nothing_but_eos_is_an_empty_text() -> None:
    assert asr.greedy(Script(asr.EOS), CROSS, cap=20) == ([], "end")


def test_the_cap_ends_what_has_no_end() -> None:
    script = Script(*range(3, 40))
    assert asr.greedy(script, CROSS, cap=12) == (list(range(3, 15)), "cap")
    assert len(script.heard) == 12


def test_of_a_loop_one_copy_stays() -> None:
    phrase = [5, 6, 7, 8, 9]
    assert asr.greedy(Script(3, 4, *phrase * 20), CROSS, cap=90) == ([3, 4, *phrase], "loop")
    assert asr.greedy(Script(3, 4), CROSS, cap=90) == ([3, 4], "loop")


def test_what_people_do_repeat_is_no_loop() -> None:
    for spoken in ([9] * 7, [8, 9] * 4, [7, 8, 9] * 4, list(range(5, 15)) * 3):
        assert asr.greedy(Script(3, *spoken, asr.EOS), CROSS, cap=90).tokens == [3, *spoken]


@given(st.lists(st.integers(3, 6), max_size=40))
def test_a_loop_is_copies_of_what_stands_before_it(tokens: list[int]) -> None:
    surplus = asr.looping(tokens)
    if surplus:
        kept = tokens[:-surplus]
        period = next(n for n in range(1, len(kept) + 1) if tokens[-surplus:] == (kept[-n:] * surplus)[:surplus])
        assert surplus >= 3 * period


def table(*pieces: str) -> bytes:
    encoded = [piece.encode() for piece in pieces]
    assert all(len(piece) < 128 for piece in encoded)
    return b"".join(bytes([len(piece)]) + piece for piece in encoded)


def test_the_tokenizer_joins_pieces_bytes_and_spaces_and_leaves_marks_out() -> None:
    tokenizer = asr.Tokenizer(table("<unk>", "<s>", "</s>", "▁Good", "▁mor", "ning", "<0xC3>", "<0xA9>", "<", ">", ""))
    assert tokenizer.decode([1, 3, 4, 5, 2]) == "Good morning"
    assert tokenizer.decode([3, 6, 7, 8, 9]) == "Goodé<>"
    assert tokenizer.decode([6]) == "\ufffd"
    assert tokenizer.decode([]) == ""


def test_the_tokenizer_reads_long_pieces() -> None:
    long = "x" * 300
    assert asr.Tokenizer(bytes([300 % 128 + 128, 300 // 128]) + long.encode() + table("y")).decode([0, 1]) == long + "y"


def seconds(speech: Sequence[float], samples: int | None = None) -> list[tuple[float, float]]:
    count = len(speech) * clock.SAMPLES_PER_FRAME if samples is None else samples
    found = asr.spans(np.array(speech, np.float32), count)
    return [(span.start / clock.SAMPLE_RATE, span.stop / clock.SAMPLE_RATE) for span in found]


def test_speech_keeps_a_margin_within_the_audio() -> None:
    assert seconds([0] * 50 + [1] * 25 + [0] * 50) == [(1.76, 3.24)]
    assert seconds([1] * 10) == [(0, 0.4)]
    assert seconds([0] * 50) == []


def test_speech_is_cut_at_a_pause_only_where_it_would_get_too_long() -> None:
    pause, sentence = [0] * 50, [1] * 150  # 2 s, 6 s
    assert len(seconds([*sentence, *pause, *sentence])) == 1
    assert seconds([*sentence, *pause, *sentence, *pause, *sentence]) == [(0, 14.24), (15.76, 22)]
    assert seconds([1] * 700) == [(0, 28)]  # nobody breathes


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 200)), max_size=12), st.integers(0, clock.SAMPLES_PER_FRAME))
def test_spans_are_in_order_apart_and_hold_all_speech(runs: list[tuple[bool, int]], missing: int) -> None:
    speech = np.array([heard for heard, length in runs for _ in range(length)], np.float32)
    samples = max(0, len(speech) * clock.SAMPLES_PER_FRAME - missing)
    found = asr.spans(speech, samples)
    edges = [edge for span in found for edge in (span.start, span.stop)]
    assert edges == sorted(edges)
    assert not edges or (edges[0] >= 0 and edges[-1] <= samples)
    inside = np.zeros(samples, bool)
    for span in found:
        inside[span] = True
    assert inside[np.repeat(speech > 0, clock.SAMPLES_PER_FRAME)[:samples]].all()


def transcriber(decoder: Script, probability: float = 1.0) -> tuple[asr.Transcriber, list[int]]:
    """One on scripted networks, and the lengths of the clips that its encoder gets."""
    lengths: list[int] = []

    def encoder(audio: Any) -> Any:
        lengths.append(audio.shape[1])
        return CROSS

    def vad(windows: Any) -> Any:
        return np.full((len(windows), clock.CHUNK_FRAMES), probability, np.float32)

    pieces = ("<unk>", "<s>", "</s>", "▁yes", "▁no")
    return asr.Transcriber(asr.Networks(vad, encoder, decoder), asr.Tokenizer(table(*pieces))), lengths


def test_where_nobody_speaks_the_recogniser_is_not_asked() -> None:
    transcribe, lengths = transcriber(Script(3, asr.EOS), probability=0.3)
    assert transcribe(np.zeros(clock.SAMPLE_RATE, np.float32)) == ""
    assert lengths == []


def test_a_clip_that_is_too_short_for_the_encoder_is_padded() -> None:
    transcribe, lengths = transcriber(Script(3, 4, asr.EOS))
    assert transcribe(np.ones(160, np.float32)) == "yes no"
    assert lengths == [asr.MIN_SAMPLES]


@pytest.mark.parametrize(
    ("audio", "reason"),
    [
        (np.zeros(0), "shape"),
        (np.zeros(clock.SAMPLE_RATE * clock.MAX_UTTERANCE_SECONDS + 1), "shape"),
        (np.zeros((2, 1600)), "shape"),
        (np.full(1600, np.nan), "NaN"),
        (np.full(1600, -np.inf), "NaN or infinity"),
    ],
)
def test_audio_that_makes_no_sense_is_refused(audio: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        transcriber(Script(asr.EOS))[0](audio.astype(np.float32))


def test_the_networks_can_run_as_tritons_own_models(tmp_path: Path) -> None:
    """model.py of `asr` with the parameter networks = triton, on a fake `triton_python_backend_utils`."""
    decoder, asked = Script(3, 4, asr.EOS), []
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    class TritonError(Exception):
        INVALID_ARG, INTERNAL = 1, 2

        def __init__(self, message: str, code: int) -> None:
            super().__init__(message)
            self.code = code

    class Request:
        def __init__(
            self, model_name: str, inputs: list[Any], requested_output_names: list[str], preferred_memory: Any
        ) -> None:
            assert preferred_memory == ("CPU", 0)  # where plans leave their results otherwise, they can't be read
            asked.append(model_name)
            arrays = {tensor.name: tensor.array for tensor in inputs}
            if model_name == "vad":
                outputs: Sequence[Any] = [np.ones((len(arrays["AUDIO"]), clock.CHUNK_FRAMES), np.float32)]
            elif model_name == "asr_encoder":
                outputs = [CROSS]
            elif len(decoder.heard) == 3:
                raise ValueError("the decoder has said all")  # no fault of the request's
            else:
                outputs = decoder(arrays["TOKEN"], arrays["CROSS_KV"], arrays["PAST_KV"])
            self.outputs = dict(zip(requested_output_names, outputs, strict=True))

        def exec(self) -> Any:
            return SimpleNamespace(has_error=lambda: False, outputs=self.outputs)

    class Asked(dict[str, Any]):
        """A request, by the names of its tensors; its sender gives what it sends to `answers`."""

        def request_id(self) -> str:
            return "said-0"

        def parameters(self) -> str:
            return ""

        def get_response_sender(self) -> Any:
            return SimpleNamespace(send=lambda answer, flags: answers.put(answer))

    def tensor(name: str, array: Any) -> Any:
        return SimpleNamespace(name=name, array=array, as_numpy=lambda: array)

    fake: Any = ModuleType("triton_python_backend_utils")
    fake.Tensor, fake.InferenceRequest = tensor, Request
    fake.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    fake.TRITONSERVER_MEMORY_CPU, fake.PreferredMemory = "CPU", lambda kind, place: (kind, place)
    fake.InferenceResponse = lambda outputs=None, error=None: error or outputs
    fake.TritonError, fake.MetricFamily = TritonError, mock.MagicMock()
    fake.get_input_tensor_by_name = lambda request, name: tensor(name, request[name])
    fake.get_output_tensor_by_name = lambda response, name: tensor(name, response.outputs[name])
    spec = importlib.util.spec_from_file_location("asr_model", ROOT / "model_repository" / "asr" / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {fake.__name__: fake}):  # talksplat.triton is forgotten afterwards, too
        spec.loader.exec_module(module)

    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "tokenizer.bin").write_bytes(table("<unk>", "<s>", "</s>", "▁yes", "▁no"))
    model = module.TritonPythonModel()
    config = {"parameters": {"networks": {"string_value": "triton"}}}
    with mock.patch("talksplat.log.configure"):  # this process's logging is pytest's
        model.initialize({"model_config": json.dumps(config), "model_repository": str(tmp_path), "model_version": "1"})

    def answers_to(*audios: Any) -> list[Any]:
        assert model.execute([Asked(AUDIO=audio.astype(np.float32)) for audio in audios]) == [None] * len(audios)
        return [answers.get(timeout=10) for _ in audios]

    ((text,),) = answers_to(np.zeros(8000))
    assert text.array.tolist() == [b"yes no"]
    assert asked == ["vad", "asr_encoder", *["asr_decoder"] * 3]

    unusable, failed = answers_to(np.zeros(0), np.zeros(8000))
    assert (unusable.code, failed.code) == (TritonError.INVALID_ARG, TritonError.INTERNAL)
    assert str(failed) == "The decoder has said all."
    model.finalize()


# The real server


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    with triton.InferenceServerClient(server.grpc_url) as client:
        yield client


def demo_speech() -> Float32:
    return np.asarray(soundfile.read(ROOT / "demo" / "speech.wav", dtype="float32")[0], np.float32)


def words(text: str) -> list[str]:
    return "".join(letter for letter in text.lower() if letter.isalpha() or letter == " ").split()


def test_the_demos_speech_is_understood(client: triton.InferenceServerClient) -> None:
    assert words(transcribe(client, demo_speech())) == words(
        "Hello, and welcome. My lips close for people, bubbles and music. "
        "When nobody speaks, my mouth stays perfectly still. Please remember me, and maybe wave."
    )


def test_silence_around_speech_and_its_level_change_nothing(client: triton.InferenceServerClient) -> None:
    sentence = demo_speech()[int(5.5 * clock.SAMPLE_RATE) : int(9 * clock.SAMPLE_RATE)]
    noise = np.random.default_rng(0).normal(0, 1e-3, 9 * clock.SAMPLE_RATE).astype(np.float32)
    expected = words("When nobody speaks, my mouth stays perfectly still.")
    for level in (0.3, 1.0):
        audio = noise.copy()
        audio[3 * clock.SAMPLE_RATE :][: len(sentence)] += level * sentence
        assert words(transcribe(client, audio)) == expected
    clipped = np.clip(20 * sentence, -1, 1)
    assert words(transcribe(client, clipped)) == expected


def test_silence_noise_and_a_blip_have_no_text(client: triton.InferenceServerClient) -> None:
    noise = np.random.default_rng(0).normal(0, 0.05, 3 * clock.SAMPLE_RATE).astype(np.float32)
    for audio in (np.zeros(1, np.float32), np.zeros(30 * clock.SAMPLE_RATE, np.float32), noise, noise[:160]):
        assert transcribe(client, audio) == ""


def test_nobody_waits_for_all_that_another_tenant_sends(server: Server) -> None:
    """Who floods is served in turn with the others, and its oldest requests are dropped where too many wait."""
    answered: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    audio = triton.InferInput("AUDIO", [30 * clock.SAMPLE_RATE], "FP32")
    audio.set_data_from_numpy(np.zeros(30 * clock.SAMPLE_RATE, np.float32))

    with triton.InferenceServerClient(server.grpc_url) as client:
        flood = 24

        def ask(tenant: str) -> None:
            def callback(result: object, error: InferenceServerException | None) -> None:
                answered.put((tenant, str(error and error.status())))

            client.async_infer("transcribe", [audio], callback, headers={HEADER: tenant})

        for _ in range(flood):
            ask("flooder")
        order = [answered.get(timeout=30)]  # all of them have come, or nearly
        ask("other")
        order += [answered.get(timeout=30) for _ in range(flood)]
    assert order.index(("other", "None")) < flood - 8
    assert {error for _, error in order} == {"None", "StatusCode.CANCELLED"}


@pytest.mark.parametrize("audio", [np.zeros(0), np.full(1600, np.nan), np.zeros(31 * clock.SAMPLE_RATE)])
def test_bad_audio_is_an_invalid_argument(client: triton.InferenceServerClient, audio: Any) -> None:
    with pytest.raises(InferenceServerException, match="AUDIO") as caught:
        transcribe(client, audio.astype(np.float32))
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert transcribe(client, np.zeros(1600, np.float32)) == ""


def test_samples_of_another_type_are_an_invalid_argument(client: triton.InferenceServerClient) -> None:
    tensor = triton.InferInput("AUDIO", [1600], "INT16")
    tensor.set_data_from_numpy(np.zeros(1600, np.int16))
    with pytest.raises(InferenceServerException, match="INT16") as caught:
        client.infer("transcribe", [tensor])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_encoder_and_decoder_are_served_too_from_an_empty_cache_on(client: triton.InferenceServerClient) -> None:
    def infer(model: str, **inputs: Any) -> Any:
        types = {"int64": "INT64", "float32": "FP32"}
        tensors = [
            triton.InferInput(name, array.shape, types[array.dtype.name]).set_data_from_numpy(array)
            for name, array in inputs.items()
        ]
        return client.infer(model, tensors)

    def decoder(token: Any, cross: Any, past: Any) -> tuple[Any, Any]:
        result = infer("asr_decoder", TOKEN=token, CROSS_KV=cross, PAST_KV=past)
        return result.as_numpy("LOGITS"), result.as_numpy("PRESENT_KV")

    clip = demo_speech()[None, : 2 * clock.SAMPLE_RATE]
    cross = infer("asr_encoder", AUDIO=clip).as_numpy("CROSS_KV")
    tokenizer = asr.Tokenizer((ROOT / "model_repository" / "asr" / "1" / "tokenizer.bin").read_bytes())
    assert words(tokenizer.decode(asr.greedy(decoder, cross, cap=20).tokens)) == ["hello", "and", "welcome"]


@pytest.mark.shared
def test_real_speech_is_understood(client: triton.InferenceServerClient, shared_data: Path) -> None:
    jiwer = pytest.importorskip("jiwer")
    normaliser = pytest.importorskip("whisper_normalizer.english").EnglishTextNormalizer()
    folder = shared_data / "speech" / "eval" / "lj"
    with (folder / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[:40:5]
    heard = [transcribe(client, soundfile.read(folder / row["file"], dtype="float32")[0]) for row in rows]
    references = [normaliser(row["transcript"]) for row in rows]
    assert jiwer.wer(references, list(map(normaliser, heard))) <= 0.055
