"""Graphs of a few calls, built by hand, and their values before and after a pass.

Tensors come from a generator of their own; graphs run call by call, on copies of the inputs, so
that what a graph writes is seen and can be compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from hybrid_fx.passes.contract import Context
from hybrid_fx.passes.operators import OPERATORS
from hybrid_fx.passes.policies import POLICIES
from hybrid_fx.passes.roles import Policy, match_layer


class Builder:
    """Adds placeholders and calls to a graph, with fake values as capture records them."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self._mode = FakeTensorMode()

    def _placeholder(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, meta: Mapping[str, Any]
    ) -> fx.Node:
        first = next((node for node in self.graph.nodes if node.op != "placeholder"), None)
        with self.graph.inserting_before(first) if first else contextlib.nullcontext():
            node = self.graph.placeholder(name.replace(".", "_"))
        with self._mode:
            node.meta |= {"path": "", "val": torch.empty(*shape, dtype=dtype), **meta}
        return node

    def weight(
        self, name: str, *shape: int, dtype: torch.dtype = torch.float32, parameter: bool = True
    ) -> fx.Node:
        return self._placeholder(name, shape, dtype, {"weight": name, "parameter": parameter})

    def input(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        return self._placeholder(name, shape, dtype, {"input": name})

    def call(self, operator: str, *args: Any, path: str = "", **kwargs: Any) -> fx.Node:
        """A call of an operator of the table."""
        return self.raw(OPERATORS[operator], *args, path=path, **kwargs)

    def raw(self, target: Any, *args: Any, path: str = "", **kwargs: Any) -> fx.Node:
        """A call as Dynamo may hand it over: of any function, or of a method by its name."""
        if isinstance(target, str):
            node = self.graph.call_method(target, args, kwargs)
        else:
            node = self.graph.call_function(target, args, kwargs)
        fakes, options = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self._mode:
            function = getattr(torch.Tensor, target) if isinstance(target, str) else target
            node.meta |= {"path": path, "val": function(*fakes, **options)}
        return node

    def output(self, *results: fx.Node) -> fx.Graph:
        self.graph.output(results if len(results) != 1 else results[0])
        return self.graph


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
