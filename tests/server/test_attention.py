"""What a face does besides its lips, idle, listening and speaking, and that it never jumps."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_avatar import make_staring_avatar, write_avatar

from talksplat import avatar as bundle
from talksplat import clock
from talksplat.animator import Animator, Chunk, Options
from talksplat.attention import LID_STEPS, LOOP_FRAMES, NOD_SLOT, SWAY, Head, Pose, lids, sway

Float32 = npt.NDArray[np.float32]
Picture = npt.NDArray[np.int16]

AVA = Path(__file__).resolve().parents[2] / "avatars"
SEEDS = st.integers(-(2**63), 2**63 - 1)
INDICES = st.integers(0, 10**9)
REST = np.zeros((clock.CHUNK_FRAMES, bundle.COEFFICIENTS), np.float32)
MOST = Pose(plate=8, lids=27, nod=2, look=(28, 10))  # that two frames in a row differ; a blink alone: 22


def viewmats(plates: int, seed: int = 0) -> Float32:
    """A head that nods and turns by some degrees, slowly."""
    rng = np.random.default_rng(seed)
    mats = np.tile(np.eye(4, dtype=np.float32), (plates, 1, 1))
    phases = 2 * np.pi * (np.arange(plates)[:, None] / rng.uniform(40, 120, 3) + rng.random(3))
    for mat, (x, y, z) in zip(mats, np.radians(3) * np.sin(phases), strict=True):
        mat[:3, :3] = np.diag([1, -1, -1]) @ np.array([[1, -z, y], [z, 1, -x], [-y, x, 1]])
        mat[:3, 3] = [0, 0, 1]
    return mats


HEADS = [Head(viewmats(plates)) for plates in (1, 7, 60, 150, 700)]


def poses(head: Head, index: int, seed: int, levels: Sequence[float], speech: Sequence[float]) -> list[Pose]:
    """One after the other, that listen so much at the ends of their chunks, percent; it begins at none."""
    found: list[Pose] = []
    for number, (before, after) in enumerate(itertools.pairwise([0.0, *levels])):
        options = Options(listening_before=round(before), listening=round(after))
        for frame in range(clock.CHUNK_FRAMES):
            at = index + number * clock.CHUNK_FRAMES + frame
            found.append(head.pose(at, seed, options.listening_at(frame), speech[len(found) % len(speech)]))
    return found


@settings(max_examples=150)
@given(
    st.sampled_from(HEADS),
    INDICES,
    SEEDS,
    st.lists(st.tuples(st.sampled_from([-50, -20, 0, 20, 50]), st.integers(1, 12)), max_size=8),
    st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=1, max_size=20),
)
def test_a_pose_never_jumps_however_listening_comes_and_goes(
    head: Head, index: int, seed: int, turns: list[tuple[int, int]], speech: list[float]
) -> None:
    levels = [0.0]
    for step, times in turns:
        levels += [min(max(levels[-1] + step * (time == 0), 0), 100) for time in range(times)]
    for one, other in itertools.pairwise(poses(head, index, seed, levels, speech)):
        assert abs(one.plate - other.plate) <= MOST.plate
        assert abs(one.lids - other.lids) <= MOST.lids
        assert abs(one.nod - other.nod) <= MOST.nod
        assert abs(one.look[0] - other.look[0]) <= MOST.look[0]
        assert abs(one.look[1] - other.look[1]) <= MOST.look[1]
        assert 0 <= other.plate < len(head.viewmats)
        assert -LID_STEPS / 8 <= other.lids <= LID_STEPS


@pytest.mark.parametrize("head", HEADS[2:], ids=lambda head: str(len(head.viewmats)))
def test_a_listener_looks_at_the_viewer_and_nods_and_an_idle_face_looks_aside(head: Head) -> None:
    idle = [head.pose(index, 5, 0) for index in range(head.loop)]
    listening = [head.pose(index, 5, 1) for index in range(head.loop)]
    spoken = [head.pose(index, 5, 0, 1) for index in range(head.loop)]
    assert max(abs(pose.look[0]) for pose in spoken) < 20 < max(abs(pose.look[0]) for pose in idle)
    away = [abs(pose.look[0]) > 15 for pose in idle]  # 7 degrees
    assert 0.2 < np.mean(away) < 0.7
    assert max(abs(pose.look[0]) for pose in listening) < 12
    assert {pose.nod for pose in idle} == {0}
    down = head.viewmats[:, 1, 2]  # of the way in which the face looks
    low = [number for number, pose in enumerate(listening[9:], 9) if pose.nod == 5 > listening[number - 1].nod]
    assert len(low) >= head.loop // NOD_SLOT - 1
    depths = [down[listening[number].plate] - down[listening[number - 7].plate] for number in low]
    assert np.median(depths) > np.radians(1)
    assert min(depths) > -np.radians(1)


@settings(max_examples=30)
@given(SEEDS)
def test_a_listener_blinks_half_as_often_and_opens_the_eyes_wider(seed: int) -> None:
    shut = [[lids(index, seed, listening) == LID_STEPS for index in range(2000)] for listening in (0, 1)]
    assert [sum(each) for each in shut] == [20, 10]
    assert min(lids(index, seed, 0) for index in range(100)) == 0
    assert min(lids(index, seed, 1) for index in range(100)) < 0


@settings(max_examples=50)
@given(INDICES, SEEDS)
def test_a_speaker_sways_within_bounds_and_without_a_jump(index: int, seed: int) -> None:
    turns = np.array([sway(index + frame, seed) for frame in range(60)])
    assert (np.abs(turns) <= SWAY).all()
    assert (np.abs(np.diff(turns, axis=0)) <= 2 * 1.5 / 14 * SWAY + 1e-9).all()
    assert (np.ptp(turns, axis=0) > 0.1 * SWAY).all()


def test_looks_and_nods_come_again_with_the_plates_whatever_the_seed() -> None:
    head = HEADS[3]
    assert head.loop == LOOP_FRAMES
    for listening in (0.0, 1.0):
        seen = {replace(head.pose(index, 3, listening), lids=0) for index in range(head.loop)}
        assert {replace(head.pose(index, -8, listening), lids=0) for index in range(5000, 6000)} <= seen


# --- what is drawn --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ava() -> Iterator[Animator]:
    animator = Animator(AVA, threads=1)
    yield animator
    animator.close()


def pictures(animator: Animator, chunks: Sequence[Chunk]) -> list[Picture]:
    found = []
    for frames in animator.render(chunks):
        assert isinstance(frames, list)
        for frame in frames:
            side = int((len(frame) / 3) ** 0.5)
            found.append(np.frombuffer(frame, np.uint8).reshape(side, side, 3).astype(np.int16))
    return found


def chunk(index: int, listening: tuple[int, int], speech: float, avatar: str = "ava", size: int = 128) -> Chunk:
    options = Options(format="raw", size=size, seed=2, listening_before=listening[0], listening=listening[1])
    return Chunk(avatar, REST, np.full(clock.CHUNK_FRAMES, speech, np.float32), 4 * index, options)


def changes(levels: Sequence[int], speaking: range) -> list[Chunk]:
    return [
        chunk(number, turn, float(number in speaking)) for number, turn in enumerate(itertools.pairwise([0, *levels]))
    ]


def test_pictures_change_no_more_between_states_than_within_them(ava: Animator) -> None:
    """Idle, listening, speaking, listening while speaking, idle: by turns, two chunks each."""
    turning = [0, 50, 100, 100, 50, 0, 0, 0, 50, 100, 50, 0, 0, 50, 100, 100, 100, 50, 0, 0] * 3
    spoken = [6, 7, 8, 9, 15, 16, 17, 28, 29, 40, 41, 42, 43]
    chunks = [
        replace(each, speech=np.full(4, float(number in spoken), np.float32))
        for number, each in enumerate(changes(turning, range(0)))
    ]
    across = steps(pictures(ava, chunks))
    within = [steps(pictures(ava, changes([level] * 60, range(60 * talks)))) for level in (0, 100) for talks in (0, 1)]
    assert across.max() <= 1.5 * max(each.max() for each in within)
    assert across.mean() <= 1.5 * max(each.mean() for each in within)


def steps(run: Sequence[Picture]) -> npt.NDArray[np.float64]:
    """Mean difference of each picture from the one before."""
    return np.array([np.abs(other - one).mean() for one, other in itertools.pairwise(run)])


@pytest.fixture(scope="module")
def staring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Animator]:
    """With the avatars huma1 and huma2, which look the same, and red, which has no eyes."""
    root = tmp_path_factory.mktemp("staring")
    write_avatar(root, "red")
    for profile in ("huma1", "huma2"):
        bundle.write(make_staring_avatar(profile, profile=profile), root)
    animator = Animator(root, threads=1)
    yield animator
    animator.close()


def resting(animator: Animator, avatar: str, listening: int, count: int) -> list[Picture]:
    options = Options(format="raw", listening=listening, listening_before=listening)
    return pictures(animator, [Chunk(avatar, None, None, 4 * number, options) for number in range(count)])


def irises(picture: Picture) -> float:
    """Where what is dark is on the average, across, pixels from the middle."""
    dark = (100 - picture[26:38].sum(2) / 3).clip(0).sum(0)
    return float((dark * np.arange(dark.size)).sum() / dark.sum()) - 31.5


def test_eyes_move_the_same_way_in_each_profile(staring: Animator) -> None:
    for listening in (0, 100):
        seen = {profile: resting(staring, profile, listening, 75) for profile in ("huma1", "huma2")}
        for one, other in zip(*seen.values(), strict=True):
            assert np.abs(one - other).max() <= 12  # int8 against float
            assert np.abs(one - other).mean() < 0.1
        places = [irises(picture) for picture in seen["huma2"] if picture[26:38].min() < 60]
        spread = np.percentile(places, 95) - np.percentile(places, 5)
        assert (spread > 1) == (listening == 0)


def test_an_avatar_without_eyes_to_be_found_listens_with_the_rest_of_its_face(staring: Animator) -> None:
    with staring._avatars.use("red") as loaded:
        assert loaded.eyes is None
        assert loaded.shapes.rank == bundle.WEIGHTS
    assert not np.array_equal(resting(staring, "red", 0, 20), resting(staring, "red", 100, 20))


def test_the_eyes_of_a_fitted_avatar_are_found_where_they_are(ava: Animator) -> None:
    with ava._avatars.use("ava") as loaded:
        eyes, means = loaded.eyes, loaded.avatar.canonical[:3]
    assert eyes is not None
    found = [
        (means * share).sum(1) / share.sum() for share in (eyes.shares * (side * means[0] > 0) for side in (-1, 1))
    ]
    np.testing.assert_allclose(found, [[-0.031, 0.034, 0.09], [0.031, 0.034, 0.09]], atol=0.003)  # metres
    assert 300 < np.count_nonzero(eyes.shares) < 1000  # of 8000 Gaussians


def test_listening_is_linear_within_a_chunk_and_drawn_as_its_pose(staring: Animator) -> None:
    rising, full = (
        pictures(
            staring, [Chunk("huma2", None, None, 40, Options(format="raw", listening_before=before, listening=100))]
        )
        for before in (0, 100)
    )
    assert [np.array_equal(one, other) for one, other in zip(rising, full, strict=True)] == [False] * 3 + [True]
    assert [Options(listening_before=20, listening=60).listening_at(number) for number in range(4)] == pytest.approx(
        [0.3, 0.4, 0.5, 0.6]
    )


def test_resting_frames_of_listeners_are_drawn_once_whoever_watches(staring: Animator) -> None:
    def misses() -> int:
        return staring.counts().caches["resting"].misses

    chunks = LOOP_FRAMES // clock.CHUNK_FRAMES
    options = [Options(size=32, seed=seed, listening=100, listening_before=100) for seed in (1, 2)]
    for first in options:
        before = misses()
        staring.render([Chunk("huma2", None, None, 4 * number, first) for number in range(chunks)])
        drawn = misses() - before
    assert drawn < 0.1 * LOOP_FRAMES  # by the second viewer: blinks, which are not shared
