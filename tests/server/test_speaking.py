"""Speech from text: pieces that join without a seam, the resampler, what is refused, and the phonemiser's process."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import psutil
import pytest
import soxr
import tritonclient.grpc as triton
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException
from waiting import wait_for

from talksplat import phonemiser, speaking
from talksplat.clock import SAMPLE_RATE
from talksplat.framing import RequestError
from talksplat.phonemiser import Espeak, MissingPhonemiserError, PhonemiserError
from talksplat.server import ROOT, Server
from talksplat.speaking import (
    FIRST_PIECE,
    HOP,
    LONGEST_PIECE,
    MAX_CHARACTERS,
    MAX_TOKENS,
    PERIOD_IN,
    PERIOD_OUT,
    REACH,
    SOURCE_RATE,
    Speaker,
)

Float32 = npt.NDArray[np.float32]

needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="the wheel espeakng-loader is not installed"
)

FOLDER = ROOT / "model_repository"
SYMBOLS: dict[str, int] = json.loads((FOLDER / "tts" / "1" / "symbols.json").read_text())
REPLIES: dict[str, str] = json.loads((FOLDER / "tts" / "1" / "replies.json").read_text())
SENTENCE = max(REPLIES, key=len)


def no_phonemiser(text: str) -> str:
    raise MissingPhonemiserError("espeak-ng (GPL-3) is needed")


@pytest.fixture(scope="module")
def networks() -> speaking.Networks:
    return speaking.in_process(FOLDER)


@pytest.fixture
def speaker(networks: speaking.Networks) -> Speaker:
    return Speaker(networks, SYMBOLS, REPLIES, no_phonemiser)


def whole(speaker: Speaker, text: str) -> Float32:
    pieces = [speaker(text, 0)]
    while (start := sum(len(piece.audio) for piece in pieces)) < pieces[0].samples:
        pieces.append(speaker(text, start))
    return np.concatenate([piece.audio for piece in pieces])


@pytest.fixture(scope="module")
def said(networks: speaking.Networks) -> Float32:
    return whole(Speaker(networks, SYMBOLS, REPLIES, no_phonemiser), SENTENCE)


def test_the_first_piece_is_short_and_the_others_last_as_long_as_all_before(speaker: Speaker) -> None:
    samples, start, sizes = 1, 0, []
    while start < samples:
        audio, samples = speaker(SENTENCE, start)
        sizes.append(len(audio))
        start += len(audio)
    assert sizes[:3] == [FIRST_PIECE, FIRST_PIECE, 2 * FIRST_PIECE]
    assert max(sizes) == LONGEST_PIECE
    assert sum(sizes) == samples


def test_pieces_are_those_of_the_whole_sentence(networks: speaking.Networks, speaker: Speaker, said: Float32) -> None:
    """Against one run of each network, resampled at once, and by another hand."""
    latent = networks.flow(speaker._prior(SENTENCE))
    source = networks.decoder(np.pad(latent, ((0, 0), (0, 0), (speaking.CONTEXT, speaking.CONTEXT))))[0]
    periods = len(source) // PERIOD_IN
    expected = speaking.resample(np.pad(source, REACH)[: periods * PERIOD_IN + 2 * REACH])
    assert len(expected) <= len(said) < len(expected) + PERIOD_OUT
    inner = slice(2 * REACH, len(expected) - 2 * REACH)  # the pieces have a sound beyond the ends, too
    np.testing.assert_allclose(said[inner], expected[inner], atol=1e-4)
    others = soxr.resample(source, SOURCE_RATE, SAMPLE_RATE, quality="VHQ")[: len(expected)]
    # two resamplers differ only close to 8 kHz, where speech has little
    assert np.sqrt(np.mean((said[inner] - others[inner]) ** 2)) < 0.01 * np.sqrt(np.mean(said**2))


@settings(max_examples=8)
@given(data=st.data())
def test_a_piece_may_begin_at_any_sample(networks: speaking.Networks, said: Float32, data: st.DataObject) -> None:
    speaker = Speaker(networks, SYMBOLS, REPLIES, no_phonemiser)  # another one: nothing is kept from before
    start = data.draw(st.integers(0, len(said) - 1))
    piece = speaker(SENTENCE, start)
    assert piece.samples == len(said)
    assert 0 < len(piece.audio) <= LONGEST_PIECE
    np.testing.assert_allclose(piece.audio, said[start : start + len(piece.audio)], atol=1e-4)


def test_other_texts_sound_different_and_the_same_ones_do_not(networks: speaking.Networks, speaker: Speaker) -> None:
    again = Speaker(networks, SYMBOLS, REPLIES, no_phonemiser)
    one, other = list(REPLIES)[:2]
    np.testing.assert_array_equal(speaker(one, 0).audio, again(one, 0).audio)
    assert not np.allclose(speaker(one, 0).audio[:FIRST_PIECE], speaker(other, 0).audio[:FIRST_PIECE], atol=1e-3)


def test_only_some_sentences_stay_encoded(networks: speaking.Networks) -> None:
    encoder = mock.Mock(wraps=networks.encoder)
    speaker = Speaker(networks._replace(encoder=encoder), SYMBOLS, REPLIES, lambda text: text)
    with mock.patch.object(speaking, "KEPT", 2):
        for text in ("aba", "aba", "ebe", "ibi", "ibi", "aba"):
            speaker(text, 0)
    assert encoder.call_count == 4
    assert len(speaker._kept) == 2


@given(st.integers(50, 7000))
def test_the_resampler_keeps_tones_as_they_are(hertz: int) -> None:
    periods = 10
    source = np.sin(2 * np.pi * hertz * (np.arange(periods * PERIOD_IN + 2 * REACH) - REACH) / SOURCE_RATE)
    expected = np.sin(2 * np.pi * hertz * np.arange(periods * PERIOD_OUT) / SAMPLE_RATE)
    np.testing.assert_allclose(speaking.resample(source.astype(np.float32)), expected, atol=2e-3)


@pytest.mark.parametrize("hertz", [9_000, 10_000, 11_000])
def test_the_resampler_drops_what_would_come_back_as_another_tone(hertz: int) -> None:
    source = np.sin(2 * np.pi * hertz * np.arange(10 * PERIOD_IN + 2 * REACH) / SOURCE_RATE).astype(np.float32)
    assert np.abs(speaking.resample(source)).max() < 1e-3  # 60 dB down


@pytest.mark.parametrize(
    ("text", "start", "reason"),
    [
        ("", 0, "neither letter nor digit"),
        (" ... ?!\n", 0, "neither letter nor digit"),
        ("\N{PILE OF POO}", 0, "neither letter nor digit"),
        ("Something else.", 0, "no prepared reply, and to say anything else espeak-ng"),
        ("a" * (MAX_CHARACTERS + 1), 0, "501 characters, expected 500 at most"),
        (SENTENCE, -1, "START is -1, expected 0 to"),
        (SENTENCE, 2**63 - 1, "START is 9223372036854775807"),
    ],
)
def test_what_cannot_be_said_is_refused(speaker: Speaker, text: str, start: int, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        speaker(text, start)


def test_prepared_replies_are_known_by_their_words(speaker: Speaker) -> None:
    for text, ipa in REPLIES.items():
        assert speaker.ipa(f"  {text.upper()}\u200d\n") == ipa
        assert speaker.ipa(text.replace("'", "\u2019").rstrip(".!?")) == ipa


def test_phonemes_that_the_voice_does_not_know_are_left_out_and_their_number_is_bounded() -> None:
    assert speaking.tokens("a\u4e00b", SYMBOLS) == speaking.tokens("ab", SYMBOLS)
    with pytest.raises(RequestError, match="nothing that the voice can say"):
        speaking.tokens("\u4e00.!", SYMBOLS)
    with pytest.raises(RequestError, match=r"phonemes, expected \d+ at most"):
        speaking.tokens("a" * MAX_TOKENS, SYMBOLS)


def test_only_what_is_new_asks_the_phonemiser(networks: speaking.Networks) -> None:
    asked: list[str] = []
    speaker = Speaker(networks, SYMBOLS, REPLIES, lambda text: asked.append(text) or "aba")  # type: ignore[func-returns-value]
    for text, asks in ((SENTENCE, False), ("Something else.", True), ("Something else.", False)):
        assert speaker.asks_phonemiser(text) is asks
        speaker(text, 0)
    assert asked == ["Something else."]
    with pytest.raises(RequestError, match="neither letter nor digit"):  # at once, and not when the phonemiser is free
        speaker.asks_phonemiser("...")


def test_a_sentence_that_would_take_too_long_is_refused(networks: speaking.Networks) -> None:
    def slow(tokens: Any, noise: Any) -> Any:
        means, deviations, durations = networks.encoder(tokens, noise)
        return means, deviations, np.full_like(durations, np.inf)

    speaker = Speaker(networks._replace(encoder=slow), SYMBOLS, REPLIES, no_phonemiser)
    with pytest.raises(RequestError, match="s to say, expected 30 s at most"):
        speaker(SENTENCE, 0)


def test_the_decoder_answers_for_its_middle(networks: speaking.Networks) -> None:
    latent = np.random.default_rng(0).standard_normal((2, 192, 2 * speaking.CONTEXT + 5), np.float32)
    audio = networks.decoder(latent)
    assert audio.shape == (2, 5 * HOP)
    one = networks.decoder(latent[..., 2:-2])
    np.testing.assert_allclose(one, audio[:, 2 * HOP : 3 * HOP], atol=1e-5)


# The phonemiser


@needs_espeak
def test_numbers_and_abbreviations_are_said() -> None:
    with Espeak() as espeak:
        assert espeak.ipa("Dr. Smith has 13 dogs.") == espeak.ipa("Doctor Smith has thirteen dogs.")
        [ipa] = espeak.ipa("It is 3.5 metres, or 1,000 of them ... !")
        assert (ipa.count("."), ipa.count(",")) == (1, 1)


@needs_espeak
@pytest.mark.parametrize("text", ["a.", "\u00e9.", "\u4e00 .", "\U00018501."])
def test_no_text_overruns_the_phonemisers_buffers(text: str) -> None:
    """espeak-ng dies of each of these, as one clause."""
    with Espeak() as espeak:
        assert espeak.ipa((text * MAX_CHARACTERS)[:MAX_CHARACTERS])


@needs_espeak
def test_a_phonemiser_that_dies_is_started_again() -> None:
    with Espeak() as espeak:
        before = espeak.ipa("Hello.")
        assert espeak._process is not None
        first = espeak._process.pid
        os.kill(first, signal.SIGKILL)
        espeak._process.wait(5)
        assert espeak.ipa("Hello.") == before
        assert espeak._process.pid != first


@needs_espeak
def test_a_phonemiser_that_hangs_is_given_up_and_started_again() -> None:
    with Espeak() as espeak:
        before = espeak.ipa("Hello.")
        assert espeak._process is not None
        os.kill(espeak._process.pid, signal.SIGSTOP)
        with mock.patch.object(phonemiser, "DEADLINE", 0.1), pytest.raises(PhonemiserError, match=r"more than 0\.1 s"):
            espeak.ipa("Hello.")
        assert espeak.ipa("Hello.") == before


@needs_espeak
@pytest.mark.parametrize("answer", [b'{"sentences": ["h', b'{"samples": 3}\nabc'])
def test_half_an_answer_is_none(tmp_path: Path, answer: bytes) -> None:
    script = tmp_path / "_espeak.py"
    script.write_text(f"import os; input(); os.write(1, {answer!r})")
    with mock.patch.object(phonemiser, "__file__", str(script)), Espeak() as espeak:
        for _ in range(2):  # it is started again
            with pytest.raises(PhonemiserError, match="died"):
                espeak.ask(text="Hello.")


@needs_espeak
def test_a_phonemiser_that_cannot_be_started_says_why() -> None:
    with (
        mock.patch("subprocess.Popen", side_effect=PermissionError("no more processes")),
        pytest.raises(PhonemiserError, match=r"can't be started: no more processes"),
    ):
        Espeak().start()


def test_without_the_wheel_the_phonemiser_says_what_to_install() -> None:
    with mock.patch("importlib.util.find_spec", return_value=None), pytest.raises(MissingPhonemiserError, match="pip"):
        Espeak().ipa("Hello.")


# The real server


@pytest.fixture(scope="module")
def ask(server: Server) -> Callable[[bytes, int], Any]:
    client = triton.InferenceServerClient(server.grpc_url)

    def ask(text: bytes, start: int) -> Any:
        words, first = triton.InferInput("TEXT", [1], "BYTES"), triton.InferInput("START", [1], "INT64")
        words.set_data_from_numpy(np.array([text], np.object_))
        first.set_data_from_numpy(np.array([start]))
        return client.infer("tts", [words, first])

    return ask


def test_the_server_says_the_same_as_the_library(ask: Callable[[bytes, int], Any], said: Float32) -> None:
    for start in (0, 12_345):
        result = ask(SENTENCE.encode(), start)
        audio = result.as_numpy("AUDIO")
        assert result.as_numpy("SAMPLES").tolist() == [len(said)]
        np.testing.assert_allclose(audio, said[start : start + len(audio)], atol=1e-5)


@needs_espeak
def test_prepared_replies_do_not_wait_for_a_phonemiser_that_hangs(
    server: Server, ask: Callable[[bytes, int], Any]
) -> None:
    ask(b"It runs.", 0)
    children = psutil.Process(server.pid).children(recursive=True)
    [espeak] = [child for child in children if "_espeak.py" in " ".join(child.cmdline())]
    espeak.suspend()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(ask, text, 0) for text in (b"It hangs.", b"It still hangs.")]
        for start in (0, FIRST_PIECE):
            assert len(ask(SENTENCE.encode(), start).as_numpy("AUDIO"))
        assert ask(b"It runs.", FIRST_PIECE).as_numpy("SAMPLES")
        assert not any(each.done() for each in waiting)
        espeak.resume()
        assert all(len(each.result(10).as_numpy("AUDIO")) for each in waiting)


def test_what_was_given_up_before_its_turn_is_not_said(server: Server, ask: Callable[[bytes, int], Any]) -> None:
    assert server.run_dir is not None
    log = server.run_dir / "triton.log"
    words, first = triton.InferInput("TEXT", [1], "BYTES"), triton.InferInput("START", [1], "INT64")
    words.set_data_from_numpy(np.array([SENTENCE.encode()], np.object_))
    first.set_data_from_numpy(np.array([LONGEST_PIECE]))

    def dropped(client: triton.InferenceServerClient) -> bool:
        """Some that wait are given up, unless all were answered, or had not even been sent."""
        calls = [
            client.async_infer("tts", [words, first], lambda result, error: None, request_id="given-up")
            for _ in range(20)
        ]
        time.sleep(0.01)
        for call in calls:
            call.cancel()
        ask(SENTENCE.encode(), 0)
        return any("given-up" in line and "dropped" in line for line in log.read_text().splitlines())

    with triton.InferenceServerClient(server.grpc_url) as client:
        wait_for(lambda: dropped(client))


@pytest.mark.parametrize(
    ("text", "start", "reason"),
    [
        (b"\xff\xfe", 0, "TEXT is no UTF-8."),
        (b"", 0, "neither letter nor digit"),
        (b"Hello!", 2**62, "START is 4611686018427387904"),
        (b"Hello!", -(2**63), "START is -9223372036854775808"),
    ],
)
def test_the_server_says_why_it_will_not(
    ask: Callable[[bytes, int], Any], text: bytes, start: int, reason: str
) -> None:
    with pytest.raises(InferenceServerException, match=reason) as caught:
        ask(text, start)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
