"""Collectives of torch that have another name from one release to the next (2.11 to 2.13)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

#: ``(output, input, group=None, async_op=False)``: all ranks' inputs of one size, end to end.
all_gather_single: Callable[..., Any] = getattr(
    dist, "all_gather_single", dist.all_gather_into_tensor
)
