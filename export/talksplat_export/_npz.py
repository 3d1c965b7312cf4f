"""Value objects of arrays as .npz files."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def save(value: DataclassInstance, path: Path) -> None:
    """Write the fields of ``value`` to ``path`` in one step."""
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **{field.name: getattr(value, field.name) for field in fields(value)})
    os.replace(partial, path)


def load(kind: type[DataclassInstance], path: Path) -> dict[str, Any]:
    """The fields of a ``kind`` that `save` wrote, all of them arrays."""
    with np.load(path, allow_pickle=False) as data:
        return {field.name: data[field.name] for field in fields(kind)}
