from pathlib import Path

import pytest

from talksplat.files import replacing


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    with replacing(path) as unfinished:
        unfinished.write_text("half")
        assert (unfinished.suffix, path.exists()) == (".json", False)
        unfinished.write_text("whole")
    assert {each.name: each.read_text() for each in path.parent.iterdir()} == {"a.json": "whole"}


def test_what_can_not_be_finished_leaves_what_there_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("the old one")

    def fill() -> None:
        with replacing(path) as unfinished:
            unfinished.write_text("half")
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        fill()
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"a.json": "the old one"}
