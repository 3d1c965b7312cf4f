import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from make_avatar import make_avatar, write_avatar

from talksplat import avatar as bundle
from talksplat import clock, splat
from talksplat.animator import Animator, Chunk, Options, blink, gate, plate_index
from talksplat.avatar import BundleError, UnknownAvatarError
from talksplat.framing import RequestError

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
def animator(root: Path) -> Animator:
    return Animator(root)


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
        (expected,) = splat.render_onto([splat.Job(shapes, weights, avatar.viewmats[plate], avatar.K, behind)])
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
    assert animator.preload("red")["cached"]
    write_avatar(root, "red", size=32)
    report = animator.preload("red")
    assert (report["cached"], report["width"]) == (False, 32)
    with pytest.raises(UnknownAvatarError):
        animator.preload("nobody")
    with pytest.raises(UnknownAvatarError):
        animator.unload("nobody")


@pytest.mark.parametrize(
    "parameters", [{"format": "gif"}, {"quality": 101}, {"quality": True}, {"size": 0}, {"size": 12}, {"seed": "1"}]
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
