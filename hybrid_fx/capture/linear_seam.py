"""The seam to DeepSpeed's replacement of ``F.linear``. Tried on DeepSpeed 0.19.8.

Building any ZeRO-3 engine replaces ``torch.nn.functional.linear`` for the whole process by an
autograd function of the same value, which keeps no whole weight for the backward. No inference
needs that, and a trace of it holds no linear layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_OWNER = "deepspeed.runtime.zero.linear"


@contextlib.contextmanager
def plain_linear() -> Iterator[None]:
    """``F.linear`` is torch's own inside the block, if DeepSpeed replaced it."""
    replaced = torch.nn.functional.linear
    if getattr(replaced, "__module__", None) != _OWNER:
        yield
        return
    torch.nn.functional.linear = torch._C._nn.linear
    try:
        yield
    finally:
        torch.nn.functional.linear = replaced
