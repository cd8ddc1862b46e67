"""The memory of live tensors, counted by address: storages may lie in one another.

Cycles that only the garbage collector would free count as live: memory that waits for it is not
given back. So the collector is off around what is measured.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from hybrid_fx.passes.packing import packed_bytes


def live_bytes() -> int:
    """Bytes that the storages of this process's tensors cover, each once.

    What a tensor keeps alive around its own storage is not seen.
    """
    spans: set[tuple[int, int]] = set()
    for value in gc.get_objects():
        # By the type itself: isinstance() asks objects that answer with warnings.
        kind = type(value)
        if not issubclass(kind, Tensor) or issubclass(kind, FakeTensor):
            continue
        if value.layout == torch._mkldnn:
            spans.add((address(value), packed_bytes(value)))
        elif not value.is_meta and value.layout == torch.strided:
            storage = value.untyped_storage()
            spans.add((storage.data_ptr(), storage.nbytes()))
    covered = end = 0
    for start, size in sorted(spans):
        covered += max(0, start + size - max(start, end))
        end = max(end, start + size)
    return covered


def address(tensor: Tensor) -> int:
    """Where a tensor lies, packed or not."""
    return int(torch.ops.mkldnn.data_ptr(tensor) if tensor.is_mkldnn else tensor.data_ptr())


@contextmanager
def without_collector() -> Iterator[None]:
    """No cycle is collected inside the block; those of before are."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
