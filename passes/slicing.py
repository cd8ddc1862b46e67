"""A slice of a value, computed from slices of what it is made of.

``Slicer.slice(value, cut)`` gives the part of ``value`` that one rank owns along an axis, in whole
units. It follows the cut through the calls that treat the axis place by place, back to the
weights, which are cut themselves. A rule says for one kind of call which cuts of its arguments
give a cut of its value; what has no rule cannot be followed. Nor can a value whose memory the
graph writes, or one that is drawn: computed again, it would be another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from torch import fx

from .collectives import share
from .cuts import Cut, Part, Recipe, filled, parts_of
from .effects import written_memory
from .graph import after, call, is_pure, name_of, path_of, shape_of


class Slicer:
    """Slices of the values of one graph for one rank.

    Attributes:
        rank, size: Which of how many.
        fixed: Values that depend on weights only: cut where they stand.
        made: The calls that compute slices.
    """

    def __init__(self, graph: fx.Graph, rank: int, size: int, fixed: frozenset[fx.Node]) -> None:
        self.graph, self.rank, self.size, self.fixed = graph, rank, size, fixed
        self.made: set[fx.Node] = set()
        self._slices: dict[Part, fx.Node] = {}
        self._known: dict[Part, frozenset[fx.Node] | None] = {}
        self._written = written_memory(graph)

    def share(self, cut: Cut) -> tuple[int, int]:
        """Where this rank's places begin and end."""
        low, high = share(cut.length, cut.unit, self.rank, self.size)
        return cut.start + low, cut.start + high

    def reach(self, part: Part) -> frozenset[fx.Node] | None:
        """The weights that a slice takes a share of; None where it cannot be computed."""
        if part not in self._known:
            self._known[part] = self._reach(part)
        return self._known[part]

    def _reach(self, part: Part) -> frozenset[fx.Node] | None:
        if part.of in self.fixed:
            return frozenset((part.of,)) if part.cut.length % part.cut.unit == 0 else None
        step = self._step(part)
        found = [self.reach(p) for p in ([step] if isinstance(step, Part) else parts_of(step))]
        weights = [each for each in found if each is not None]
        whole = step is not None and len(weights) == len(found)
        return frozenset().union(*weights) if whole else None

    def follows(self, value: fx.Node, cut: Cut) -> bool:
        """Whether a slice can be computed from slices of weights, and from whole values."""
        return self.reach(Part(value, cut)) is not None

    def changed(self) -> None:
        """The graph has: what was known of it is asked anew."""
        self._known.clear()

    def slice(self, value: fx.Node, cut: Cut) -> fx.Node:
        """This rank's slice of a value that :meth:`follows`."""
        part = Part(value, cut)
        if part not in self._slices:
            self._slices[part] = self._make(part)
        return self._slices[part]

    def _make(self, part: Part) -> fx.Node:
        value, path = part.of, path_of(part.of)
        if value in self.fixed:
            low, high = self.share(part.cut)
            with after(self.graph, value):
                new = call(self.graph, "narrow", value, part.cut.axis, low, high - low, path=path)
                if part.cut.axis:
                    new = call(self.graph, "contiguous", new, path=path)
            return new
        step = self._step(part)
        assert step is not None, "follows() was not asked"
        if isinstance(step, Part):
            return self.slice(step.of, step.cut)
        args, kwargs = filled((step.args, dict(step.kwargs)), self.slice)
        with after(self.graph, value):
            new = call(self.graph, step.operator, *args, path=path, **kwargs)
        self.made.add(new)
        return new

    def _step(self, part: Part) -> Recipe | Part | None:
        rule = RULES.get(str(name_of(part.of)))
        if rule is None or part.of in self._written or not is_pure(part.of):
            return None
        return rule(self, part.of, part.cut)


def _args(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _sizes(node: object) -> tuple[Any, ...]:
    return shape_of(node) or ()


def _alike(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Equal sizes; symbols by name, so that nothing is assumed of them."""
    return [str(size) for size in one] == [str(size) for size in other]


def _pointwise(slicer: Slicer, node: fx.Node, cut: Cut) -> Recipe | None:
    """Works on each element alone; tensor arguments broadcast from the right."""
    rank = len(_sizes(node))

    def cut_of(arg: Any) -> Any:
        shape = _sizes(arg)
        axis = cut.axis - (rank - len(shape))
        if not isinstance(arg, fx.Node) or axis < 0 or shape[axis] == 1:
            return arg
        return Part(arg, replace(cut, axis=axis))

    return Recipe(str(name_of(node)), tuple(map(cut_of, node.args)), node.kwargs)


def _linear(slicer: Slicer, node: fx.Node, cut: Cut) -> Recipe | None:
    """Rows of the weight give places of the last axis; any other axis is the input's."""
    x, weight, *rest = _args(node)
    if cut.axis < len(_sizes(node)) - 1:
        return Recipe("linear", (Part(x, cut), weight, *rest), node.kwargs)
    rows = replace(cut, axis=0)
    bias = [Part(b, rows) if isinstance(b, fx.Node) else b for b in rest]
    held = all(b in slicer.fixed for b in (weight, *rest) if isinstance(b, fx.Node))
    return Recipe("linear", (x, Part(weight, rows), *bias), node.kwargs) if held else None


def _along_last(slicer: Slicer, node: fx.Node, cut: Cut) -> Recipe | None:
    """Works along the last axis; any other may be cut."""
    if cut.axis >= len(_sizes(node)) - 1:
        return None
    x, *rest = _args(node)
    if name_of(node) == "mean" and tuple(rest) != (-1, True):
        return None
    return Recipe(str(name_of(node)), (Part(x, cut), *rest), node.kwargs)


def _transpose(slicer: Slicer, node: fx.Node, cut: Cut) -> Recipe | None:
    x, *axes = _args(node)
    rank = len(_sizes(node))
    one, other = (axis % rank for axis in axes)
    axis = {one: other, other: one}.get(cut.axis, cut.axis)
    return Recipe("transpose", (Part(x, replace(cut, axis=axis)), *axes), node.kwargs)


def _reshape(slicer: Slicer, node: fx.Node, cut: Cut) -> Recipe | None:
    """The joined heads taken apart, or the heads joined: nothing else moves."""
    source, result, axis = _sizes(node.args[0]), _sizes(node), cut.axis
    wholes = [size for size in (*source[axis:], *result[axis:]) if not isinstance(size, int)]
    if wholes or not _alike(source[:axis], result[:axis]) or cut.length != result[axis]:
        return None
    if len(source) == axis + 1 and source[axis] == prod(result[axis:]):
        inner = cut.scaled(axis, prod(result[axis + 1 :]))
    elif len(result) == axis + 1 and prod(source[axis:]) == result[axis]:
        inside = prod(source[axis + 1 :])
        if cut.unit % inside:
            return None
        inner = Cut(axis, cut.unit // inside, 0, source[axis])
    else:
        return None
    x, *rest = _args(node)
    if rest and isinstance(rest[0], tuple | list):
        low, high = slicer.share(cut)
        sizes = list(rest[0])
        sizes[axis] = sizes[axis] if sizes[axis] == -1 else high - low
        rest = [tuple(sizes)]
    elif name_of(node) != "flatten":
        return None
    return Recipe(str(name_of(node)), (Part(x, inner), *rest), node.kwargs)


def _getitem(slicer: Slicer, node: fx.Node, cut: Cut) -> Recipe | Part | None:
    """A range of the cut axis moves the cut; ranges of others leave it."""
    source, index = _args(node)
    if isinstance(index, int):
        return _piece(source, index, cut)
    if not isinstance(index, tuple) or index[:1] != (...,):
        return None
    ranges = index[1:]
    if not all(isinstance(r, slice) and r.step in (None, 1) for r in ranges):
        return None
    at = cut.axis - (len(_sizes(node)) - len(ranges))
    if at < 0 or ranges[at] == slice(None):
        return Recipe("getitem", (Part(source, cut), index), {})
    whole = _sizes(source)[cut.axis]
    if len(ranges) > 1 or not isinstance(whole, int):
        return None
    start = ranges[at].indices(whole)[0]
    return Part(source, replace(cut, start=cut.start + start))


def _piece(source: Any, index: int, cut: Cut) -> Part | None:
    """One piece of a ``split`` or ``chunk`` along the cut axis."""
    if name_of(source) not in ("split", "chunk") or len(source.args) != 3:
        return None
    x, sizes, axis = _args(source)
    rank = len(_sizes(x))
    whole = _sizes(x)[axis]
    if axis % rank != cut.axis or not isinstance(whole, int):
        return None
    if isinstance(sizes, int):
        width = sizes if name_of(source) == "split" else -(-whole // sizes)
        start = index * width
    else:
        start = sum(sizes[:index])
    return Part(x, replace(cut, start=cut.start + start))


def _cat(slicer: Slicer, node: fx.Node, cut: Cut) -> Recipe | None:
    pieces, axis = _args(node)
    if axis % len(_sizes(node)) == cut.axis:
        return None
    return Recipe("cat", (tuple(Part(piece, cut) for piece in pieces), axis), node.kwargs)


def _attention(slicer: Slicer, node: fx.Node, cut: Cut) -> Recipe | None:
    """Heads are independent: whole groups, or a group's head repeated on several ranks."""
    query, key, value, *rest = _args(node)
    heads, kv_heads = _sizes(query)[1], _sizes(key)[1]
    size = slicer.size
    shared = kv_heads % size == 0 or size % kv_heads == 0
    if cut != Cut(2, 1, 0, heads) or heads % size or not shared:
        return None
    parts = [Part(t, Cut(1, 1, 0, n)) for t, n in ((query, heads), (key, kv_heads))]
    parts.append(Part(value, parts[1].cut))
    sinks = [Part(r, Cut(0, 1, 0, heads)) if isinstance(r, fx.Node) else r for r in rest]
    return Recipe("attention", (*parts, *sinks), node.kwargs)


_POINTWISE = (
    "add sub mul torch_mul truediv neg pow silu relu gelu tanh sigmoid exp rsqrt sqrt to "
    "contiguous abs clamp"
)

Rule = Callable[[Slicer, fx.Node, Cut], "Recipe | Part | None"]

#: How a cut of a call's value comes from cuts of its arguments, by operator.
RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_POINTWISE.split(), _pointwise),
    **dict.fromkeys(("rms_norm", "layer_norm", "softmax", "mean"), _along_last),
    **dict.fromkeys(("view", "reshape", "flatten"), _reshape),
    "linear": _linear,
    "transpose": _transpose,
    "getitem": _getitem,
    "cat": _cat,
    "attention": _attention,
}
