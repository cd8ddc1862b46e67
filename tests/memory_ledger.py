"""The memory of live tensors, counted by address: storages may lie in one another.

Cycles that only the garbage collector would free count as live: memory that waits for it is not
given back. So the collector is off around what is measured.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from hybrid_fx.passes.packing import PLAIN, pack, packed_bytes, usual_forms


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


def packed_memory(weight: Tensor) -> bytes:
    """What a packed weight holds."""
    return ctypes.string_at(torch.ops.mkldnn.data_ptr(weight), packed_bytes(weight))


def packed_in(dtype: torch.dtype) -> torch.dtype | None:
    """What weights of a dtype are packed in on this machine's CPU; None: not at all."""
    return usual_forms(torch.device("cpu")).get(dtype, PLAIN).dtype


def lies_in_pieces(dtype: torch.dtype) -> bool:
    """Whether the rows of a packed weight lie as they do where some of them are packed alone.

    Those of float32 do not in oneDNN 3.10, of torch 2.11: it lays them out by columns.
    """
    inside = packed_in(dtype)
    if inside is None:
        return False
    weight = torch.arange(128 * 48).view(128, 48).to(inside)
    return packed_memory(pack(weight)).startswith(packed_memory(pack(weight[:64])))
