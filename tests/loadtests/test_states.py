"""The study of what a face does while it idles, listens and speaks; with the real avatar and nets, few frames."""

from pathlib import Path

import pytest
import simplejpeg

from loadtests import states
from loadtests.states import Stage, draw


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage()


def test_listening_comes_within_two_chunks_and_pictures_are_of_the_poses_told(stage: Stage) -> None:
    shots = stage.play(("idle", "idle", "listening", "listening", "listening"), first=3)
    assert [shot.pose.lids for shot in shots[:8]] == [0] * 8
    assert [shot.pose.lids for shot in shots[8:]] == [-1, -1, -2, -2, -3, -4, -4, -5, -5, -5, -5, -5]
    again = stage.play(["listening"], first=7)
    assert [shot.data for shot in shots[16:]] == [shot.data for shot in again]


def test_speakers_move_their_lips_and_their_heads(stage: Stage) -> None:
    speaking, idle = stage.play(["speaking"] * 3, first=3), stage.play(["idle"] * 3, first=3)
    assert [shot.data for shot in speaking] != [shot.data for shot in idle]
    assert any(shot.turn.any() for shot in speaking)
    assert not any(shot.turn.any() for shot in idle)


def test_the_picture_is_small_enough_for_a_readme(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "SHOWN", 2)
    draw(stage, tmp_path / "states.jpg")
    data = (tmp_path / "states.jpg").read_bytes()
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    assert (width, height) == (300, 670)
    assert len(data) < 150_000
