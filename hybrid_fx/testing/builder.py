"""Graphs call by call, with fake values and module paths as a capture records them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from ..passes.graph import fake_values
from ..passes.operators import OPERATORS

#: What the two symbolic sizes are while a graph is built. Static sizes of drawn graphs are taken
#: from the same small numbers, so that a pass that compares sizes by these values is found out.
HINTS = (2, 3)


class Builder:
    """Adds placeholders and calls to a graph, each with its fake value.

    ``batch`` and ``tokens`` are symbolic sizes for the shapes of inputs; a graph whose shapes hold
    them serves every size.
    """

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        both = [DimDynamic.DYNAMIC, DimDynamic.DYNAMIC]
        sizes = self.mode.from_tensor(
            torch.empty(*HINTS),
            symbolic_context=StatelessSymbolicContext(dynamic_sizes=both),
        )
        self.batch, self.tokens = sizes.shape

    def _placeholder(
        self, name: str, shape: Sequence[Any], dtype: torch.dtype, meta: Mapping[str, Any]
    ) -> fx.Node:
        first = next((node for node in self.graph.nodes if node.op != "placeholder"), None)
        with self.graph.inserting_before(first) if first else contextlib.nullcontext():
            node = self.graph.placeholder(name.replace(".", "_"))
        with self.mode:
            node.meta |= {"path": "", "val": torch.empty(tuple(shape), dtype=dtype), **meta}
        return node

    def weight(
        self, name: str, *shape: int, dtype: torch.dtype = torch.float32, parameter: bool = True
    ) -> fx.Node:
        """A parameter, or a buffer; two placeholders of one name are tied."""
        return self._placeholder(name, shape, dtype, {"weight": name, "parameter": parameter})

    def input(self, name: str, *shape: Any, dtype: torch.dtype = torch.float32) -> fx.Node:
        """A runtime input."""
        return self._placeholder(name, shape, dtype, {"input": name})

    def call(self, operator: str, *args: Any, path: str = "", **kwargs: Any) -> fx.Node:
        """A call of an operator of the table."""
        return self.raw(OPERATORS[operator], *args, path=path, **kwargs)

    def raw(self, target: Any, *args: Any, path: str = "", **kwargs: Any) -> fx.Node:
        """A call as Dynamo may hand it over: of any function, or of a method by its name."""
        function = getattr(torch.Tensor, target) if isinstance(target, str) else target
        val = self._evaluate(function, args, kwargs)
        if isinstance(target, str):
            node = self.graph.call_method(target, args, kwargs)
        else:
            node = self.graph.call_function(target, args, kwargs)
        node.meta |= {"path": path, "val": val}
        return node

    def _evaluate(self, function: Any, args: Any, kwargs: Any) -> Any:
        fakes, options = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with fake_values(self.mode):
            return function(*fakes, **options)

    def output(self, *results: Any) -> fx.Graph:
        """End the graph with one result or several; returns it."""
        self.graph.output(results if len(results) != 1 else results[0])
        return self.graph
