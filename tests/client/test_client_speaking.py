"""What tells sentences apart, and a text's speech: on the scripted server, and on the real one's voice."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_server import ScriptedServer
from tritonclient.grpc import service_pb2
from waiting import wait_for

from talksplat.server import Server
from talksplat_client import AsyncClient, Client, InvalidRequestError, Retry, ServerError, TalksplatError, sentences
from talksplat_client._audio import Samples
from talksplat_client._speaking import Recital

FAST = Retry(first=0.01, longest=0.02)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello! I am here. Are you?", ["Hello!", "I am here.", "Are you?"]),
        ("It costs 3.50 dollars. Fine.", ["It costs 3.50 dollars.", "Fine."]),
        ("Dr. Smith and J. R. Tolkien met. Both laughed.", ["Dr. Smith and J. R. Tolkien met.", "Both laughed."]),
        ("Fruit, e.g. apples, pears etc. We like them.", ["Fruit, e.g. apples, pears etc.", "We like them."]),
        ('"Why?" he asked. (Nobody knew.) So...', ['"Why?"', "he asked.", "(Nobody knew.)", "So..."]),
        ("First line\n- second line\n\n", ["First line", "- second line"]),
        ("That was I. He left.", ["That was I.", "He left."]),
        ("  no mark at the end ", ["no mark at the end"]),
        ("... ?! \n -", []),
        ("", []),
    ],
)
def test_sentences_end_at_marks_and_lines_but_not_in_abbreviations(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


@given(st.text(alphabet=st.sampled_from(list("aB1 .!?\n,\"'")), max_size=60))
def test_no_letter_is_lost_and_no_sentence_is_empty(text: str) -> None:
    found = sentences(text)
    assert [c for c in "".join(found) if c.isalnum()] == [c for c in text if c.isalnum()]
    assert all(each == each.strip() and any(map(str.isalnum, each)) for each in found)


@given(st.text(alphabet=st.sampled_from(list("aB1 .!?\n")), max_size=40), st.text(alphabet="aB. ", max_size=20))
def test_of_a_text_that_grows_all_but_the_last_two_sentences_stay(text: str, more: str) -> None:
    """The last one goes on; the one before may turn out to have ended in an abbreviation."""
    found = sentences(text)
    assert sentences(text + more)[: max(0, len(found) - 2)] == found[:-2]


def test_a_server_that_sends_nothing_or_too_much_is_not_asked_for_ever() -> None:
    for piece in (0, 11):
        with pytest.raises(ServerError, match="of 10 of a sentence"):
            Recital("Hello.").came(np.zeros(piece, np.float32), 10)


def blocking(url: str, text: str) -> list[Samples]:
    with Client(url, retry=FAST) as client:
        return list(client.synthesize(text))


def asynchronous(url: str, text: str) -> list[Samples]:
    async def run() -> list[Samples]:
        async with AsyncClient(url, retry=FAST) as client:
            return [piece async for piece in client.synthesize(text)]

    return asyncio.run(run())


Twin = Callable[[str, str], list[Samples]]
both = pytest.mark.parametrize("synthesize", [blocking, asynchronous])


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@both
def test_every_sentence_comes_whole_and_in_order(scripted: ScriptedServer, synthesize: Twin) -> None:
    pieces = synthesize(scripted.url, "Yes. No!")
    assert [len(piece) for piece in pieces] == [1000, 1000, 800, 1000, 1000, 100]
    expected = [np.arange(700 * letters, dtype=np.float32) for letters in (4, 3)]
    np.testing.assert_array_equal(np.concatenate(pieces), np.concatenate(expected))
    assert [asked.id.rpartition("-")[2] for asked in scripted.asked] == ["0", "1000", "2000"] * 2


@both
def test_a_text_without_a_word_is_silent(scripted: ScriptedServer, synthesize: Twin) -> None:
    assert synthesize(scripted.url, " ... ") == []
    assert not scripted.asked


@both
def test_a_server_that_fails_for_a_moment_is_asked_again(synthesize: Twin) -> None:
    def stumble(chunk: int, before: int, context: Any) -> None:
        if before == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "Stub process is not healthy")

    with ScriptedServer(script=stumble) as server:
        assert sum(map(len, synthesize(server.url, "Yes."))) == 2800
        assert server.count == 4  # three pieces, one of them twice


@both
def test_what_the_voice_cannot_say_is_an_error_of_its_type(synthesize: Twin) -> None:
    def refuse(chunk: int, before: int, context: Any) -> None:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "TEXT is no prepared reply")

    with ScriptedServer(script=refuse) as server, pytest.raises(InvalidRequestError, match="no prepared reply"):
        synthesize(server.url, "Something else.")


@both
def test_an_answer_of_another_kind_is_the_servers_error(scripted: ScriptedServer, synthesize: Twin) -> None:
    answer = service_pb2.ModelInferResponse()
    answer.outputs.add(name="AUDIO", datatype="FP32", shape=[1])
    answer.raw_output_contents.append(b"\0\0\0\0")
    scripted._tts = lambda request, context: answer  # type: ignore[method-assign]
    with pytest.raises(ServerError, match="lacks SAMPLES"):
        synthesize(scripted.url, "Hello.")


def test_the_next_piece_is_on_its_way_while_one_is_played_and_is_dropped_with_it(scripted: ScriptedServer) -> None:
    with Client(scripted.url) as client:
        pieces = client.synthesize("Yes.")
        next(pieces)
        assert wait_for(lambda: scripted.count == 2, 5)
        scripted.delay = lambda chunk: 10.0
        next(pieces)
        assert wait_for(lambda: scripted.open == 1, 5)
        pieces.close()  # type: ignore[attr-defined]  # it is a generator, as anybody's loop that ends early closes
        assert wait_for(lambda: scripted.cancelled == 1, 5)


def test_a_closed_client_says_so_to_whoever_waits_and_whoever_asks(scripted: ScriptedServer) -> None:
    client = Client(scripted.url)
    client.clock()
    scripted.delay = lambda chunk: 10.0
    closing = threading.Timer(0.3, client.close)
    closing.start()
    for _ in range(2):
        with pytest.raises(TalksplatError, match="the client is closed"):
            list(client.synthesize("Yes."))
    closing.join()


async def test_a_closed_asyncio_client_says_so_to_whoever_waits_and_whoever_asks(scripted: ScriptedServer) -> None:
    client = AsyncClient(scripted.url)
    await client.clock()
    scripted.delay = lambda chunk: 10.0
    closing = asyncio.create_task(_later(client.close))
    for _ in range(2):
        with pytest.raises(TalksplatError, match="the client is closed"):
            await anext(client.synthesize("Yes."))
    await closing


async def _later(action: Callable[[], Awaitable[None]]) -> None:
    await asyncio.sleep(0.3)
    await action()


# The real server


@both
def test_the_script_is_said_in_pieces_and_understood(server: Server, synthesize: Twin) -> None:
    text = "One moment, please. I would make that coffee, but I only have a script."
    pieces = synthesize(server.grpc_url, text)
    audio = np.concatenate(pieces)
    assert len(pieces) > 4
    assert 3 < len(audio) / 16_000 < 6
    assert np.abs(audio).max() <= 1
    with Client(server.grpc_url) as client:
        heard = client.transcribe(audio)
    assert re.findall(r"\w+", heard.lower()) == re.findall(r"\w+", text.lower())


@both
def test_the_real_voice_refuses_what_is_too_long(server: Server, synthesize: Twin) -> None:
    with pytest.raises(InvalidRequestError, match="600 characters, expected 500 at most"):
        synthesize(server.grpc_url, "a" * 600)
