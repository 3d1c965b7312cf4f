"""Small synthetic avatars: a coloured cloud before a plain wall, moved by random bases."""

from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from talksplat import avatar as bundle
from talksplat.avatar import Avatar, Huma1Avatar
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
