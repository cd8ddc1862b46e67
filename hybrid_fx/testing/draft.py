"""A graph while it is drawn: the values so far, and choices among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, fx

from ..passes.graph import dtype_of, shape_of
from ..passes.roles import Policy
from .probe import ProbingBuilder

#: Static sizes of drawn tensors; the symbolic ones were 2 and 3 when the graph was built.
WIDTHS = (4, 2, 3, 1)


def sizes_of(node: object) -> tuple[Any, ...]:
    """The shape of a node's value; a symbolic size stands as its name, equal to itself only."""
    return tuple(s if isinstance(s, int) else str(s) for s in shape_of(node) or ())


def is_float(node: fx.Node) -> bool:
    """Whether a node's value is a floating-point tensor."""
    dtype = dtype_of(node)
    return dtype is not None and dtype.is_floating_point


class Draft:
    """Draws choices from Hypothesis and keeps the tensors that further calls may read."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.build = ProbingBuilder()
        self.values: list[fx.Node] = []
        self.limits: dict[str, int] = {}
        self.shared: dict[str, str] = {}
        self.policies: dict[str, Policy] = {}  # by layer
        self._held: list[fx.Node] = []  # weights

    def flag(self) -> bool:
        """A free choice that shrinks to False."""
        return self.draw(st.booleans())

    def often(self) -> bool:
        """True nearly always; shrinks to False."""
        return self.draw(st.integers(0, 9)) > 0

    def one(self, options: Sequence[Any]) -> Any:
        """One of several; shrinks to the first."""
        return options[self.draw(st.integers(0, len(options) - 1))]

    def value(self, fits: Callable[[fx.Node], bool]) -> fx.Node | None:
        """A value so far that fits; shrinks to the first. None where none does."""
        found = [node for node in self.values if fits(node)]
        return self.one(found) if found else None

    def call(self, operator: str, *args: Any, path: str = "", **kwargs: Any) -> fx.Node:
        """Add a call; a tensor that it gives may be read by later ones."""
        node = self.build.call(operator, *args, path=path, **kwargs)
        if isinstance(node.meta["val"], Tensor):
            self.values.append(node)
        return node

    def input(self, name: str, *shape: Any, dtype: torch.dtype = torch.float32) -> fx.Node:
        """A runtime input; maybe the same tensor as an earlier one of its kind."""
        node = self.build.input(name, *shape, dtype=dtype)
        twin = self.value(
            lambda n: (
                n.op == "placeholder"
                and sizes_of(n) == sizes_of(node)
                and dtype_of(n) == dtype
                and "input" in n.meta
            )
        )
        if twin is not None and self.flag():
            held = twin.meta["input"]
            self.shared[name] = self.shared.get(held, held)
        self.values.append(node)
        return node

    def weight(
        self, *shape: int, dtype: torch.dtype = torch.float32, name: str = "", path: str = ""
    ) -> fx.Node:
        """A parameter of this shape; or a buffer, a tie, an alias, or a value computed of some."""
        name = name or f"w{len(self._held)}"
        kinds = ["parameter", "buffer", "again", "tied", "alias", "scaled", "gathered", "cast"]
        kind = self.one([*kinds, "turned"] if len(shape) == 2 else kinds)
        alike = [n for n in self._held if shape_of(n) == shape and dtype_of(n) == dtype]
        if kind in ("again", "tied", "alias") and alike:
            return self._another(kind, self.one(alike), name, dtype)
        if kind == "turned":
            first = self._hold(name, shape[::-1], dtype, True)
            return self.call("t", first, path=path)
        if kind == "cast":
            first = self._hold(name, shape, torch.bfloat16, True)
            return self.call("to", first, dtype, path=path)
        node = self._hold(name, shape, dtype, kind != "buffer")
        if kind == "scaled":
            return self.call("mul", node, 0.5, path=path)
        return self.call("gather", node, path=path) if kind == "gathered" else node

    def _another(self, kind: str, held: fx.Node, name: str, dtype: torch.dtype) -> fx.Node:
        if kind == "again":
            return held
        shape, parameter = shape_of(held) or (), held.meta["parameter"]
        if kind == "tied":
            return self._hold(held.meta["weight"], shape, dtype, parameter)
        self.shared[name] = self.shared.get(held.meta["weight"], held.meta["weight"])
        return self._hold(name, shape, dtype, parameter)

    def _hold(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, parameter: bool
    ) -> fx.Node:
        node = self.build.weight(name, *shape, dtype=dtype, parameter=parameter)
        self._held.append(node)
        self.values.append(node)
        return node
