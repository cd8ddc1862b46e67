"""What ranks that compute one model together say to each other, and who owns what.

Shapes: B batch, T tokens in this call, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Group(Protocol):
    """The ranks that compute one model together; every one of them makes the same calls."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of what all ranks hold."""

    def all_gather(self, x: Tensor) -> Sequence[Tensor]:
        """What each rank holds, in order; all of one shape."""


def share(total: int, unit: int, rank: int, size: int) -> tuple[int, int]:
    """Where a rank's part of ``total`` places begins and ends, in whole units.

    Where there are fewer units than ranks, neighbouring ranks have the same one.
    """
    units = total // unit
    start = units * rank // size
    return start * unit, max(start + 1, units * (rank + 1) // size) * unit


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum over the ranks of a group, equal on all of them."""
    return group.all_reduce(x)


def all_gather(x: Tensor, total: int, size: int, group: Group) -> Tensor:
    """The last axis of ``total`` places, of which each of ``size`` ranks holds its share."""
    bounds = [share(total, 1, rank, size) for rank in range(size)]
    widths = [high - low for low, high in bounds]
    parts = group.all_gather(F.pad(x, (0, max(widths) - x.shape[-1])))
    return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], -1)
