"""Lines about requests: what is in them, what is not, and that one id leads through all of them."""

import json
import logging
import time
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting import wait_for
from watched import KEY, Watched

from talksplat import clock, log
from talksplat.edge import Address
from talksplat.log import Fields
from talksplat.server import ROOT, readable
from talksplat_client import Client, Tls


@pytest.fixture
def logger(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """Configured as in a model's process; what was there before comes back."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    monkeypatch.setenv(log.LEVEL_VARIABLE, "debug")
    log.configure()
    yield logging.getLogger("model")
    root.handlers[:] = before
    root.setLevel(level)


def lines(capfd: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capfd.readouterr().err.splitlines() if line]


def test_a_line_holds_event_and_fields(logger: logging.Logger, capfd: pytest.CaptureFixture[str]) -> None:
    logger.warning("dropped", extra=Fields(request_id="s1-8", tenant="acme", frames=4, age_ms=812.3456))
    (line,) = lines(capfd)
    moment = line.pop("time")
    assert line == {
        "level": "warning",
        "event": "dropped",
        "request_id": "s1-8",
        "tenant": "acme",
        "frames": 4,
        "age_ms": 812.35,
    }
    assert len(moment) == len("2026-11-22T21:00:00.123Z")


def test_nothing_else_gets_in(logger: logging.Logger, capfd: pytest.CaptureFixture[str]) -> None:
    logger.warning("refused", extra={"text": "my secret", "audio": [0.1], "authorization": "Bearer k"})
    try:
        raise ValueError("my secret")
    except ValueError:
        logger.exception("failed")
    refused, failed = lines(capfd)
    assert set(refused) == {"time", "level", "event"}
    assert (failed["error"], failed["where"].split(":")[0]) == ("ValueError", "test_log.py")
    assert "my secret" not in json.dumps([refused, failed])


@given(st.text(max_size=600))
def test_whatever_a_client_calls_a_request_it_stays_one_line(request_id: str) -> None:
    record = logging.makeLogRecord({"msg": "rendered", "request_id": request_id, "levelno": logging.INFO})
    line = log.JsonFormatter().format(record)
    assert "\n" not in line
    assert line.isascii()
    assert json.loads(line)["request_id"] == request_id[: log.LONGEST]
    assert readable(f"{line}\n") == line


def test_a_flood_is_cut_and_counted(
    logger: logging.Logger, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for _ in range(3 * log.LINES_PER_SECOND):
        logger.warning("dropped")
        logger.debug("rendered")
    logger.warning("refused")  # another event has a measure of its own
    found = [line["event"] for line in lines(capfd)]
    assert [found.count(event) for event in ("dropped", "rendered", "refused")] == [
        log.LINES_PER_SECOND,
        3 * log.LINES_PER_SECOND,
        1,
    ]
    now = 101.0
    logger.warning("dropped")
    logger.warning("dropped")
    first, second = lines(capfd)
    assert first["skipped"] == 2 * log.LINES_PER_SECOND
    assert "skipped" not in second


def test_a_level_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(log.LEVEL_VARIABLE, "loud")
    with pytest.raises(ValueError, match="TALKSPLAT_LOG is 'loud', expected one of debug, info, warning, error"):
        log.configure()


def test_every_answer_has_its_line(watched: Watched) -> None:
    watched.speak(index=4, request_id="answer-4")
    line = watched.line(request_id="answer-4")
    assert (line["level"], line["event"], line["frames"]) == ("debug", "rendered", clock.CHUNK_FRAMES)
    assert (line["tenant"], line["avatar"]) == ("acme", "red")
    assert 0 < line["age_ms"] < 30_000


def test_refusals_have_their_reason(watched: Watched) -> None:
    watched.refused(avatar="nobody", request_id="wrong-0")
    watched.refused(parameters={"quality": 0}, request_id="wrong-4")
    unknown = watched.line(request_id="wrong-0")
    bad = watched.line(request_id="wrong-4")
    assert (unknown["level"], unknown["event"], unknown["error"]) == ("warning", "refused", "avatar")
    assert (bad["level"], bad["event"], bad["error"]) == ("warning", "refused", "request")


def test_loading_and_unloading_are_told(watched: Watched) -> None:
    watched.operate("preload", "green", tenant="bolt")
    watched.operate("unload", "green", tenant="bolt", request_id="away")
    watched.operate("preload", "green", tenant="bolt", request_id="back")
    away = watched.line(request_id="away", event="unload")
    back = watched.line(request_id="back", event="preload")
    assert (away["avatar"], back["avatar"], back["level"]) == ("green", "green", "info")
    assert back["milliseconds"] > 0
    released = watched.lines(event="released", avatar="green")
    loaded = watched.lines(event="loaded", avatar="green")
    assert away["time"] >= released[-1]["time"]
    assert released[-1]["time"] <= loaded[-1]["time"] <= back["time"]


def test_what_was_said_is_nowhere(watched: Watched) -> None:
    with wave.open(str(ROOT / "demo" / "speech.wav")) as file:
        pcm = np.frombuffer(file.readframes(4 * file.getframerate()), np.int16)
        audio = (pcm[: 4 * file.getframerate()] / 32768).astype(np.float32)
        assert file.getframerate() == clock.SAMPLE_RATE
        assert file.getnchannels() == 1
    answer = watched.ask("transcribe", "acme", {"request_id": "said-0"}, AUDIO=audio)
    words = [word for word in answer.as_numpy("TEXT").item().decode().lower().split() if len(word) > 5]
    assert words
    line = watched.line(request_id="said-0")
    assert line["event"] == "transcribed"
    assert set(line) == {"time", "level", "event", "request_id", "milliseconds"}
    text = watched.log().lower()
    assert [word for word in words if f" {word}" in text or f'"{word}' in text] == []


def test_one_id_leads_from_client_through_edge_and_rasterizer_to_the_span(
    watched: Watched, edge: Path, address: Address
) -> None:
    noise = np.random.default_rng(0).normal(scale=0.1, size=10 * clock.SAMPLE_RATE).astype(np.float32)
    with Client(address.url, api_key=KEY, tls=Tls(address.certificate)) as client:
        stream = client.animate([noise], avatar="red", sample_rate=clock.SAMPLE_RATE)
        sent = {f"{stream.state.id}-{frame.index}" for frame in list(stream)[:: clock.CHUNK_FRAMES]}
    assert len(sent) == 63  # of which some are traced
    wait_for(lambda: all(f'"event": "rendered", "request_id": "{each}"' in watched.log() for each in sent))

    def passed() -> set[str]:  # the edge writes its line after the answer
        lines = (edge / "access.log").read_text().splitlines(keepends=True)
        return {json.loads(line)["id"] for line in lines if line.endswith("\n")}

    wait_for(lambda: sent <= passed())
    # one request in 25 is traced
    wait_for(lambda: len([span for span in watched.spans(name="rasterizer") if span.request_id in sent]) >= 2)
    assert KEY not in watched.log() + (edge / "access.log").read_text()
