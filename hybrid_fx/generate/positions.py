"""What a model does with positions beyond those of its config, by its structure.

Learned and precomputed positions are rows of a table, which ends. Rotary ones are computed from the
position, and go on; where their frequencies follow the length of the call, the module decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

#: Rows that a table may have beyond the positions: OPT and its like keep two for padding.
_EXTRA_ROWS = 2


def has_table(causal: Any, limit: int) -> bool:
    """Whether the positions are rows of a table, of about ``limit`` of them."""
    tokens = {id(module) for module in causal.get_input_embeddings().modules()}  # PEFT wraps it
    rows = range(limit, limit + _EXTRA_ROWS + 1)
    for module in causal.modules():
        is_table = isinstance(module, nn.Embedding) and id(module) not in tokens
        if is_table and module.num_embeddings in rows:
            return True
    buffers = (buffer for _, buffer in causal.named_buffers())
    return any(b.dim() == 2 and b.is_floating_point() and len(b) == limit for b in buffers)


def are_rotary(causal: Any) -> bool:
    """Whether positions are rotary, of frequencies that are alike at any length of the call."""
    kinds = set(_rope_kinds(causal.config.get_text_config(decoder=True)))
    follows = any("dynamic" in kind or kind == "longrope" for kind in kinds)
    return bool(kinds) and not follows


def _rope_kinds(config: Any) -> Iterator[str]:
    """The kinds of rotary positions of a config: one, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None)
    each = [rope, *rope.values()] if isinstance(rope, Mapping) else []
    for parameters in each:
        if isinstance(parameters, Mapping) and (kind := parameters.get("rope_type")):
            yield kind
