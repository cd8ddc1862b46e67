"""The seam to transformers' attention and mask registries, for the time of one capture.

An entry under a private name makes every attention arrive as the canonical op, without a mask in
the graph. Entry, configured implementation and masks are restored whatever happens.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.transformers import ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS
from ..errors import CaptureError

_NAME = "hybrid_fx_capture"

#: One entry, under one name: captures of other threads wait.
_ENTRY = threading.RLock()

#: What stands for a mask while a forward is traced; behind the second, the size of its window.
_CAUSAL, _WINDOW = "a causal mask", "a causal mask with a window of "

#: Implementations whose window is the mask's, whatever window they are told.
_BY_MASK = (None, "eager", "sdpa")

#: What attention functions may be given that changes what they compute, and the op does not carry.
_UNKNOWN = ("position_bias", "head_mask", "layer_head_mask", "indices", "block_indices", "sinks")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | str | None,
    *,
    by_mask: bool,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    for name in _UNKNOWN:
        if options.get(name) is not None:
            raise CaptureError(f"{type(module).__name__} gives its attention {name}")
    if isinstance(attention_mask, str):
        masked = 0 if attention_mask == _CAUSAL else int(attention_mask[len(_WINDOW) :])
        if masked != (sliding_window or 0) and not by_mask:
            raise CaptureError(
                f"{type(module).__name__} attends under {attention_mask} and says a window of "
                f"{sliding_window}; set_attn_implementation('sdpa'), which reads the mask alone"
            )
        attention_mask, sliding_window = None, masked
    elif attention_mask is None and by_mask:
        sliding_window = None  # nothing hides a column but the order
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if attention_mask is not None or not causal:
        raise CaptureError(
            f"{type(module).__name__} attends with a mask of its own or without causality; "
            "only causal decoders are rewritten"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out = torch.ops.hybrid_fx.attention(
        query, key, value, scale, sliding_window or 0, softcap or 0.0, s_aux, dropout
    )
    return out, None


def _kind_of_mask(*_: Any, **options: Any) -> str:
    """The kind of a mask in its place: each attention is known by it."""
    size = options.get("local_size")
    if size and options.get("chunked"):
        raise CaptureError("chunked attention is not rewritten yet")
    if options.get("use_vmap"):
        raise CaptureError("its masks are put together with functions of its own")
    return f"{_WINDOW}{size}" if size else _CAUSAL


def _refuse_own_attention(name: str | None) -> None:
    """An implementation that the user registered computes what the canonical op may not."""
    function = ALL_ATTENTION_FUNCTIONS.get(name, None) if name else None
    owner = getattr(function, "__module__", None) or ""
    if function is not None and owner.partition(".")[0] != "transformers":
        raise CaptureError(
            f"attention implementation {name!r} is not of transformers; set_attn_implementation"
            "('sdpa') runs it from graphs"
        )


def _configs(model: nn.Module) -> list[Any]:
    """Every config object of the model and its submodules that names an implementation."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return list(found.values())


@contextlib.contextmanager
def canonical_attention(model: nn.Module) -> Iterator[None]:
    """Let ``model`` call the canonical attention op inside the ``with`` block.

    Its window is that of the mask which it is given: what a model says to its attention beside a
    mask may be another one, and only some implementations listen to it.
    """
    with _ENTRY:
        configs = _configs(model)
        before = [config._attn_implementation_internal for config in configs]
        for name in before:
            _refuse_own_attention(name)
        by_mask = all(name in _BY_MASK for name in before)
        entry = functools.partial(_attention, by_mask=by_mask)
        try:
            ALL_ATTENTION_FUNCTIONS._global_mapping[_NAME] = entry
            ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[_NAME] = _kind_of_mask
            for config in configs:
                config._attn_implementation_internal = _NAME
            yield
        finally:
            for config, name in zip(configs, before, strict=True):
                config._attn_implementation_internal = name
            ALL_ATTENTION_FUNCTIONS._global_mapping.pop(_NAME, None)
            ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(_NAME, None)
