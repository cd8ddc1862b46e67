"""Processes that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from two_ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Ranks of a process group; they end with the tests."""
    found = Ranks()
    yield found
    found.stop()
