"""Small synthetic avatars: a coloured cloud before a plain wall, moved by random bases."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from talksplat import avatar as bundle
from talksplat.avatar import AnyAvatar, Avatar, Huma1Avatar
from talksplat.server import ROOT

COLORS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.8, 0.2), "blue": (0.1, 0.2, 0.9)}


def make_avatar(avatar_id: str = "red", *, size: int = 64, gaussians: int = 300, plates: int = 5) -> Avatar:
    """An avatar whose face has the colour that its id names, so that a frame shows whose it is."""
    rng = np.random.default_rng(list(avatar_id.encode()))
    return Avatar(
        **_common(avatar_id, size, gaussians, plates, rng),
        bases=rng.integers(-127, 128, (bundle.ATTRIBUTES, bundle.WEIGHTS, gaussians), dtype=np.int8),
        basis_scales=np.repeat(REACH[:, None] / 127, bundle.WEIGHTS, axis=1).astype(np.float32),
        adapter_in=rng.normal(scale=0.3, size=(bundle.FEATURES + 1, bundle.HIDDEN)).astype(np.float32),
        adapter_out=rng.normal(scale=0.3, size=(bundle.HIDDEN + 1, bundle.COEFFICIENTS)).astype(np.float32),
    )


def make_staring_avatar(avatar_id: str, *, profile: str = "huma2", size: int = 64) -> AnyAvatar:
    """A wall of skin with two eyes, which a blink covers with lids; the same picture in each profile."""
    grid = np.linspace(-0.9, 0.9, 13)
    rows: dict[str, list[tuple[float, float, float]]] = {"skin": [(x, y, 0.0) for x in grid for y in grid]}
    rows |= {"white": [], "iris": [], "lid": []}
    for middle in (-EYE_DISTANCE, EYE_DISTANCE):
        for x in np.linspace(-0.14, 0.14, 6):
            for y in np.linspace(-0.06, 0.06, 3):
                rows["white"].append((middle + x, y, -0.02))
                rows["lid"].append((middle + x, y, -0.06))
        rows["iris"] += [(middle + x, y, -0.04) for x in (-0.02, 0.02) for y in (-0.02, 0.02)]
    counts = [len(each) for each in rows.values()]
    canonical = np.zeros((bundle.ATTRIBUTES, sum(counts)), np.float32)
    canonical[:3] = METRES * np.concatenate(list(rows.values())).T
    canonical[3] = 1
    canonical[7:10] = np.log(METRES * np.repeat([0.1, 0.035, 0.025, 0.04], counts))
    canonical[10] = np.repeat([6.0, 6.0, 6.0, -8.0], counts)
    canonical[11:] = np.repeat(np.array([(0.9, 0.7, 0.6), (1, 1, 1), (0, 0, 0.1), (0.9, 0.7, 0.6)]).T, counts, axis=1)
    blink = np.zeros_like(canonical)
    blink[10, -counts[-1] :] = 16
    like = make_huma1_avatar(avatar_id, size=size, gaussians=sum(counts))
    viewmats = np.repeat(like.viewmats[:1], len(like.plates), axis=0)
    viewmats[:, 2, 3] *= METRES
    if profile == Huma1Avatar.profile:
        return replace(like, canonical=canonical, blink=blink, viewmats=viewmats)
    bases = np.zeros((bundle.ATTRIBUTES, bundle.WEIGHTS, sum(counts)), np.int8)
    bases[:, bundle.BLINK] = np.round(blink * 127 / 16)
    scales = np.full((bundle.ATTRIBUTES, bundle.WEIGHTS), 16 / 127, np.float32)
    other = make_avatar(avatar_id, size=size, gaussians=sum(counts))
    return replace(other, canonical=canonical, bases=bases, basis_scales=scales, viewmats=viewmats)


METRES = 0.08  # of a unit of this face
EYE_DISTANCE = 0.4  # of each from the middle


def make_huma1_avatar(avatar_id: str, *, size: int = 64, gaussians: int = 300, plates: int = 5) -> Huma1Avatar:
    """The same of the profile huma1, deformed by a random net."""
    rng = np.random.default_rng(list(avatar_id.encode()))
    config = text_format.Parse((ROOT / "model_repository" / "avatar_huma1" / "config.pbtxt").read_text(), ModelConfig())
    common = _common(avatar_id, size, gaussians, plates, rng)
    common["audio_encoder"] = config.parameters["speech_encoder"].string_value
    coarse, fine = (
        rng.normal(1, 0.3, (3, bundle.TRIPLANE_CHANNELS, side, side)).astype(np.float16)
        for side in bundle.TRIPLANE_SIZES
    )
    net: dict[str, Any] = {
        name: rng.normal(scale=shape[0] ** -0.5, size=shape).astype(np.float32)
        for name, shape in bundle.HUMA1_WEIGHTS.items()
    }
    net["offsets_out"] *= 3 * REACH.astype(np.float32)
    return Huma1Avatar(
        **common,
        blink=(REACH[:, None] * rng.normal(size=(bundle.ATTRIBUTES, gaussians))).astype(np.float32),
        coarse=coarse,
        fine=fine,
        box=np.stack([common["canonical"][:3].min(1), common["canonical"][:3].max(1)]),
        **net,
    )


REACH = np.repeat([0.15, 0.1, 0.1, 0.2, 0.0], [3, 4, 3, 1, 3])  # of one unit of a weight, by attribute


def _common(avatar_id: str, size: int, gaussians: int, plates: int, rng: np.random.Generator) -> dict[str, Any]:
    """The fields that all profiles have."""
    canonical = np.empty((bundle.ATTRIBUTES, gaussians), np.float32)
    canonical[:3] = rng.normal(scale=0.35, size=(3, gaussians))
    canonical[3:7] = rng.normal(size=(4, gaussians))
    canonical[7:10] = np.log(rng.uniform(0.03, 0.12, (3, gaussians)))
    canonical[10] = rng.normal(1.5, 0.5, gaussians)
    color = np.array(COLORS.get(avatar_id, (0.5, 0.5, 0.5)))[:, None]
    canonical[11:] = np.clip(color + rng.normal(scale=0.05, size=(3, gaussians)), 0, 1)
    viewmats = np.tile(np.eye(4, dtype=np.float32), (plates, 1, 1))
    viewmats[:, 0, 3] = 0.02 * np.arange(plates)  # the head drifts
    viewmats[:, 2, 3] = 3
    focal = 1.5 * size
    return {
        "id": avatar_id,
        "canonical": canonical,
        "plates": [_plate(size, shade) for shade in np.linspace(90, 160, plates)],
        "viewmats": viewmats,
        "K": np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]], np.float32),
        "width": size,
        "height": size,
        "audio_encoder": "0" * 64,
        "provenance": {"source": "synthetic"},
    }


def write_avatar(root: Path, avatar_id: str = "red", *, size: int = 64) -> Path:
    """Make one and write its bundle; its folder."""
    return bundle.write(make_avatar(avatar_id, size=size), root)


def _plate(size: int, shade: float) -> bytes:
    ramp = np.linspace(-20, 20, size)
    wall = np.repeat((shade + ramp[:, None] + ramp[None, :])[..., None], 3, axis=2)
    return bytes(simplejpeg.encode_jpeg(np.clip(wall, 0, 255).astype(np.uint8), quality=90))
