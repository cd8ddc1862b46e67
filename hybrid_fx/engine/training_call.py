"""What a training forward was called with, or why the training graph does not serve it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

#: Arguments that go to the loss, and change nothing else.
_LOSS = ("num_items_in_batch", "ignore_index", "shift_labels")
_TENSORS = ("input_ids", "attention_mask", "position_ids")
_KNOWN = frozenset((*_TENSORS, *_LOSS, "labels", "logits_to_keep", "use_cache", "return_dict"))


@dataclass(frozen=True, kw_only=True)
class TrainingCall:
    """The arguments of one forward that the training graph can serve.

    Attributes:
        input_ids: [B, T] int64; attention_mask, position_ids, labels: [B, T] or ``None``.
        keep: ``logits_to_keep``.
        use_cache: As given; the graph keeps no cache in any case.
        cached: Whether the module would put keys and values into a cache.
        return_dict: Whether the result is an object with fields; else it is a tuple.
        loss: Arguments of the loss function beside logits and labels.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    labels: Tensor | None = None
    keep: int | Tensor = 0
    use_cache: bool | None = None
    cached: bool = False
    return_dict: bool = True
    loss: Mapping[str, Any] = field(default_factory=dict)

    @property
    def given(self) -> dict[str, torch.dtype]:
        """The tensors the graph depends on, by name, with their dtypes."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        return {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}


def read_call(
    model: nn.Module, causal: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> TrainingCall | str:
    """Read ``model(*args, **kwargs)``.

    Returns:
        The call; or, in a few words, why the module itself must run it.
    """
    names = list(inspect.signature(model.forward).parameters)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if len(args) > len(names) or set(names[: len(args)]) & set(kwargs):
        return "arguments that the model refuses"
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name not in _KNOWN and value is not False:
            return f"the argument {name}"
    config = causal.config.get_text_config(decoder=True)
    for name in ("output_attentions", "output_hidden_states", "output_router_logits"):
        if getattr(config, name, False):
            return f"config.{name}"
    if given.get("use_cache"):
        return "use_cache=True"
    if reason := _odd_tensors(given):
        return reason
    use_cache = given.get("use_cache")
    return TrainingCall(
        **{name: given[name] for name in (*_TENSORS, "labels") if name in given},
        keep=given.get("logits_to_keep", 0),
        use_cache=use_cache,
        cached=use_cache is None and bool(getattr(config, "use_cache", False)),
        return_dict=given.get("return_dict", getattr(causal.config, "return_dict", True)),
        loss={name: given[name] for name in _LOSS if name in given},
    )


def _odd_tensors(given: Mapping[str, Any]) -> str:
    """Why the tensors of a call are not those of a plain batch, or ""."""
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int64 or not ids.numel():
        return "input_ids that are not int64 [B, T]"
    for name in ("attention_mask", "position_ids"):
        value = given.get(name, ids)
        if not isinstance(value, Tensor) or value.shape != ids.shape:
            return f"{name} of another shape than input_ids"
    if given.get("position_ids", ids).dtype != torch.int64:
        return "position_ids that are not int64"
    keep = given.get("logits_to_keep", 0)
    if isinstance(keep, Tensor):
        return "" if keep.dim() == 1 else "logits_to_keep of other than one dimension"
    return "" if type(keep) is int and keep >= 0 else "logits_to_keep that is no count"
