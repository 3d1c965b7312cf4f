"""Value objects as .npz files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from talksplat.files import replacing

KEEP_SECONDS = 30.0  # of work between two writes of what was found


class Npz:
    """A dataclass of arrays, numbers and strings that can be kept in a file."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def save(self, path: Path) -> None:
        """Write to ``path`` (.npz) in one step."""
        with replacing(path) as partial:
            np.savez(partial, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as data:
            arrays = {field.name: data[field.name] for field in fields(cls)}
        return cls(**{name: array if array.ndim else array.item() for name, array in arrays.items()})

    @contextmanager
    def kept(self, path: Path | None) -> Iterator[Callable[[], None]]:
        """Yield what writes this to ``path`` now and then as it grows; at the end, even by an error, it is written too.

        Without a path nothing is.
        """
        written = time.monotonic()

        def keep() -> None:
            nonlocal written
            if path is not None and time.monotonic() - written > KEEP_SECONDS:
                self.save(path)
                written = time.monotonic()

        try:
            yield keep
        finally:
            if path is not None:
                self.save(path)
