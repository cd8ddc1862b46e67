"""Memory that a prepare uses again, from one weight to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .shared_rows import is_alone


class Scratch:
    """Hands out memory for what is made while a prepare runs, and mostly dropped in it.

    Memory is given anew as soon as no tensor holds it: what is kept in the end is simply never
    given a second time. So a fold writes where the one of the layer before it wrote, in memory
    that is in the cache, and neither returned nor faulted in again.
    """

    def __init__(self) -> None:
        self._blocks: dict[tuple[int, torch.device], list[Tensor]] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor that nothing was written into, as :func:`torch.empty` gives one."""
        size = math.prod(shape) * dtype.itemsize
        blocks = self._blocks.setdefault((size, device), [])
        block = next((block for block in blocks if is_alone(block)), None)
        if block is None:
            block = torch.empty(size, dtype=torch.uint8, device=device)
            blocks.append(block)
        return block.view(dtype).view(tuple(shape))

    def release(self) -> None:
        """Forget all memory: what nobody else holds is given back."""
        self._blocks = {}
