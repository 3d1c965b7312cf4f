"""Fixtures that every room's tests share."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The project's recordings, which lie beside the checkout and are never part of it."""
    data = ROOT.parent / "shared" / "data"
    if not data.is_dir():
        pytest.skip("the recordings in ../shared/data are not on this machine")
    return data
