"""The docs lead somewhere: files, anchors, pictures; and they are short."""

import xml.etree.ElementTree as ET
from pathlib import Path
from urllib.parse import unquote

import pytest
from documents import Page

from talksplat.server import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    *DOCS,
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(
        path
        for folder in ("avatars", "client", "deploy", "export", "loadtests")
        for path in sorted((ROOT / folder).rglob("*.md"))
        if "node_modules" not in path.parts and path.parent.name != "results"
    ),
]
LONGEST = 1200  # words of prose: five minutes


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_to_files_and_headings_that_are_there(path: Path) -> None:
    broken = []
    for link in Page(path).links:
        place, _, anchor = link.target.partition("#")
        if place.startswith(("https://", "http://")):
            continue
        target = (path.parent / unquote(place)).resolve() if place else path
        if (
            not target.exists()
            or not target.is_relative_to(ROOT)
            or (anchor and anchor not in Page(target).anchors)
            or (link.is_picture and not link.text)  # what somebody hears who does not see it
        ):
            broken.append(link.target)
    assert broken == []


def test_every_page_is_in_the_index() -> None:
    index = {link.target for link in Page(ROOT / "docs" / "README.md").links}
    assert {path.name for path in DOCS} - index == {"README.md"}


@pytest.mark.parametrize("path", DOCS, ids=name)
def test_a_page_is_read_in_minutes_and_says_where_to_go_next(path: Path) -> None:
    page = Page(path)
    assert len(page.prose.split()) <= LONGEST
    if path.name not in ("README.md", "troubleshooting.md"):
        assert "next" in page.anchors


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.svg")), ids=name)
def test_a_drawing_is_small_says_what_it_shows_and_knows_the_dark(path: Path) -> None:
    assert path.stat().st_size < 16_000
    root = ET.parse(path).getroot()
    texts = {child.tag.rpartition("}")[2]: child.text or "" for child in root}
    assert texts["title"]
    assert "prefers-color-scheme: dark" in texts["style"]
    assert any(path.name in Page(each).text for each in DOCS)
