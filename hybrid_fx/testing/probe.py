"""A builder that runs each call on small tensors of two sizes and reads the symbolic shape off.

Evaluating a call on fake tensors with symbolic sizes takes milliseconds; a random graph has dozens
of calls, and a property hundreds of graphs. What the builder notes is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .builder import Builder

#: (B, T) of the two runs: from one to the next B, T and B * T grow by numbers without a common
#: factor, so that what a size is made of can be read off.
PROBES = ((11, 17), (18, 30))


class ProbingBuilder(Builder):
    """A :class:`Builder` whose calls are run for real, at two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self._real: dict[fx.Node, tuple[Any, Any]] = {}
        self._known: dict[Any, Any] = {}

    def _placeholder(
        self, name: str, shape: Sequence[Any], dtype: torch.dtype, meta: Mapping[str, Any]
    ) -> fx.Node:
        node = super()._placeholder(name, (), dtype, meta)
        runs = []
        for batch, tokens in PROBES:
            whole = [batch if s is self.batch else tokens if s is self.tokens else s for s in shape]
            runs.append(torch.zeros(whole, dtype=dtype))
        return self._note(node, (runs[0], runs[1]))

    def _note(self, node: fx.Node, runs: tuple[Any, Any]) -> fx.Node:
        self._real[node] = runs
        node.meta["val"] = self._symbolic(*runs)
        return node

    def raw(self, target: Any, *args: Any, path: str = "", **kwargs: Any) -> fx.Node:
        function = getattr(torch.Tensor, target) if isinstance(target, str) else target
        runs = []
        for index in (0, 1):
            real = {node: pair[index] for node, pair in self._real.items()}
            given, options = fx.map_arg((args, kwargs), real.__getitem__)
            with torch.no_grad():
                runs.append(function(*given, **options))
        make = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        node = make(target, args, kwargs)
        node.meta["path"] = path
        return self._note(node, (runs[0], runs[1]))

    def _symbolic(self, one: Any, two: Any) -> Any:
        """The fake value that stands for both results."""
        if isinstance(one, tuple | list):
            return type(one)(self._symbolic(a, b) for a, b in zip(one, two, strict=True))
        if not isinstance(one, Tensor):
            return self._size(one, two) if isinstance(one, int) else one
        places = (*one.shape, *one.stride()), (*two.shape, *two.stride())
        key = (*places, one.dim(), one.dtype)
        if key not in self._known:
            sizes = [self._size(a, b) for a, b in zip(*places, strict=True)]
            with self.mode:
                self._known[key] = torch.empty_strided(
                    sizes[: one.dim()], sizes[one.dim() :], dtype=one.dtype
                )
        return self._known[key]

    def _size(self, one: int, two: int) -> Any:
        """The size, symbolic where it differs, that was ``one`` and ``two``."""
        if one == two:
            return one
        (b1, t1), (b2, t2) = PROBES
        found = []
        for size, first, second in (
            (self.batch * self.tokens, b1 * t1, b2 * t2),
            (self.batch, b1, b2),
            (self.tokens, t1, t2),
        ):
            factor, rest = divmod(two - one, second - first)
            more = one - factor * first
            if not rest and factor > 0:
                found.append((abs(more), more, factor, size))
        if not found:
            raise ValueError(f"a size is {one} at {PROBES[0]} and {two} at {PROBES[1]}")
        _, more, factor, size = min(found, key=lambda entry: entry[0])
        scaled = size * factor if factor != 1 else size
        return scaled + more if more else scaled
