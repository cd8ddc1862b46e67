"""Prove a plan on the live model before it serves: what to compare it with, on which weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, fx, nn

from ..errors import HybridError
from ..generate import inference_mode_of

#: ``(input_ids, position_ids) -> logits``; ids and positions [B, T], logits [B, T, V].
Reference = Callable[[Tensor, Tensor], Tensor]


def by_graph(canonical: fx.Graph, weights: Mapping[str, Tensor]) -> Reference:
    """The captured graph as it stood before any rewriting."""
    whole = fx.GraphModule({}, canonical)
    holders = [n for n in canonical.nodes if n.op == "placeholder"]

    def reference(ids: Tensor, positions: Tensor) -> Tensor:
        given = {"input_ids": ids, "position_ids": positions}
        inputs = (
            given[n.meta["input"]] if "input" in n.meta else weights[n.meta["weight"]]
            for n in holders
        )
        out: Tensor = whole(*inputs)
        return out

    return reference


def by_module(model: nn.Module, changed: Mapping[str, Tensor]) -> Reference:
    """The model's own forward on some other weights: a stored plan comes without a graph."""

    def reference(ids: Tensor, positions: Tensor) -> Tensor:
        inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        with inference_mode_of(model):
            # Every name of a tied tensor is among the changed ones, so none is tied here.
            out: Tensor = torch.func.functional_call(
                model, dict(changed), (), inputs, tie_weights=False
            ).logits
        return out

    return reference


def telling(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of the weights among ``names`` that hide mistakes as they are, with other values.

    Fresh norms are all one, biases and LoRA's second factor all zero: a plan that swaps two of
    them, or scales them wrongly, gives the right logits until training begins. Vectors are always
    copied, matrices where they are zero. Draws from a generator of its own.

    Returns:
        The changed tensors, by every name they have in ``tensors``.
    """
    rng = torch.Generator().manual_seed(0)
    changed: dict[int, Tensor] = {}
    for name in names:
        tensor = tensors[name]
        if not tensor.is_floating_point() or id(tensor) in changed or not tensor.numel():
            continue
        if tensor.dim() < 2 or not bool(tensor.any()):
            noise = torch.randn(2, *tensor.shape, generator=rng).to(tensor.device, torch.float32)
            value = tensor.detach().float() * (1 + 0.1 * noise[0]) + 0.05 * noise[1]
            changed[id(tensor)] = value.to(tensor.dtype)
    return {name: changed[id(t)] for name, t in tensors.items() if id(t) in changed}


def said(reason: object) -> str:
    """One line of an error or a text."""
    text = str(reason).strip().split("\n")[0]
    if isinstance(reason, Exception) and not isinstance(reason, HybridError):
        return f"{type(reason).__name__}: {text}"
    return text
