"""The benchmark of conversations: where speech ends, what is counted, and one conversation through the real server."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests import turns
from loadtests.page import FIRST_SENTENCE, speech
from talksplat import clock
from talksplat.bench._report import commit
from talksplat.server import Server
from talksplat_client import AsyncClient
from talksplat_client._turns import EndOfSpeech

RATE = turns.RATE
SAID = turns.Said("a", 450.0, dict.fromkeys(turns.STAGES, 90.0), 0, 180.0, 1.0)


def greeting() -> turns.Samples:
    return (speech()[: int(FIRST_SENTENCE * RATE)] / 32768).astype(np.float32)


@given(st.integers(10, 100), st.integers(5, 100), st.integers(0, 100))
def test_speech_ends_where_its_last_sound_does_and_noise_is_none(before: int, said: int, after: int) -> None:
    tone = 0.1 * np.sin(np.arange(said * turns.STEP) / 5)
    samples = np.concatenate([np.zeros(before * turns.STEP), tone, np.zeros(after * turns.STEP)]).astype(np.float32)
    if said > 0.06 * (before + said + after):  # the loud ones are a twentieth of all
        noisy = samples + turns.noise(len(samples) / RATE)
        assert turns.spoken(noisy) == (before * turns.STEP, (before + said) * turns.STEP)


def test_stages_add_up_to_the_answer_and_who_was_not_answered_is_no_figure() -> None:
    *stages, answer, stops = turns.summary([SAID, dataclasses.replace(SAID, answer=None, stages={}, interruption=None)])
    assert [row["what"] for row in stages] == list(turns.STAGES)
    assert sum(float(row["share_pct"] or 0) for row in stages) == pytest.approx(100)
    assert (answer["p50_ms"], stops["p50_ms"]) == (450.0, 180.0)


def loud_frames(samples: turns.Samples) -> turns.Samples:
    """Speech wherever the window's last frames are loud."""
    last = samples[:, -clock.CHUNK_SAMPLES :].reshape(len(samples), clock.CHUNK_FRAMES, -1)
    loud = np.abs(last).max(axis=2) > 0.05
    return np.asarray(loud, np.float32)


def test_what_is_said_saves_people_from_being_cut_off() -> None:
    tone = np.sin(np.arange(RATE)).astype(np.float32)
    paused = np.concatenate([tone, np.zeros(int(0.4 * RATE), np.float32), tone])
    short = turns.Offline(paused, loud_frames, lambda heard: "A latte with" if len(heard) < 2 * RATE else "With milk.")
    rows = turns.curve("x", [short], EndOfSpeech.load())
    cut = {(row["decided_by"], row["silence_ms"]): row["false_cuts_pct"] for row in rows}
    assert cut["silence", 320.0] == 100
    assert cut["silence and text", 320.0] == 0
    assert cut["silence", 480.0] == 0
    delays = [row["delay_p50_ms"] for row in rows if row["decided_by"] == "silence" and row["silence_ms"] in (320, 480)]
    assert delays == pytest.approx([320, 480], abs=41)  # of frames of 40 ms


async def test_an_utterance_is_answered_and_its_answer_interrupted(server: Server) -> None:
    if not (server.avatars / turns.AVATAR).is_dir():
        pytest.skip("ava is not fitted")
    async with AsyncClient(server.grpc_url) as client:
        said = await turns.say(client, "greeting", greeting())
    assert said.false_cuts == 0
    assert said.answer is not None
    assert 200 < said.answer < 5000
    assert sum(said.stages.values()) == pytest.approx(said.answer)
    assert said.interruption is not None
    assert 0 < said.interruption < 2000


async def test_what_was_said_already_is_not_said_again(tmp_path: Path) -> None:
    kept = tmp_path / "turns.jsonl"
    kept.write_text(json.dumps({"commit": commit(), **dataclasses.asdict(SAID)}) + "\n")
    assert await turns.converse_with("127.0.0.1:1", [("a", greeting())], kept) == [SAID]  # there is no server


def test_without_recordings_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert turns.main(["--recordings", str(tmp_path)]) == 2
    assert "no recordings" in capsys.readouterr().err
