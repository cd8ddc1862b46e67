"""Every test of this folder runs on each runtime below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from generate import same_as_hf
from generate.hf_runner import HFRunner

RUNTIMES: dict[str, Callable[[Any], Any]] = {"hf": HFRunner}


@pytest.fixture(autouse=True, params=RUNTIMES)
def _runtime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_as_hf, "make_runtime", RUNTIMES[request.param])
