"""Running the optional passes on canonical graphs of whole decoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from hybrid_fx.passes.contract import Context
from hybrid_fx.passes.driver import run_passes
from hybrid_fx.passes.layers import layer_paths
from hybrid_fx.passes.pipeline import OPTIONAL
from hybrid_fx.passes.policies import POLICIES
from hybrid_fx.passes.roles import LayerMatch, Policy, match_layer


def layers_of(graph: fx.Graph, **options: Any) -> Context:
    """What passes are told about a canonical graph."""
    layers = {path: match_layer(graph, path, POLICIES) for path in layer_paths(graph)}
    return Context(layers=layers, **options)


def described(layer: str, policy: Policy) -> Context:
    """What passes are told about a graph of one layer in which every role of a policy is found."""
    roles = frozenset(role.name for role in policy.roles)
    return Context(layers={layer: LayerMatch(layer, policy, roles, {})})


def through(graph: fx.Graph, *names: str, told: Context | None = None) -> list[int]:
    """Run the optional passes of these names, in the order of the pipeline; their counts."""
    left_out = set(OPTIONAL.names) - set(names)
    records = run_passes(graph, OPTIONAL.without(left_out), told or layers_of(graph))
    return [record.result.count for record in records]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    named = dict(model.named_parameters(remove_duplicate=False))
    named |= dict(model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in named.items()}


def logits(graph: fx.Graph, given: dict[str, Tensor], rows: int = 2, length: int = 7) -> Tensor:
    """The logits of a graph that stands on weights, ids and positions."""
    rng = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 60, (rows, length), generator=rng)
    at = torch.arange(length).expand(rows, length).contiguous()
    inputs = {"input_ids": ids, "position_ids": at}
    arguments = [
        inputs[node.meta["input"]] if "input" in node.meta else given[node.meta["weight"]]
        for node in graph.nodes
        if node.op == "placeholder"
    ]
    with torch.no_grad():
        result: Tensor = fx.Interpreter(fx.GraphModule({}, graph)).run(*arguments)
    return result
