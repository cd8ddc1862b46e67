"""What transformers' own ``generate`` computes on the way to given tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.transformers import GenerationConfig
from .guard import inference_mode_of, instance_attribute
from .request import causal_lm


def forced_logits(
    model: nn.Module, ids: Tensor, mask: Tensor, first: int, weights: Mapping[str, Tensor]
) -> Tensor:
    """The logits of greedy search that is made to choose ``ids``.

    Every call of the model is one that ``generate`` makes: it gets the prompt, then token by
    token, the mask, a cache, and whatever else transformers passes.

    Args:
        model: Of transformers or PEFT.
        ids: int64 ``[B, T]``.
        mask: int64 ``[B, T]``, 0 for padding on the left.
        first: How many columns are the prompt.
        weights: By qualified name, in place of the model's own.

    Returns:
        ``[B, T - first + 1, V]``, float32: of the prompt's last column and those after.
    """
    inputs = {"input_ids": ids[:, :first], "attention_mask": mask[:, :first]}
    given = {f"model.{name}": tensor for name, tensor in weights.items()}
    with torch.no_grad(), inference_mode_of(model):
        out: Tensor = torch.func.functional_call(
            _Forced(model, ids), given, (), inputs, tie_weights=False
        )
    return out


class _Forced(nn.Module):
    """A module, for ``functional_call``, that runs ``generate``."""

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        super().__init__()
        self.model = model
        self._ids = ids

    def forward(self, **inputs: Tensor) -> Tensor:
        causal: Any = causal_lm(self.model)
        new = self._ids.shape[1] - inputs["input_ids"].shape[1] + 1
        config = GenerationConfig(
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        with instance_attribute(causal, "generation_config", config):
            given = {**inputs, "generation_config": config, "logits_processor": [self._choose]}
            out = type(causal).generate(causal, **given)
        return torch.stack(out.logits, 1)

    def _choose(self, so_far: Tensor, scores: Tensor) -> Tensor:
        at = min(so_far.shape[1], self._ids.shape[1] - 1)  # behind them any token will do
        return torch.zeros_like(scores).scatter_(1, self._ids[:, at : at + 1], 1.0)
