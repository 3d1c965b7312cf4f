"""Markdown pages as the tests read them: fenced blocks, commands, headings and links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|!?\[[^\[\]]*\](?:\([^()]*\))?)*)\]\(([^()\s]+)\)")
_CODE = re.compile(r"`[^`\n]*`")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    kind: tuple[str, ...]  # the words after the fence: ("sh",), ("text", "quoted")
    text: str
    line: int  # of its fence, counted from 1

    @property
    def commands(self) -> list[str]:
        """Of a block of shell: a line each, as the shell takes it; those that go on with a backslash are joined."""
        lines = re.sub(r" *\\\n *", " ", self.text).splitlines()
        return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


@dataclass(frozen=True)
class Link:
    """A link of a page, or a picture in it."""

    target: str
    text: str
    is_picture: bool


@dataclass(frozen=True)
class Page:
    """One Markdown file."""

    path: Path

    @cached_property
    def text(self) -> str:
        """As it is written."""
        return self.path.read_text()

    @cached_property
    def blocks(self) -> list[Block]:
        """All fenced blocks, in order."""
        return [
            Block(
                tuple(found["info"].split()),
                re.sub(f"^{found['indent']}", "", found["text"], flags=re.MULTILINE),
                self.text.count("\n", 0, found.start()) + 1,
            )
            for found in _FENCE.finditer(self.text)
        ]

    @cached_property
    def prose(self) -> str:
        """Without fenced blocks."""
        return _FENCE.sub("", self.text)

    def of_kind(self, *kind: str) -> list[Block]:
        """The blocks of a kind."""
        return [block for block in self.blocks if block.kind == kind]

    @cached_property
    def anchors(self) -> set[str]:
        """What a link to a heading may end with, as GitHub makes it."""
        anchors: set[str] = set()
        for heading in _HEADING.findall(self.prose):
            slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
            number = 1
            anchor = slug
            while anchor in anchors:
                anchor = f"{slug}-{number}"
                number += 1
            anchors.add(anchor)
        return anchors

    @property
    def links(self) -> Iterator[Link]:
        """All links and pictures."""
        prose = _CODE.sub(lambda found: "`" + "x" * (len(found[0]) - 2) + "`", self.prose)
        waiting = [prose]
        while waiting:  # a picture may be the text of a link
            for mark, text, target in _LINK.findall(waiting.pop()):
                yield Link(target, text, mark == "!")
                waiting.append(text)
