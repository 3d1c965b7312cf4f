"""Many avatars out of one: for measurements that need more than are at hand."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from talksplat import avatar as bundle

TINT = 0.08  # of red and blue, so that no two avatars of a cast are equal


def cast(source: Path, root: Path, count: int) -> tuple[str, ...]:
    """Write ``count`` avatars like the bundle ``source`` into ``root``, each of another colour; returns their ids.

    They share nothing: other ids, files and contents.

    Raises:
        BundleError: the source can't be read, or is of another profile than huma2.
    """
    avatar = bundle.read(source.parent, source.name)
    names = []
    for number in range(count):
        canonical = avatar.canonical.copy()
        tint = TINT * (2 * number / max(1, count - 1) - 1)
        canonical[[11, 13]] = np.clip(canonical[[11, 13]] + np.array([[tint], [-tint]], np.float32), 0, 1)
        names.append(f"{source.name}-{number}")
        bundle.write(replace(avatar, id=names[-1], canonical=canonical), root)
    return tuple(names)


def crowd(source: Path, root: Path, count: int) -> tuple[str, ...]:
    """Avatars that differ in nothing but their ids; their files are links to those of ``source``, and take no room.

    A server that reads them can't tell: it loads each one for itself.
    """
    names = []
    for number in range(count):
        names.append(f"extra-{number}")
        folder = root / names[-1]
        folder.mkdir(parents=True)
        for file in source.iterdir():
            if file.suffix == ".json":
                manifest = json.loads(file.read_text(encoding="utf-8"))
                (folder / file.name).write_text(json.dumps({**manifest, "id": names[-1]}), encoding="utf-8")
            else:
                os.link(file, folder / file.name)
    return tuple(names)
