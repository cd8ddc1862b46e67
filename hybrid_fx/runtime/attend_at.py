"""The decode step's attention over fixed shapes: the position that is written is a tensor.

In the place of ``attend_one``, in a step that is recorded: every length has the same shapes, so
that one recording serves them all. It reads the first C columns of each row; masks say which count.

Shapes: N rows of the step, C columns that are read, P positions a row of the workspace, H query
heads, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..passes.attention import attend_few


def masks_at(
    valid: Tensor, at: Tensor, windows: Iterable[int], dtype: torch.dtype
) -> dict[int, Tensor]:
    """What to add to the scores of a query at column ``at``, for each kind of layer.

    Args:
        valid: bool [N, C], False for padding; columns behind ``at`` are not looked at.
        at: int64 [1], the column that is written.
        windows: Of the layers; 0 is unlimited.
        dtype: Of queries and keys.

    Returns:
        A window to [N, 1, 1, C] in ``dtype``: 0 where a column counts, else -inf. The new column
        always counts, so that no row is without one.
    """
    columns = torch.arange(valid.shape[1], device=valid.device)
    seen = (valid & (columns <= at)) | (columns == at)
    masks = {}
    for window in windows:
        near = seen & (columns > at - window) if window else seen
        mask = torch.zeros(near.shape, dtype=dtype, device=near.device)
        masks[window] = mask.masked_fill_(~near, -torch.inf)[:, None, None]
    return masks


def attend_at(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_memory: Tensor,
    value_memory: Tensor,
    at: Tensor,
    masks: Mapping[int, Tensor],
    pitch: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one new token a row over the columns that its mask lets through.

    Heads of one key-value group stand as queries of one head: under a mask, the fused kernel of a
    GPU (memory-efficient attention) knows no groups.

    Args:
        query: [N, H, 1, D]; key, value: [N, K, 1, D], the new tokens.
        key_memory, value_memory: [N, K, P, D], one layer's workspace, written in place. What was
            never written must be finite, as it enters products.
        at: int64 [1], the column to write, in all rows; below C.
        masks: See :func:`masks_at`.
        pitch: P.

    Returns:
        [N, 1, H, D].
    """
    key_memory.index_copy_(2, at, key.to(key_memory.dtype))
    value_memory.index_copy_(2, at, value.to(value_memory.dtype))
    rows, heads, _, size = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(rows, kv_heads, heads // kv_heads, size)
    mask = masks[window].to(query.dtype)
    keys, values = (memory[:, :, : mask.shape[3]] for memory in (key_memory, value_memory))
    if softcap or sinks is not None:
        counts = mask[:, 0, 0] == 0
        out = attend_few(grouped, keys, values, counts, scale, softcap, sinks)
    else:
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    return out.reshape(rows, 1, heads, value_memory.shape[3])
