"""Fixtures of the load tests."""

from collections.abc import Iterator

import pytest

from loadtests.streams import Generator


@pytest.fixture(scope="session")
def generator() -> Iterator[Generator]:
    """The process that makes load; it keeps nothing between two runs."""
    with Generator() as generator:
        yield generator
