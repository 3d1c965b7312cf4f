"""Packages of the extras, imported where they are needed and not before."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ._exceptions import MissingExtraError


def import_package(name: str, purpose: str, *, package: str | None = None, extra: str = "media") -> Any:  # a module
    """What an extra brings along.

    Args:
        name: to import.
        purpose: what needs it, in words.
        package: its name on PyPI, where that is another one.
        extra: that has it.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError:
        raise MissingExtraError(purpose, package or name, extra) from None
