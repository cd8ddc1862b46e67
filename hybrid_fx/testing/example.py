"""One example: a graph, what passes are told about it, and values for several sizes."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..passes.contract import Context

#: (B, T) of the calls of one example, in order: all of them run on the same weights, so that what
#: a graph writes into its buffers is read by the next call.
SIZES = ((2, 3), (1, 1), (3, 1), (1, 4))


def _spelled(shape: Any) -> tuple[Any, ...]:
    return tuple(size if isinstance(size, int) else str(size) for size in shape)


@dataclass(frozen=True, eq=False)
class Example:
    """A graph and how its placeholders are filled.

    Attributes:
        graph: Legal, with full meta; passes are run on copies of it.
        context: What passes are told.
        seed: Of the values; each name draws from a generator of its own.
        sizes: (B, T) of the calls; the first two symbolic sizes among the inputs stand for them.
        limits: Integers drawn for an input or weight stay below; 4 where nothing is said.
        shared: Names that stand for the same tensor as another name of the same kind.
    """

    graph: fx.Graph
    context: Context = field(default_factory=Context)
    seed: int = 0
    sizes: tuple[tuple[int, int], ...] = SIZES
    limits: Mapping[str, int] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    # (kind, name) -> shape and dtype, read once: a pass that guards on a size changes fake values
    _shapes: dict[tuple[str, str], tuple[tuple[Any, ...], torch.dtype]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        for node in self.graph.nodes:
            val = node.meta.get("val")
            for kind in ("weight", "input"):
                if node.op == "placeholder" and kind in node.meta and isinstance(val, Tensor):
                    self._shapes[kind, node.meta[kind]] = (_spelled(val.shape), val.dtype)

    @property
    def symbols(self) -> tuple[str, ...]:
        """The symbolic sizes of the inputs, in order of appearance: B and T."""
        shapes = [shape for (kind, _), (shape, _) in self._shapes.items() if kind == "input"]
        return tuple(dict.fromkeys(d for shape in shapes for d in shape if isinstance(d, str)))

    def weights(self) -> dict[str, Tensor]:
        """A tensor for each weight by name; new memory at each call, the same values."""
        return self._values("weight", {})

    def inputs(self, size: tuple[int, int]) -> dict[str, Tensor]:
        """A tensor for each runtime input of a call of ``size`` = (B, T)."""
        return self._values("input", dict(zip(self.symbols, size, strict=False)))

    def _values(self, wanted: str, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for (kind, name), (shape, dtype) in self._shapes.items():
            if kind == wanted:
                held = self.shared.get(name)
                whole = tuple(sizes.get(d, d) for d in shape)
                found[name] = found[held] if held in found else self._draw(name, whole, dtype)
        return found

    def _draw(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        rng = torch.Generator().manual_seed(zlib.crc32(name.encode()) + self.seed)
        if dtype is torch.bool:
            return torch.rand(shape, generator=rng) < 0.5
        if not dtype.is_floating_point:
            return torch.randint(0, self.limits.get(name, 4), shape, generator=rng).to(dtype)
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)

    def with_sizes(self, *sizes: tuple[int, int]) -> Example:
        """The same example, called with other (B, T)."""
        return replace(self, sizes=sizes)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # for Hypothesis
        printer.text(repr(self))

    def __repr__(self) -> str:
        return f"Example(seed={self.seed}, shared={dict(self.shared)}, graph=\n{text(self.graph)})"


def text(graph: fx.Graph) -> str:
    """A graph for people: each node with its arguments, place and value, in one line."""
    lines = []
    for node in graph.nodes:
        val, where = node.meta.get("val"), node.meta.get("path")
        shape = f" {list(val.shape)} {val.dtype}" if isinstance(val, Tensor) else ""
        stands = node.meta.get("weight") or node.meta.get("input") or ""
        if node.op == "placeholder":
            kind = next((k for k in ("weight", "input", "prepared") if k in node.meta), "unbound")
            buffer = kind == "weight" and not node.meta.get("parameter")
            lines.append(f"  {node.name} = {'buffer' if buffer else kind} {stands!r}{shape}")
            continue
        called = getattr(node.target, "__name__", str(node.target))
        given = ", ".join(
            [*(repr(a) for a in node.args), *(f"{k}={v!r}" for k, v in node.kwargs.items())]
        )
        text = f"return {given}" if node.op == "output" else f"{node.name} = {called}({given})"
        lines.append(f"  {text}{shape}" + (f"  # {where}" if where else ""))
    return "\n".join(lines) + "\n"
