"""Models and calls that several tests of capture share."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from tiny_models import POSITIONS, VOCAB, reweigh, tiny
from torch import Tensor, fx, nn

from hybrid_fx.capture import capture
from hybrid_fx.passes.pipeline import copy_graph
from hybrid_fx.plan.build import normalize

_NEOX = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": POSITIONS,
}


def decoder(kind: str, **changes: Any) -> Any:
    """A tiny decoder: those of :mod:`tiny_models`, GPT-NeoX and Gemma-3."""
    if kind not in ("neox", "gemma3"):
        return tiny(kind, **changes)
    if kind == "neox":
        config = transformers.GPTNeoXConfig(**{**_NEOX, **changes})
        model: Any = transformers.GPTNeoXForCausalLM(config)
    else:
        fields = {**_NEOX, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}
        config = transformers.Gemma3TextConfig(**{**fields, "num_hidden_layers": 6, **changes})
        model = transformers.Gemma3ForCausalLM(config)
    reweigh(model, 0)
    return model.eval()


@functools.cache
def captured(kind: str) -> tuple[Any, fx.Graph]:
    """A tiny decoder and its graph as captured in eval; copy the graph before changing it."""
    model = decoder(kind)
    return model, capture(model).graph


def canonical(kind: str) -> fx.Graph:
    """The canonical graph of a tiny decoder, a copy of the caller's own."""
    return normalize(copy_graph(captured(kind)[1]))


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
