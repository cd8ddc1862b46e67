"""A small net, and what its weight version does while something runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hybrid_fx.engine.versions import WeightTracker


class Net(nn.Module):
    """Two linear layers, one tied, a buffer that is saved and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("saved", torch.ones(3))
        self.register_buffer("scratch", torch.arange(3.0), persistent=False)
        self.constant = torch.ones(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).sum() + self.saved.sum()


def risen(tracker: WeightTracker, change: Callable[[], object]) -> str:
    """Run ``change``; the version must rise by it, and stand still afterwards."""
    before = tracker.refresh()
    change()
    after = tracker.refresh()
    assert after > before
    assert tracker.refresh() == after == tracker.version
    return tracker.reason


def stays(tracker: WeightTracker, action: Callable[[], object]) -> None:
    before = tracker.refresh()
    action()
    assert tracker.refresh() == before
