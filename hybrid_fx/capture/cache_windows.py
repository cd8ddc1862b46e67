"""The seam to transformers' KV cache, for what it forgets: its windows belong to its generate."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from ..compat.transformers import DynamicCache
from ..errors import CaptureError

_WINDOW = 4  # of the arguments of the canonical op


def check_windows(graph: fx.Graph, model: nn.Module) -> None:
    """Refuse a layer that looks further back than transformers' cache keeps: there it generates
    other tokens than its forward without a cache has, which is what was captured.

    Raises:
        CaptureError: naming the layer and both windows.
    """
    config: Any = getattr(model, "config", None)
    seen = [
        node.args[_WINDOW]
        for node in graph.nodes
        if getattr(node.target, "overloadpacket", node.target) is torch.ops.hybrid_fx.attention
    ]
    try:
        layers = DynamicCache(config=config).layers
    except Exception as error:  # of a config that it does not know: generate makes the same cache
        raise CaptureError(f"transformers makes no cache for it: {error!r}") from error
    kept = [getattr(layer, "sliding_window", None) for layer in layers]
    if len(seen) != len(kept):
        return  # layers that share one cache, or keep something else in it
    for index, (window, size) in enumerate(zip(seen, kept, strict=True)):
        if size and not 0 < window <= size:
            raise CaptureError(
                f"attention {index} sees {f'{window} columns' if window else 'every column'}, and "
                f"the cache of transformers keeps {size}"
            )
        if size == 1:  # it keeps the last ``1 - size`` of the columns before: from -0 on, all
            raise CaptureError(
                f"attention {index} sees 1 column, and the cache of transformers keeps every one "
                "behind a window of 1"
            )
