"""Calls of a model and of its graph that several tests of capture share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tiny_models import VOCAB
from torch import Tensor, fx, nn


def tokens(rows: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random ids and plain positions, [B, T]."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=rng)
    return ids, torch.arange(length).expand(rows, length).contiguous()


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


def run_graph(graph: fx.Graph, weights: Mapping[str, Tensor], ids: Tensor, at: Tensor) -> Tensor:
    """The logits of a captured or canonical graph."""
    inputs = {"input_ids": ids, "position_ids": at}
    given = [
        inputs[node.meta["input"]] if "input" in node.meta else weights[node.meta["weight"]]
        for node in graph.nodes
        if node.op == "placeholder"
    ]
    result: Tensor = fx.Interpreter(fx.GraphModule({}, graph)).run(*given)
    return result


def logits(model: nn.Module, ids: Tensor, at: Tensor) -> Tensor:
    """The logits of the module itself."""
    result: Tensor = model(input_ids=ids, position_ids=at, use_cache=False).logits
    return result
