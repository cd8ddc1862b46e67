"""Attention: the canonical op of the captured graph, and its two forms over a KV workspace.

``attention`` is what capture records: causal self-attention over the T tokens of one call, no
cache. ``attend`` and ``attend_one`` are what the KV pass puts in its place: they write the new
keys and values into the workspace and read the S positions in use. ``attend_as_configured`` is
what stands there in a training graph.

Shapes: B batch, T tokens in this call, S positions in use, H query heads, K key-value heads,
D head size, R rows and P positions a row of the workspace.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_LIBRARY = torch.library.Library("hybrid_fx", "FRAGMENT")
_LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, float scale, int window=0, "
    "float softcap=0.0, Tensor? sinks=None, float dropout=0.0) -> Tensor"
)


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    columns = torch.arange(query.shape[2], device=query.device)
    allowed = _causal(columns, columns, window)
    if not softcap and sinks is None:
        grouped = query.shape[1] != key.shape[1]
        mask = {"attn_mask": allowed} if window else {"is_causal": True}
        out = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, scale=scale, enable_gqa=grouped, **mask
        )
    else:
        out = _eager(query, key, value, allowed, scale, softcap, sinks, dropout)
    return out.transpose(1, 2).contiguous()


_LIBRARY.impl("attention", _reference, "CompositeImplicitAutograd")

#: Causal self-attention: query [B,H,T,D], key and value [B,K,T,D] -> [B,T,H,D], in query's dtype.
#: ``window`` 0 is unlimited; ``softcap`` 0 is none; ``sinks`` [H] adds one logit per head.
attention = torch.ops.hybrid_fx.attention.default


def _causal(queries: Tensor, keys: Tensor, window: int) -> Tensor:
    """Which key columns [S] each query column [T] sees: bool [T, S]."""
    allowed = keys[None, :] <= queries[:, None]
    return allowed & (keys[None, :] > queries[:, None] - window) if window else allowed


def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention written out, for what SDPA lacks: logit softcap and sinks."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = (query @ key.transpose(2, 3)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    if sinks is not None:
        extra = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat((scores, extra.to(scores.dtype)), -1)
        scores = scores - scores.max(-1, keepdim=True).values
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, -1, dtype=wide).to(query.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    if dropout:
        weights = F.dropout(weights, dropout)
    return weights @ value


def _rows(memory: Tensor, slots: Tensor, pitch: int) -> Tensor:
    """The positions in use as [B, K, S, D]: a view where row b of the batch is row b of memory."""
    batch, length = slots.shape
    if pitch:
        return memory[:batch, :, :length]
    return memory[slots // memory.shape[2], :, slots % memory.shape[2]].transpose(1, 2)


def _write(memory: Tensor, new: Tensor, slots: Tensor, pitch: int) -> None:
    """Store ``new`` [B,K,T,D] in the last T columns of ``slots`` [B,S]."""
    batch, length = slots.shape
    start = length - new.shape[2]
    if pitch:
        memory[:batch, :, start:length] = new
    else:
        last = slots[:, start:]
        memory[last // memory.shape[2], :, last % memory.shape[2]] = new.transpose(1, 2)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_memory: Tensor,
    value_memory: Tensor,
    slots: Tensor,
    key_valid: Tensor | None,
    pitch: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of T new tokens over all positions in use, the new ones included.

    Args:
        query: [B, H, T, D]; key, value: [B, K, T, D], the new tokens.
        key_memory, value_memory: [R, K, P, D], one layer's workspace, written in place.
        slots: [B, S] int64: where each column of each row stands, position p of row r of the
            memory being ``r * P + p``; the last T are written.
        key_valid: [B, S] bool: False for padding. ``None``: all columns are valid.
        pitch: P where column s of row b stands at ``b * P + s``; 0 where the table must be
            looked up.

    Returns:
        [B, T, H, D]. A padding query sees itself only, so that its values stay finite.
    """
    _write(key_memory, key, slots, pitch)
    _write(value_memory, value, slots, pitch)
    tokens, length = query.shape[2], slots.shape[1]
    if tokens == length:
        keys, values = key, value
    else:
        keys, values = _rows(key_memory, slots, pitch), _rows(value_memory, slots, pitch)
    grouped = query.shape[1] != key.shape[1]
    if tokens == length and key_valid is None and not (window or softcap or sinks is not None):
        out = F.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)
    columns = torch.arange(length, device=query.device)
    new = columns[length - tokens :]
    allowed = _causal(new, columns, window)[None, None]
    if key_valid is not None:
        itself = columns[None, :] == new[:, None]
        allowed = (allowed & key_valid[:, None, None, :]) | itself
    if softcap or sinks is not None:
        return _eager(query, keys, values, allowed, scale, softcap, sinks).transpose(1, 2)
    out = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=allowed, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def attend_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_memory: Tensor,
    value_memory: Tensor,
    slots: Tensor,
    key_valid: Tensor | None,
    pitch: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """:func:`attend` for one new token a row (T = 1): no causal mask, only the window is read.

    Heads of one key-value group stand as queries of one head, so that keys and values are read
    once, where they lie. A CPU's SDPA is several times slower for one query of each head. Written
    out in bfloat16, oneDNN would keep kernels, 1 MiB, for each number of rows and of positions.
    """
    _write(key_memory, key, slots, pitch)
    _write(value_memory, value, slots, pitch)
    keys, values = _rows(key_memory, slots, pitch), _rows(value_memory, slots, pitch)
    if window and slots.shape[1] > window:
        keys, values = keys[:, :, -window:], values[:, :, -window:]
        key_valid = None if key_valid is None else key_valid[:, -window:]
    batch, heads, _, size = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, size)
    fused = query.device.type == "cpu" or (key_valid is None and heads > kv_heads)
    if fused and not softcap and sinks is None:
        mask = None if key_valid is None else key_valid[:, None, None, :]
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    else:
        out = attend_few(grouped, keys, values, key_valid, scale, softcap, sinks)
    return out.reshape(batch, 1, heads, values.shape[3])


def attend_few(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_valid: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Attention [B, K, G, D] of G queries a key-value head, written out.

    They see all columns S of keys and values [B, K, S, D], or those where key_valid [B, S] is True.
    """
    batch, kv_heads, count, _ = query.shape
    scores = torch.matmul(query, keys.transpose(2, 3))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if key_valid is not None:
        # Not -inf: a padding query with padding alone before it would be NaN, and stay in memory.
        scores = scores.masked_fill(~key_valid[:, None, None, :], torch.finfo(scores.dtype).min)
    if sinks is not None:
        extra = sinks.to(scores.dtype).reshape(1, kv_heads, count, 1).expand(batch, -1, -1, 1)
        weights = torch.softmax(torch.cat((scores, extra), -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    return torch.matmul(weights.to(values.dtype), values)


def attend_as_configured(
    implementation: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: object,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention by the implementation that one module of the model was configured with.

    Args:
        implementation: Of that module; it belongs to the plan that calls it.
        query: [B, H, T, D]; key, value: [B, K, T, D].
        mask: What the implementation takes for one: a tensor, a block mask, or ``None``.

    Returns:
        [B, T, H, D].
    """
    return implementation(query, key, value, mask, scale, window, softcap, sinks, dropout)
