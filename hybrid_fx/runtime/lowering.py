"""Lower the layer functions of a plan by torch.compile: one graph for all layers and all sizes.

Rows, tokens and positions are symbolic from the first call on; the sizes of weights and heads are
not. Dynamo keeps 0 and 1 apart from other sizes, and an absent mask from a present one, so that a
function has a handful of graphs: one row or more, one token or more, all columns valid or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Turns a generated layer function into one that gives the same result.
Lowering = Callable[[Callable[..., Any]], Callable[..., Any]]

_MEMORY = ("key_memory", "value_memory")

#: Which dimensions are symbolic.
_OF_MEMORY, _OF_TOKENS = (0, 2), (0, 1)


def by_inductor(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` compiled at its first call; numbers among its arguments are symbolic.

    Its tensors are prepared ones (see :func:`is_weight`), memory [R, K, P, D], of symbolic R and
    P, or hold tokens, [B, T, ...] or [B, S].
    """
    compiled = torch.compile(function, dynamic=True)
    code = function.__code__
    names = code.co_varnames[: code.co_argcount]
    symbolic = [_OF_MEMORY if name.startswith(_MEMORY) else _OF_TOKENS for name in names]

    def lowered(*arguments: Any) -> Any:
        for value, dims in zip(arguments, symbolic, strict=True):
            if isinstance(value, Tensor) and not hasattr(value, "_dynamo_static_indices"):
                _say_sizes(value, dims)
                if value._base is not None:  # of a slice: Dynamo guards its sizes too
                    _say_sizes(value._base, dims)
        return compiled(*arguments)

    return lowered


def is_weight(tensor: Tensor) -> None:
    """Say that all sizes of ``tensor`` belong to the model."""
    _say_sizes(tensor, ())


def _say_sizes(tensor: Tensor, symbolic: tuple[int, ...]) -> None:
    # Said of each dimension: left to themselves, dimensions that are equal by chance become one.
    for dim in range(tensor.dim()):
        if dim in symbolic:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
        else:
            torch._dynamo.mark_static(tensor, dim)
