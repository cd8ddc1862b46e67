"""Disturbances: writes, aliases, shared users and dead code at any place of a finished graph.

A pass that is right on a graph must stay right beside them: it declines, or keeps the order.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from torch import fx

from ..passes.effects import bases
from ..passes.graph import call, path_of, shape_of, value_of
from ..passes.operators import OPERATORS
from ..passes.pipeline import copy_graph
from .draft import is_float, sizes_of
from .example import Example
from .run import run

#: In-place operator -> its further arguments; ``...`` is another value of the same shape.
_WRITES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("add_", (1.0,)),
    ("mul_", (0.5,)),
    ("neg_", ()),
    ("fill_", (0.25,)),
    ("relu_", ()),
    ("copy_", (...,)),
    ("add_", (...,)),
    ("mul_", (...,)),
    ("sub_", (...,)),
)
_VIEWS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("transpose", (0, -1)),
    ("getitem", ((..., slice(0, 1)),)),
    ("detach", ()),
    ("pos", ()),
    ("unsqueeze", (0,)),
)
#: So many calls behind its target at most a disturbance stands; passes look at few calls at once.
_NEAR = 12
_KINDS = ("read", "write", "view", "write view", "output", "dead")


def _choose(draw: st.DrawFn, options: Any) -> Any:
    options = list(options)
    return options[draw(st.integers(0, len(options) - 1))] if options else None


def _parameter(node: fx.Node) -> bool:
    return any(base.meta.get("parameter") for base in bases(node))


def _write(
    draw: st.DrawFn, graph: fx.Graph, target: fx.Node, known: list[fx.Node], path: str
) -> fx.Node | None:
    """An in-place call at the insert point; later readers may be given its result."""
    name, rest = _choose(draw, _WRITES)
    if rest == (...,):
        alike = [n for n in known if sizes_of(n) == sizes_of(target) and is_float(n)]
        rest = (_choose(draw, alike),)
        if rest[0] is None:
            return None
    node = graph.call_function(OPERATORS[name], (target, *rest))
    node.meta |= {"path": path, "val": value_of(target)}
    return node


def _disturb(draw: st.DrawFn, example: Example) -> Example | None:
    graph = copy_graph(example.graph)
    nodes = list(graph.nodes)
    output = nodes[-1]
    last = max(i for i, node in enumerate(nodes) if node.op == "placeholder")
    found = [n for n in nodes if is_float(n) and shape_of(n)]
    held = [n for n in found if n.op == "placeholder" and not n.meta.get("parameter")]
    whose: bool = draw(st.booleans())
    target = _choose(draw, held if held and whose else found)
    if target is None:
        return None
    first = max(nodes.index(target), last) + 1
    at = draw(st.integers(first, min(first + _NEAR, len(nodes) - 1)))
    here, path = nodes[at], path_of(nodes[at]) or path_of(target)
    known = [n for n in nodes[:at] if is_float(n)]
    kind = _choose(draw, _KINDS)
    if "write" in kind and _parameter(target):
        return None
    results: list[fx.Node] = []
    with graph.inserting_before(here):
        if kind == "output":
            results = [target]
        elif kind in ("read", "dead"):
            node = call(graph, "neg", target, path=path)
            results = [node] if kind == "read" else []
        else:
            if "view" in kind:
                name, rest = _choose(draw, _VIEWS)
                target = call(graph, name, target, *rest, path=path)
                results = [target]
            if "write" in kind:
                written = _write(draw, graph, target, known, path)
                if written is None:
                    return None
                if draw(st.booleans()):
                    late = set(nodes[at:])
                    target.replace_all_uses_with(written, delete_user_cb=lambda user: user in late)
                results = [written, *results]
    shown: bool = draw(st.booleans())
    if results and shown:
        old = output.args[0]
        output.args = ((*old, results[0]) if isinstance(old, tuple) else (old, results[0]),)
    return _working(example, graph)


def _working(example: Example, graph: fx.Graph) -> Example | None:
    """The example with another graph, where that runs at every size."""
    made = Example(
        graph, example.context, example.seed, example.sizes, example.limits, example.shared
    )
    try:
        weights = made.weights()
        for size in made.sizes:
            run(graph, weights, made.inputs(size))
    except (RuntimeError, IndexError):  # a write into expanded memory, a view that cannot be
        return None
    return made


def disturbed(draw: st.DrawFn, example: Example, most: int = 3) -> Example:
    """The example with up to ``most`` disturbances that leave it running."""
    for _ in range(draw(st.integers(0, most))):
        example = _disturb(draw, example) or example
    return example
