"""The seam to what a transformers model is configured with: attention, masks, checkpointing, loss.

A training graph computes with the very functions that the module would call. Each is looked up
when it is called, as the module does.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.transformers import (
    ALL_ATTENTION_FUNCTIONS,
    GradientCheckpointingLayer,
    build_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from ..errors import CaptureError
from ..passes.thread_masks import MASKS

#: Implementations that do not look at positions: these reach the model, and not the operator.
WITHOUT_POSITIONS = ("eager", "sdpa")

_BUILDERS = dict(zip(MASKS, (create_causal_mask, create_sliding_window_causal_mask), strict=True))


class Configured:
    """The attention implementation of one module, called as the module calls it.

    Args:
        cached: Whether the module would hand it keys and values out of a fresh cache: copies, of
            another layout than what it computed, for which kernels may round differently.
    """

    def __init__(self, module: nn.Module, *, cached: bool) -> None:
        self.config: Any = getattr(module, "config", None)
        self._module = module
        self._cached = cached
        if not hasattr(self.config, "_attn_implementation"):
            raise CaptureError(f"{type(module).__name__} names no attention implementation")

    @property
    def name(self) -> str:
        """What the config calls it, e.g. ``"sdpa"``."""
        return str(self.config._attn_implementation or "eager")

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        scale: float,
        window: int,
        softcap: float,
        sinks: Tensor | None,
        dropout: float,
    ) -> Tensor:
        """query [B, H, T, D]; key, value [B, K, T, D] -> [B, T, H, D]."""
        given = {"sliding_window": window, "softcap": softcap, "s_aux": sinks}
        options = {name: value for name, value in given.items() if value is not None and value != 0}
        if self._cached:
            key, value = (torch.cat((t.new_empty(0), t), -2) for t in (key, value))
        out: Tensor
        out, _ = self._function()(
            self._module, query, key, value, mask, dropout=dropout, scaling=scale, **options
        )
        return out

    def _function(self) -> Callable[..., Any]:
        if self.name != "eager":
            found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[self.name]
            return found
        return _eager(type(self._module))


def _eager(kind: type) -> Callable[..., Any]:
    """The eager attention of a module's class: a function of the file it stands in."""
    for base in kind.__mro__:
        beside = sys.modules.get(base.__module__)
        found: Callable[..., Any] | None = getattr(beside, "eager_attention_forward", None)
        if found is not None:
            return found
    raise CaptureError(f"{kind.__name__} has no eager attention beside it")


def build_masks(
    config: Any,
    kinds: Collection[str],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    dtype: torch.dtype,
) -> list[Any]:
    """The masks of one forward, in the order of :data:`MASKS`; ``None`` for those not in use.

    Args:
        kinds: Of :data:`MASKS`, those in use.
        input_ids, attention_mask, position_ids: [B, T]; positions only where the model would
            look for packed sequences in them.
        dtype: Of the model's embeddings.
    """
    shaped = torch.empty((), dtype=dtype, device=input_ids.device).expand(*input_ids.shape, 1)
    return [
        build_mask(
            build,
            config=config,
            inputs_embeds=shaped,
            attention_mask=attention_mask,
            position_ids=position_ids,
        )
        if kind in kinds
        else None
        for kind, build in _BUILDERS.items()
    ]


def layer_checkpoint(
    model: nn.Module, layers: Collection[str], *, whole: bool
) -> Callable[..., Any] | None:
    """The checkpoint function of the decoder layers, with the model's settings; ``None`` if off.

    Args:
        layers: Module paths of the decoder layers.
        whole: Whether each of them is one function of the graph.

    Raises:
        CaptureError: where what is checkpointed is not just all of these layers.
    """
    switched = [
        (path, module)
        for path, module in model.named_modules()
        if getattr(module, "gradient_checkpointing", False) and module.training
    ]
    if not switched:
        return None
    found = {p: m for p, m in switched if isinstance(m, GradientCheckpointingLayer)}
    if len(found) == len(switched):  # then the model still makes a cache, and layers lose it
        raise CaptureError("gradient checkpointing that is on in layers and off in their model")
    if set(found) != set(layers) or not whole:
        which = ", ".join(sorted(set(found) ^ set(layers))) or "parts of its layers"
        raise CaptureError(f"gradient checkpointing that does not go by decoder layers: {which}")
    functions: list[Any] = [module._gradient_checkpointing_func for module in found.values()]
    if any(_settings(function) != _settings(functions[0]) for function in functions):
        raise CaptureError("gradient checkpointing with other settings from layer to layer")
    checkpoint: Callable[..., Any] = functions[0]
    return checkpoint


def _settings(function: Any) -> Any:
    if isinstance(function, functools.partial):
        return function.func, function.args, function.keywords
    return function


def loss_of(causal: Any, logits: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
    """The model's own loss of logits [B, T, V] and labels [B, T], a scalar."""
    size = causal.config.get_text_config(decoder=True).vocab_size
    loss: Tensor = causal.loss_function(logits=logits, labels=labels, vocab_size=size, **options)
    return loss
