"""What the project says, as its sources have it: to tell a real message from one that somebody made up."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

LETTERS = 10  # that a message must have of its own, besides what is put into it
WORDS = 6  # from which on what is put in must be a message itself
PREFIXES = ("talksplat: ", "talksplat-server: ", "talksplat doctor: ", "loadtests: ", "error: ")


class Messages:
    """The strings of sources, of which parts may be put in when they are used.

    Args:
        sources: files of Python, Lua and JavaScript.
    """

    def __init__(self, sources: Iterable[Path]) -> None:
        self._patterns: dict[str, re.Pattern[str]] = {}
        for path in sources:
            text = path.read_text()
            parts = _of_python(text) if path.suffix == ".py" else _of_others(text)
            for literals in (line for string in parts for line in _lines(string)):
                if sum(map(str.isalpha, "".join(literals))) >= LETTERS:
                    literals[-1] = literals[-1].rstrip(".")  # models end all they say with one, and begin it large
                    pattern = "(.*?)".join(map(re.escape, literals)) + r"\.?"
                    self._patterns.setdefault(pattern, re.compile(pattern, re.DOTALL | re.IGNORECASE))

    def has(self, text: str) -> bool:
        """Whether some source says this. What is put in may be anything short, or another message."""
        plain = next((text.removeprefix(prefix) for prefix in PREFIXES if text.startswith(prefix)), None)
        return (plain is not None and self.has(plain)) or any(
            all(len(part.split()) < WORDS or self.has(part) for part in found.groups())
            for pattern in self._patterns.values()
            if (found := pattern.fullmatch(text))
        )


def _lines(literals: list[str]) -> Iterator[list[str]]:
    """The parts of each line of a string."""
    line: list[str] = []
    for literal in literals:
        first, *others = literal.split("\n")
        line.append(first)
        for other in others:
            yield line
            line = [other]
    yield line


def _of_python(text: str) -> Iterator[list[str]]:
    """The literal parts of each string; between two of them something is put in."""
    inside: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.JoinedStr):
            literals = [""]
            for value in node.values:
                if isinstance(value, ast.Constant):
                    inside.add(id(value))
                    literals[-1] += str(value.value)
                else:
                    literals.append("")
            yield literals
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield _FORMAT.split(node.value)


_FORMAT = re.compile(r"\{\}|%[ds]")  # of str.format, and of logging
_STRING = re.compile(r'"((?:[^"\\\n]|\\.)*)"|`((?:[^`\\]|\\.)*)`')
_PUT_IN = re.compile(r"\$\{[^}]*\}|%[ds]")


def _of_others(text: str) -> Iterator[list[str]]:
    for plain, template in _STRING.findall(text):
        yield _PUT_IN.split(plain or template)
