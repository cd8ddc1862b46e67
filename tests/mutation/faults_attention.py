"""Mistakes in attention over the workspace: slots, windows, validity, scale, heads."""

from __future__ import annotations

from mutant import Fault, Group

_MEMORY = ("tests/runtime/test_attention_memory.py",)
_SESSIONS = ("tests/runtime/test_sessions.py",)

GROUPS = (
    Group(
        "attention",
        "passes/attention.py",
        _MEMORY,
        (
            Fault(
                "new keys stand one slot early",
                "memory[:batch, :, start:length] = new",
                "memory[:batch, :, start - 1 : length - 1] = new",
            ),
            Fault(
                "scattered rows write the first slots",
                "last = slots[:, start:]",
                "last = slots[:, : length - start]",
            ),
            Fault(
                "rows in a line are read from the last",
                "return memory[:batch, :, :length]",
                "return memory.flip(0)[:batch, :, :length]",
            ),
            Fault(
                "the window is one too wide",
                "(keys[None, :] > queries[:, None] - window)",
                "(keys[None, :] >= queries[:, None] - window)",
            ),
            Fault(
                "a decode's window is one too wide",
                "keys, values = keys[:, :, -window:], values[:, :, -window:]",
                "keys, values = keys[:, :, -window - 1 :], values[:, :, -window - 1 :]",
            ),
            Fault(
                "a query sees later tokens",
                "allowed = keys[None, :] <= queries[:, None]",
                "allowed = keys[None, :] <= queries[:, None] + 1",
            ),
            Fault(
                "a single query is scaled twice",
                "(grouped, keys, values, attn_mask=mask, scale=scale)",
                "(grouped * scale, keys, values, attn_mask=mask, scale=scale)",
            ),
            Fault(
                "padding is attended to",
                "(allowed & key_valid[:, None, None, :]) | itself",
                "allowed | itself",
            ),
            Fault(
                "a decode attends to padding alone",
                "scores.masked_fill(~key_valid[:, None, None, :]",
                "scores.masked_fill(key_valid[:, None, None, :]",
            ),
            Fault(
                "the prompt is not causal",
                "query, keys, values, is_causal=True, scale=scale",
                "query, keys, values, is_causal=False, scale=scale",
                _SESSIONS,
            ),
            Fault(
                "a decode loses the scale",
                "scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale",
                "scores.to(torch.promote_types(scores.dtype, torch.float32))",
            ),
            Fault(
                "a decode's groups of heads are interleaved",
                "grouped = query.reshape(batch, kv_heads, heads // kv_heads, size)",
                "grouped = query.reshape(batch, heads // kv_heads, kv_heads, size).transpose(1, 2)",
            ),
            Fault(
                "written-out attention pairs heads with the wrong keys",
                "(t.repeat_interleave(groups, 1) for t in (key, value))",
                "(t.repeat(1, groups, 1, 1) for t in (key, value))",
            ),
            Fault(
                "sinks take their share twice",
                "        weights = weights[..., :-1]\n    if dropout",
                "        weights = weights[..., :-1] * (1 - weights[..., -1:])\n    if dropout",
            ),
            Fault(
                "a padding query is not finite",
                "allowed = (allowed & key_valid[:, None, None, :]) | itself",
                "allowed = allowed & key_valid[:, None, None, :]",
                (*_MEMORY, *_SESSIONS),
            ),
        ),
    ),
)
