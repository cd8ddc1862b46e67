"""Values of small graphs before and after a pass; graphs are put together with ``Builder``.

Tensors come from a generator of their own; graphs run call by call, on copies of the inputs, so
that what a graph writes is seen and can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from hybrid_fx.passes.contract import Context
from hybrid_fx.passes.operators import OPERATORS
from hybrid_fx.passes.policies import POLICIES
from hybrid_fx.passes.roles import Policy, match_layer
from hybrid_fx.testing import Builder as Builder


def values(graph: fx.Graph, seed: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    """A random tensor for each placeholder."""
    rng = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            val = node.meta["val"]
            if val.dtype.is_floating_point:
                drawn = torch.randn(val.shape, generator=rng, dtype=torch.float64) * scale
                found[node.name] = drawn.to(val.dtype)
            else:
                found[node.name] = torch.randint(0, 4, val.shape, generator=rng).to(val.dtype)
    return found


def run(graph: fx.Graph, given: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """The output of a graph and what its placeholders hold afterwards; ``given`` stays."""
    own = {name: tensor.clone() for name, tensor in given.items()}
    names = [node.name for node in graph.nodes if node.op == "placeholder"]
    result = fx.Interpreter(fx.GraphModule({}, graph)).run(*(own[name] for name in names))
    return result, own


def same(a: Any, b: Any) -> bool:
    """Equal bit by bit, through tuples."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def far(a: Tensor, b: Tensor) -> float:
    """The Euclidean distance of two tensors relative to the second."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def text(graph: fx.Graph) -> str:
    """The calls of a graph in order, without the numbers of dropped nodes."""
    return "\n".join(f"{n.op} {n.target} {n.args} {n.kwargs}" for n in graph.nodes)


def context(graph: fx.Graph, layer: str, policies: Sequence[Policy] = POLICIES) -> Context:
    """What passes are told about a graph of one layer."""
    return Context(layers={layer: match_layer(graph, layer, policies)})


def count(graph: fx.Graph, operator: str) -> int:
    return sum(n.target is OPERATORS[operator] for n in graph.nodes)
