"""Which profile a case runs in."""

from __future__ import annotations

from typing import Any

import pytest


def deep(*values: Any) -> list[Any]:
    """Cases that ``make test`` leaves out: others of their kind run there."""
    return [pytest.param(value, marks=pytest.mark.deep) for value in values]
