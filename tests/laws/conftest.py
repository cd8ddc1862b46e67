"""A CPU that records."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tape import TapeRecorder, taped


@pytest.fixture
def tapes() -> Iterator[type[TapeRecorder]]:
    with taped() as recorders:
        yield recorders
