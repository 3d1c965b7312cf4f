import hashlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from make_avatar import make_avatar, write_avatar

from talksplat import animator as animator_module
from talksplat import avatar as bundle
from talksplat import clock, splat
from talksplat.animator import Animator, Chunk, Options, gate
from talksplat.attention import Head, Pose, blink, plate_index, sway
from talksplat.avatar import BundleError, UnknownAvatarError
from talksplat.framing import RequestError
from talksplat.schedule import BusyError, DeadlineError

RAW = Options(format="raw")
INDICES = st.integers(0, 10**9)
SEEDS = st.integers(-(2**63), 2**63 - 1)


def chunk(avatar: str = "red", index: int = 0, *, speech: float = 1.0, options: Options = RAW, seed: int = 0) -> Chunk:
    coefficients = np.random.default_rng(seed).normal(size=(clock.CHUNK_FRAMES, bundle.COEFFICIENTS))
    return Chunk(
        avatar, coefficients.astype(np.float32), np.full(clock.CHUNK_FRAMES, speech, np.float32), index, options
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("red", "green"):
        write_avatar(tmp_path, name)
    return tmp_path


@pytest.fixture
def animator(root: Path) -> Iterator[Animator]:
    animator = Animator(root)
    yield animator
    animator.close()


class Held:
    """An animator whose one thread draws nothing before it is let go, and what it drew then, in order."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0  # seconds
        self.drawn: list[str] = []  # the avatar of each frame
        self.animator = Animator(root, threads=1)
        self._gate, begun = threading.Event(), threading.Event()
        self.animator.render([chunk("red"), chunk("green")])  # so that they are loaded
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        picture = self.animator._picture

        def noted(frame: Any) -> bytes:
            self.drawn.append(frame.loaded.avatar.id)
            return picture(frame)

        monkeypatch.setattr(self.animator, "_picture", noted)

        def hold() -> None:
            begun.set()
            self._gate.wait(30)

        self.animator._schedule.add((float("-inf"), 0), [hold])
        assert begun.wait(30)

    def go(self) -> None:
        self._gate.set()


@pytest.fixture
def held(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held(root, monkeypatch)
    yield held
    held.go()
    held.animator.close()


def test_a_frame_is_the_blended_avatar_over_its_plate(animator: Animator) -> None:
    avatar, asked = make_avatar("red"), chunk(index=30)
    (frames,) = animator.render([asked])
    assert not isinstance(frames, Exception)
    assert asked.motion is not None
    shapes = splat.Blendshapes(avatar.canonical, avatar.bases, avatar.basis_scales)
    for offset, frame in enumerate(frames):
        weights = np.append(asked.motion[offset], np.float32(blink(30 + offset)))
        plate = plate_index(30 + offset, 0, len(avatar.plates))
        behind = simplejpeg.decode_jpeg(avatar.plates[plate], "RGB")
        viewmat = Head(avatar.viewmats).viewmat(Pose(plate, 0), sway(30 + offset, 0))
        (expected,) = splat.render_onto([splat.Job(shapes, weights, viewmat, avatar.K, behind)])
        assert frame == expected.tobytes()


def test_silence_shows_the_rest_face_whatever_the_coefficients(animator: Animator) -> None:
    still, other, speaking = animator.render(
        [chunk(speech=0, seed=1), chunk(speech=0, seed=2), chunk(speech=1, seed=1)]
    )
    assert still == other != speaking


def test_each_chunk_gets_its_own_frames_or_its_own_error(animator: Animator, root: Path) -> None:
    (root / "broken").mkdir()
    (root / "broken" / "avatar.json").write_text("{}")
    bad = chunk()
    assert bad.motion is not None
    bad.motion[2, 3] = np.nan
    asked = [
        *(chunk("red"), chunk("nobody"), chunk("green", 8), chunk("broken"), bad),
        *(chunk("red", -1), chunk("red", options=Options(size=128)), chunk("green")),
    ]
    results = animator.render(asked)
    kinds = [type(result) for result in results]
    assert kinds == [list, UnknownAvatarError, list, BundleError, RequestError, RequestError, RequestError, list]
    for number in (0, 2, 7):
        assert results[number] == animator.render([asked[number]])[0]


def test_a_plate_that_is_damaged_fails_its_frames_only(root: Path) -> None:
    avatar = make_avatar("sly")
    folder = bundle.write(avatar, root)
    data = (folder / "plates.bin").read_bytes()
    scans = [bytes(plate).index(b"\xff\xda") for plate in avatar.plates]  # the pixels, after a header of 14 bytes
    broken = b"".join(bytes(p[: scan + 14]).ljust(len(p), b"\0") for p, scan in zip(avatar.plates, scans, strict=True))
    (folder / "plates.bin").write_bytes(broken)
    manifest = (folder / "avatar.json").read_text()
    sound, other = (hashlib.sha256(each).hexdigest() for each in (data, broken))
    (folder / "avatar.json").write_text(manifest.replace(sound, other))
    failed, drawn = Animator(root).render([chunk("sly"), chunk("red")])
    assert isinstance(failed, BundleError)
    assert "can't be decoded" in str(failed)
    assert isinstance(drawn, list)


def test_frames_do_not_depend_on_what_was_rendered_before_or_on_the_threads(root: Path) -> None:
    asked = [chunk(name, index, options=options) for name, index, options in itertools.product(
        ("red", "green"), (0, 6), (RAW, Options(format="raw", size=32), Options(quality=50))
    )]  # fmt: skip
    expected = Animator(root, threads=1).render(asked)
    crowded = Animator(root, threads=3, plate_bytes=1)
    assert crowded.render(asked[::-1]) == expected[::-1]
    assert crowded.render(asked) == expected


def test_decoded_plates_stay_within_their_budget(root: Path) -> None:
    plate = 64 * 64 * 3
    animator = Animator(root, plate_bytes=2 * plate)
    animator.render([chunk(index=4 * number) for number in range(4)])
    assert animator.catalogue()["plate_bytes"] == 2 * plate
    animator.unload("red")
    assert animator.catalogue()["plate_bytes"] == 0


def test_preloading_loads_warms_and_notices_a_new_version(animator: Animator, root: Path) -> None:
    assert not animator.preload("red")["cached"]
    assert animator.catalogue()["plate_bytes"] == 8 * 8 * 3  # a small frame is enough
    assert animator.preload("red")["cached"]
    write_avatar(root, "red", size=32)
    report = animator.preload("red")
    assert (report["cached"], report["width"]) == (False, 32)
    with pytest.raises(UnknownAvatarError):
        animator.preload("nobody")
    with pytest.raises(UnknownAvatarError):
        animator.unload("nobody")


def test_live_chunks_pass_an_utterance_which_is_not_starved_by_them(held: Held) -> None:
    bulk = held.animator.submit([chunk("red", 4 * number) for number in range(4)])
    live = []
    for held.now in (1000.1, 1000.2, 1000.21, 1000.5):  # an utterance's chunks are due at .0, .16, .32 and .48
        live.append(held.animator.submit([chunk("green")]))
    held.go()
    for future in (bulk, *live):
        assert all(isinstance(frames, list) for frames in future.result(30))
    order = [name for name, frames in itertools.groupby(held.drawn) for _ in range(len(list(frames)) // 4)]
    assert order == ["red", "green", "red", "green", "green", "red", "red", "green"]


def test_who_says_that_a_chunk_came_long_ago_is_let_past_a_chunks_duration_at_most(held: Held) -> None:
    held.now += 60
    honest = held.animator.submit([chunk("green")])
    held.now += 0.5
    sly = held.animator.submit([replace(chunk("red"), arrived=0.0)])
    late = held.animator.submit([replace(chunk("red"), arrived=1e9)])
    held.go()
    for future in (honest, sly, late):
        future.result(30)
    assert held.drawn == ["green"] * 4 + ["red"] * 8


def test_a_chunk_that_is_too_old_when_its_turn_comes_is_dropped_and_counted(held: Held) -> None:
    due = Options(format="raw", deadline_ms=100)
    asked = [replace(chunk("red", options=due), tenant="acme"), chunk("green", options=replace(due, deadline_ms=300))]
    future = held.animator.submit([*asked, chunk("green")])
    held.now += 0.25
    held.go()
    dropped, *drawn = future.result(30)
    assert isinstance(dropped, DeadlineError)
    assert str(dropped) == "the chunk is 250 ms old, beyond its deadline of 100 ms"
    assert [type(frames) for frames in drawn] == [list, list]
    assert held.drawn == ["green"] * 8
    assert held.animator.counts().dropped_chunks == {"acme": 1}


def test_ten_thousand_old_chunks_are_dropped_without_drawing_one(held: Held) -> None:
    options = Options(format="raw", deadline_ms=200)
    old = [held.animator.submit([chunk("red", options=options)]) for _ in range(10_000)]
    held.now += 1
    fresh = held.animator.submit([chunk("green", options=options)])
    held.go()
    assert isinstance(fresh.result(30)[0], list)
    assert all(isinstance(future.result(30)[0], DeadlineError) for future in old)
    assert held.drawn == ["green"] * 4
    assert held.animator.counts().dropped_chunks == {"": 10_000}
    assert held.animator._waiting_bytes == 0


def test_more_than_fits_is_refused_until_there_is_room_again(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(animator_module, "MAX_WAITING_BYTES", 3 * animator_module.CHUNK_BYTES)
    waiting = held.animator.submit([chunk(), chunk()])
    (refused,) = held.animator.submit([chunk(), chunk()]).result(30)[:1]
    assert isinstance(refused, BusyError)
    held.go()
    assert all(isinstance(frames, list) for frames in waiting.result(30))
    assert isinstance(held.animator.render([chunk()])[0], list)


def test_an_animator_that_is_closed_answers_all_that_waits(held: Held) -> None:
    waiting = [held.animator.submit([chunk(), chunk("green")]) for _ in range(5)]
    closing = threading.Thread(target=held.animator.close)
    closing.start()
    while not held.animator._schedule._closed:
        pass
    waiting.append(held.animator.submit([chunk()]))
    held.go()
    closing.join(30)
    for future in waiting:
        assert all(isinstance(error, BusyError) for error in future.result(30))
    assert held.drawn == []


def test_whatever_is_raised_every_chunk_is_answered_once_and_the_threads_go_on(
    animator: Animator, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[object] = []
    for error in (MemoryError(), SystemExit(1)):

        def fail(_: object, error: BaseException = error) -> bytes:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(animator, "_picture", fail)
            future = animator.submit([chunk(), chunk("green")])
            future.add_done_callback(lambda done: answers.append(done.result()))
            assert all(isinstance(outcome, Exception) for outcome in future.result(30))
    monkeypatch.setattr(animator_module, "_frames", lambda *_: 1 / 0)
    assert isinstance(animator.render([chunk()])[0], ZeroDivisionError)
    monkeypatch.undo()
    assert isinstance(animator.render([chunk()])[0], list)
    assert len(answers) == 2


def test_an_avatar_that_is_being_read_holds_up_nobody_else(animator: Animator, monkeypatch: pytest.MonkeyPatch) -> None:
    read, gate = bundle.read, threading.Event()

    def slow(root: Path, avatar_id: str, kind: Any) -> Any:
        assert avatar_id != "green" or gate.wait(30)
        return read(root, avatar_id, kind)

    monkeypatch.setattr(bundle, "read", slow)
    waiting = animator.submit([chunk("red"), chunk("green")])
    assert isinstance(animator.submit([chunk("red")]).result(30)[0], list)
    assert animator.preload("red")["loaded"]
    assert not waiting.done()
    gate.set()
    assert [type(frames) for frames in waiting.result(30)] == [list, list]


def test_an_idle_chunk_shows_what_silence_shows_byte_for_byte_from_a_cache(animator: Animator) -> None:
    for options in (RAW, Options(), Options(quality=40, size=32, seed=9)):
        idle = replace(chunk(index=20, options=options), motion=None, speech=None)
        (silence,) = animator.render([chunk(index=20, speech=0.0, options=options)])
        misses = animator.counts().caches["resting"].misses
        assert animator.render([idle]) == [silence]
        assert animator.counts().caches["resting"].misses == misses
        assert Animator(animator._avatars.root).render([idle]) == [silence]  # one that has drawn nothing yet
    assert animator.counts().frames == animator.counts().idle_frames == {"": 24}


def test_frames_of_a_speaking_chunk_whose_gate_is_shut_come_from_the_same_cache(animator: Animator) -> None:
    speaking = chunk()
    assert speaking.speech is not None
    speaking.speech[:2] = 0
    (resting,) = animator.render([replace(chunk(), motion=None, speech=None)])
    before = animator.counts().caches["resting"]
    (frames,) = animator.render([speaking])
    after = animator.counts().caches["resting"]
    assert isinstance(frames, list)
    assert isinstance(resting, list)
    assert frames[:2] == resting[:2]
    assert frames[2] != resting[2]
    assert (after.hits - before.hits, after.misses - before.misses) == (2, 0)
    assert animator.counts().idle_frames == {"": 6}


def test_resting_frames_stay_within_their_budget(root: Path) -> None:
    animator = Animator(root, resting_bytes=3 * 64 * 64 * 3)
    idle = [Chunk("red", None, None, 4 * number, RAW) for number in range(4)]
    assert animator.render(idle) == Animator(root).render(idle)
    assert animator.catalogue()["resting_bytes"] == 3 * 64 * 64 * 3
    animator.unload("red")
    assert animator.catalogue()["resting_bytes"] == 0


def test_a_bundle_cut_short_on_disk_while_it_is_loaded_is_drawn_on(
    animator: Animator, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were a file mapped, the process would end with SIGBUS here."""
    asked = [chunk(index=4 * number) for number in range(4)]
    expected = Animator(root).render(asked)
    animator.render([chunk()])
    for file in (root / "red").iterdir():
        file.write_bytes(file.read_bytes()[:7])
    monkeypatch.setattr("talksplat.cache.CHECK_SECONDS", -1.0)
    assert animator.render(asked) == expected
    with pytest.raises(BundleError):
        animator.preload("red")


def test_avatars_that_are_drawn_are_not_evicted_by_a_crowd_of_others(tmp_path: Path) -> None:
    names = [f"a{number}" for number in range(12)]
    for name in names:
        write_avatar(tmp_path, name, size=32)
    asked = [chunk(names[number * 7 % len(names)], number) for number in range(60)]
    crowded = Animator(tmp_path, avatar_bytes=1, plate_bytes=1, resting_bytes=1)
    futures = [crowded.submit([each]) for each in asked]
    assert [future.result(30)[0] for future in futures] == Animator(tmp_path).render(asked)
    assert len(crowded._avatars.ids()) == 1


def test_avatars_switched_a_thousand_times_take_no_more_memory(tmp_path: Path) -> None:
    names = [f"a{number}" for number in range(20)]
    for name in names:
        write_avatar(tmp_path, name, size=32)
    budget = 1 << 18
    animator = Animator(tmp_path, avatar_bytes=budget, plate_bytes=budget, resting_bytes=budget)

    def switch(times: int) -> int:
        for number in range(times):
            (frames,) = animator.render([chunk(names[number % len(names)], number, speech=number % 2)])
            assert isinstance(frames, list)
        return int(psutil.Process().memory_info().rss)

    before = switch(200)
    assert switch(1000) - before < 4 << 20
    counts = animator.counts()
    assert counts.caches["avatars"].misses == 1200  # each had left before it was wanted again
    assert all(cache.bytes <= budget for cache in counts.caches.values())


@pytest.mark.parametrize(
    "parameters",
    [
        {"format": "gif"},
        {"quality": 101},
        {"quality": True},
        {"listening": 101},
        {"listening": 0.5},
        {"listening_before": -1},
        {"size": 0},
        {"size": 12},
        {"seed": "1"},
        {"deadline_ms": 0},
        {"deadline_ms": "soon"},
        {"deadline_ms": 0.5},
    ],
)
def test_wrong_options_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(parameters))):
        Options.parse(parameters)


def test_parameters_of_others_are_left_alone() -> None:
    assert Options.parse({"quality": 40, "x-tenant": "someone"}) == Options(quality=40)


def test_the_gate_opens_smoothly_from_rest_to_full() -> None:
    opening = gate(np.linspace(0, 1, 1001, dtype=np.float32))
    assert opening[0] == 0
    assert opening[-1] == 1
    steps = np.diff(opening)
    assert (steps >= 0).all()
    assert steps.max() < 0.005
    assert opening.dtype == np.float32


@given(SEEDS, INDICES)
def test_blinks_are_2_to_6_seconds_apart_and_whole(seed: int, start: int) -> None:
    lids = [blink(start + frame, seed) for frame in range(20 * clock.FPS)]
    shut = [frame for frame, weight in enumerate(lids) if weight == 1.0]
    assert 3 <= len(shut) <= 10
    assert all(2 * clock.FPS <= later - earlier <= 6 * clock.FPS for earlier, later in itertools.pairwise(shut))
    for frame in shut:
        if 6 <= frame < len(lids) - 6:
            assert sum(weight > 0 for weight in lids[frame - 6 : frame + 7]) == 6
    assert all(0 <= weight <= 1 for weight in lids)


@given(INDICES, SEEDS, st.integers(1, 500))
def test_plates_run_forth_and_back_without_a_jump(index: int, seed: int, plates: int) -> None:
    run = [plate_index(index + frame, seed, plates) for frame in range(3 * plates)]
    assert set(run) == set(range(plates))
    steps = [later - earlier for earlier, later in itertools.pairwise(run)]
    assert {abs(step) for step in steps} <= {0, 1}
    assert all(abs(after - before) <= 1 for before, after in itertools.pairwise(steps))  # it stops before it turns


@pytest.mark.parametrize(
    "property_of", [lambda seed: [blink(i, seed) for i in range(200)], lambda s: plate_index(0, s, 99)]
)
def test_seeds_differ(property_of: Callable[[int], object]) -> None:
    assert len({str(property_of(seed)) for seed in range(20)}) > 10
