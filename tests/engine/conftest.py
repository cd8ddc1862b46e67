"""A small net and its weight version."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from engine.versioned_net import Net

from hybrid_fx.engine.versions import WeightTracker


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def tracker(net: Net) -> Iterator[WeightTracker]:
    tracker = WeightTracker(net)
    yield tracker
    tracker.close()
