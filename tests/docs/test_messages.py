"""What the docs quote is what the sources say."""

import re

import pytest
from documents import Page
from messages import Messages

from talksplat.server import ROOT

SOURCES = [
    path
    for folder in ("talksplat", "client/talksplat_client", "client/web", "export/talksplat_export", "model_repository")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".js") and "node_modules" not in path.parts
] + [ROOT / "tools" / "preflight.py", ROOT / "deploy" / "nginx" / "edge.lua"]

QUOTED = [
    pytest.param(line, id=f"{path.stem}-{block.line + 1 + number}")
    for path in sorted((ROOT / "docs").glob("*.md"))
    for block in Page(path).of_kind("text", "quoted")
    for number, line in enumerate(block.text.splitlines())
]


@pytest.fixture(scope="module")
def messages() -> Messages:
    return Messages(SOURCES)


@pytest.mark.parametrize("line", QUOTED)
def test_a_quoted_message_is_one_of_the_projects(line: str, messages: Messages) -> None:
    finding = re.sub(r"^(warning|note): |^ *(ok|note|problem)  \w+: ", "", line)
    finding = re.sub(r" \(at [\d:., -]+\)\.$", ".", finding)  # when, which is put after the sentence
    assert messages.has(finding)


@pytest.mark.parametrize(
    "line",
    [
        "Port 8001 (grpc) can't be used (Address already in use): turn it off and on again.",
        "no talksplat server answers at 127.0.0.1:8001: the moon was full and nobody was at home",
        "Something has gone wrong.",
    ],
)
def test_a_message_that_nobody_says_would_be_found(line: str, messages: Messages) -> None:
    assert not messages.has(line)
