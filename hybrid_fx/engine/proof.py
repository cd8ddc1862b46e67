"""Prove a plan on the live model before it serves: what to compare it with, on which weights."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import HybridError
from ..generate import inference_mode_of
from ..runtime.prepared import Gather
from ..runtime.session import Timer

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


def by_walk(
    canonical: fx.Graph,
    tensors: Mapping[str, Tensor],
    gather: Gather,
    timer: Timer,
    then: Callable[[], None],
) -> Reference:
    """The captured graph, each weight made whole where it is first read, and freed behind the last.

    Args:
        then: Called when the logits are there and the weights are gone.
    """
    last: dict[fx.Node, fx.Node] = {}
    for node in canonical.nodes:
        last |= dict.fromkeys(node.all_input_nodes, node)

    def walk(given: Mapping[str, Tensor]) -> Tensor:
        values: dict[fx.Node, Any] = {}

        def value(node: fx.Node) -> Any:
            if node not in values:
                known = "input" in node.meta
                values[node] = (
                    given[node.meta["input"]] if known else gather(tensors[node.meta["weight"]])
                )
            return values[node]

        for node in canonical.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), value)
                values[node] = node.target(*args, **kwargs)
                del args, kwargs
                for source in {*node.all_input_nodes, node}:
                    if last.get(source, node) is node:
                        del values[source]
        logits: Tensor = values[_result(canonical)]
        return logits

    def reference(ids: Tensor, positions: Tensor) -> Tensor:
        read = [n.meta["weight"] for n in canonical.nodes if "weight" in n.meta]
        gather.begin([tensors[name] for name in read], timer)
        try:
            logits = walk({"input_ids": ids, "position_ids": positions})
        finally:
            gather.end()
        then()
        return logits

    return reference


def _result(graph: fx.Graph) -> fx.Node:
    """The value that a captured graph returns."""
    found = next(n for n in graph.nodes if n.op == "output").args[0]
    assert isinstance(found, fx.Node)
    return found


def told_apart(name: str, tensor: Tensor) -> Tensor:
    """A weight with values that show mistakes: its own, or where those hide some, others.

    Fresh norms are all one, biases and LoRA's second factor all zero: a plan that swaps two of
    them, or scales them wrongly, gives the right logits until training begins. Vectors are always
    changed, matrices where they are zero; in a copy, drawn for the name.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor
    if tensor.dim() > 1 and bool(tensor.any()):
        return tensor
    rng = torch.Generator("cpu").manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(2, *tensor.shape, generator=rng, device="cpu").to(
        tensor.device, torch.float32
    )
    value = tensor.detach().float() * (1 + 0.1 * noise[0]) + 0.05 * noise[1]
    return value.to(tensor.dtype)


def telling(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The weights among ``names`` that :func:`told_apart` changes, by every name in ``tensors``."""
    changed: dict[int, Tensor] = {}
    for name in names:
        tensor = tensors[name]
        if id(tensor) not in changed and (other := told_apart(name, tensor)) is not tensor:
            changed[id(tensor)] = other
    return {name: changed[id(t)] for name, t in tensors.items() if id(t) in changed}


def said(reason: object) -> str:
    """One line of an error or a text."""
    text = str(reason).strip().split("\n")[0]
    if isinstance(reason, Exception) and not isinstance(reason, HybridError):
        return f"{type(reason).__name__}: {text}"
    return text
