"""Steps: done once, done again when something differs, and how long the rest takes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from talksplat_export import bars
from talksplat_export.steps import Steps


class Clock:
    """Seconds that pass when told to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock.monotonic)
    return clock


def make(folder: Path, **plan: float) -> tuple[Steps, io.StringIO]:
    text = io.StringIO()
    return Steps(folder, plan, Console(file=text, width=200)), text


def run(steps: Steps, name: str, key: str, kept: str = "") -> None:
    with steps.running(name, key, 1, [f"{name}.txt"], kept) as advance:
        (steps.folder / f"{name}.txt").write_text(f"{name} of {key}")
        advance(1)


def interrupted(steps: Steps, keep: Callable[[], object], clock: Clock | None = None) -> None:
    with steps.running("cut", "a", 1, [], kept="half"):
        keep()
        if clock is not None:
            clock.now += 5
        raise KeyboardInterrupt


def test_a_step_is_done_until_its_inputs_or_its_files_change(tmp_path: Path) -> None:
    steps, _ = make(tmp_path)
    assert not steps.is_done("cut", "a")
    run(steps, "cut", "a")
    again, text = make(tmp_path)  # another process
    assert again.is_done("cut", "a")
    assert not again.is_done("cut", "b")
    (tmp_path / "cut.txt").write_text("something else")
    assert not again.is_done("cut", "a")
    assert "damaged" in text.getvalue()
    (tmp_path / "cut.txt").unlink()
    assert not again.is_done("cut", "a")


def test_an_interrupted_step_is_not_done_and_its_seconds_add_up(tmp_path: Path, clock: Clock) -> None:
    steps, _ = make(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        interrupted(steps, lambda: (tmp_path / "half").write_text("half"), clock)
    steps, _ = make(tmp_path)
    assert not steps.is_done("cut", "a")
    with steps.running("cut", "a", 1, [], kept="half"):
        assert (tmp_path / "half").read_text() == "half"
        clock.now += 7
    assert steps.seconds == {"cut": 12.0}
    assert not (tmp_path / "half").exists()
    assert steps.is_done("cut", "a")


def test_what_was_kept_of_other_inputs_is_not_gone_on_from(tmp_path: Path) -> None:
    steps, _ = make(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        interrupted(steps, (tmp_path / "half").mkdir)
    steps, _ = make(tmp_path)
    with steps.running("cut", "b", 1, [], kept="half"):
        assert not (tmp_path / "half").exists()


@pytest.mark.parametrize("damaged", ["", "{", "[]", '{"steps": 3}', '{"steps": {"cut": 1}, "peak_memory_bytes": 0}'])
def test_a_damaged_list_of_steps_does_everything_anew(tmp_path: Path, damaged: str) -> None:
    steps, _ = make(tmp_path)
    run(steps, "cut", "a")
    (tmp_path / "steps.json").write_text(damaged)
    steps, text = make(tmp_path)
    assert not steps.is_done("cut", "a")
    assert "every step is done anew" in text.getvalue()


def test_a_key_depends_on_every_input() -> None:
    keys = {Steps.key(*inputs) for inputs in ((), (1,), (1, 2), ("1", 2), (12,), (None,), (1, 2.0))}
    assert len(keys) == 7


def test_the_time_left_follows_the_pace_of_this_machine(tmp_path: Path, clock: Clock) -> None:
    steps, text = make(tmp_path, cut=10.0, fit=30.0, look=5.0)
    with steps.running("cut", "a", 1, []):
        clock.now += 20  # half as fast as planned
    with steps.running("fit", "a", 101, []) as advance:
        advance(2)
        clock.now += 30
        advance(51)
        assert text.getvalue() == "fit: 51 of 101 in 30 s, left: 30 s, 40 s of the whole\n"
        steps.skipped("look")
        clock.now += 30
        advance(101)
    assert text.getvalue().endswith("fit: 101 of 101 in 60 s, left: 0 s, 0 s of the whole\n")


def test_peak_memory_is_that_of_every_process(tmp_path: Path) -> None:
    steps, _ = make(tmp_path)
    run(steps, "cut", "a")
    document = json.loads((tmp_path / "steps.json").read_text())
    assert document["peak_memory_bytes"] > 1 << 20
    document["peak_memory_bytes"] = 1 << 50
    (tmp_path / "steps.json").write_text(json.dumps(document))
    assert make(tmp_path)[0].peak_memory == 1 << 50


@pytest.mark.parametrize(("seconds", "words"), [(0.2, "0 s"), (99, "99 s"), (100, "2 min"), (3600, "60 min")])
def test_durations_in_words(seconds: float, words: str) -> None:
    assert bars.duration(seconds) == words


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    text = io.StringIO()
    with bars.shown(Console(file=text, force_terminal=True, width=120), "cut", 10) as advance:
        advance(4)
        advance(10)
    assert "10/10" in text.getvalue()
    assert "left: 0 s" in text.getvalue()
