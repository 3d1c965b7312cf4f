"""When a turn begins and ends, for any course of speech and silence."""

import re
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from talksplat_client._turns import EndOfSpeech, Turns, conversation

FPS, LONGEST = 25, 30
SETTINGS = EndOfSpeech.load()
SPEECH, SILENCE = 1.0, 0.0
BEGIN, RECOGNISE, FINISHED, UNFINISHED = (
    round(seconds * FPS)
    for seconds in (
        SETTINGS.begin_seconds,
        SETTINGS.recognise_seconds,
        SETTINGS.finished_seconds,
        SETTINGS.unfinished_seconds,
    )
)


def told(turns: Turns, text: str, silence: int) -> tuple[list[str], int]:
    """Events of a turn whose text is known at once, and the frames of silence after which it ended."""
    events = [turns.push(SPEECH) for _ in range(BEGIN)]
    for frame in range(1, silence + 1):
        event = turns.push(SILENCE)
        events += [event, turns.recognised(text)] if event == "recognise" else [event]
        if "end" in events:
            return [event for event in events if event], frame
    return [event for event in events if event], -1


def test_a_finished_text_ends_its_turn_sooner_than_an_unfinished_one() -> None:
    assert told(Turns(SETTINGS, FPS, LONGEST), "A small latte.", 100) == (["begin", "recognise", "end"], FINISHED)
    assert told(Turns(SETTINGS, FPS, LONGEST), "Could you", 100) == (["begin", "recognise", "end"], UNFINISHED)
    assert FINISHED < UNFINISHED


def test_a_turn_does_not_end_before_its_text_is_known() -> None:
    turns = Turns(SETTINGS, FPS, LONGEST)
    assert "end" not in [turns.push(p) for p in [SPEECH] * BEGIN + [SILENCE] * 200]
    assert turns.recognised("Hello.") == "end"
    assert not turns.in_turn


def test_somebody_who_goes_on_takes_the_guess_back() -> None:
    turns = Turns(SETTINGS, FPS, LONGEST)
    events = [turns.push(p) for p in [SPEECH] * BEGIN + [SILENCE] * RECOGNISE]
    assert turns.recognised("Hello.") is None
    assert [*events, turns.push(SPEECH)][-2:] == ["recognise", "resume"]
    assert "end" not in [turns.push(SILENCE) for _ in range(RECOGNISE)]  # the old text is no longer known
    assert turns.recognised("Hello you there.") is None


def test_what_is_recognised_too_late_is_not_taken() -> None:
    turns = Turns(SETTINGS, FPS, LONGEST)
    assert turns.recognised("Hello.") is None  # nobody spoke
    for probability in [SPEECH] * BEGIN:
        turns.push(probability)
    assert turns.recognised("Hello.") is None  # somebody speaks
    assert turns.in_turn


@given(st.lists(st.sampled_from([SPEECH, SILENCE]), max_size=200))
def test_a_turn_has_a_greatest_length_whatever_is_heard(probabilities: list[float]) -> None:
    turns, most = Turns(SETTINGS, FPS, 2), 2 * FPS
    assert [turns.push(SPEECH) for _ in range(BEGIN)][-1] == "begin"
    asked, ended = False, 0
    for frame, probability in enumerate([*probabilities, *[SPEECH] * most], 1):
        event = turns.push(probability)
        asked = event == "recognise" or (asked and event != "resume")
        if asked and frame >= most:
            assert turns.recognised("And then and") == "end"
            ended = frame
            break
        assert event != "end"
    assert ended == most
    assert not turns.in_turn


@given(st.lists(st.floats(0, 1), max_size=200), st.text(max_size=20))
def test_events_come_in_order_whatever_is_heard(probabilities: list[float], text: str) -> None:
    follows = {
        "begin": {"recognise"},
        "recognise": {"resume", "end", "recognise"},
        "resume": {"recognise"},
        "end": {"begin"},
    }
    turns, allowed = Turns(SETTINGS, FPS, 2), {"begin"}
    for number, probability in enumerate(probabilities):
        for event in (turns.push(probability), turns.recognised(text) if number % 3 == 0 else None):
            if event is not None:
                assert event in allowed
                allowed = follows[event]
        assert turns.in_turn == (allowed != {"begin"})


@given(st.integers(0, 40), st.integers(0, 40), st.sampled_from(["", "so", "Yes.", "No"]))
def test_a_turn_never_ends_within_the_silence_that_its_text_allows(pause: int, later: int, text: str) -> None:
    turns = Turns(SETTINGS, FPS, LONGEST)
    _, ended = told(turns, text, pause)
    most = UNFINISHED if re.search(SETTINGS.unfinished, text, re.IGNORECASE) else FINISHED
    assert ended == (most if pause >= most else -1)


@given(st.floats(0.04, 2), st.floats(0.04, 2))
def test_longer_silence_never_ends_a_turn_sooner(one: float, other: float) -> None:
    ends = [
        told(Turns(replace(SETTINGS, finished_seconds=each, recognise_seconds=0.04), FPS, LONGEST), "Yes.", 60)[1]
        for each in sorted((one, other))
    ]
    assert ends[0] <= ends[1]


def test_every_rule_of_the_script_can_match_and_the_last_one_always_does() -> None:
    *_, last = rules = conversation()["script"]
    assert last["hears"] == ""
    for rule in rules:
        re.compile(rule["hears"])
        assert rule["says"].strip()
