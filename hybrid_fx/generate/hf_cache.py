"""A caller's own ``DynamicCache``: what a session starts from, and is written back to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..compat.transformers import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    cache_argument,
)

#: Layers whose keys and values are plain tensors ``[B, K, T, D]``.
_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)


def cache_fault(cache: Any) -> str | None:
    """Why keys and values cannot be taken out of ``cache`` and put back, or None."""
    if type(cache) is not DynamicCache:
        return f"{cache_argument()} is a {type(cache).__name__}"
    if getattr(cache, "offloading", False):
        return f"{cache_argument()} is offloaded"
    odd = next((layer for layer in cache.layers if type(layer) not in _PLAIN), None)
    return None if odd is None else f"{cache_argument()} has a {type(odd).__name__}"


def prefix_of(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values ``[B, K, T, D]`` of each layer; empty where no column is held."""
    if not cache.get_seq_length():
        return []
    return [(layer.keys, layer.values) for layer in cache.layers]


def extend(cache: Any, rows: Tensor | None, columns: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Let ``cache`` hold ``columns`` too, its old rows put in the order ``rows`` before."""
    if rows is not None and cache.get_seq_length():
        cache.reorder_cache(rows)
    for index, (keys, values) in enumerate(columns):
        cache.update(keys, values, index)
