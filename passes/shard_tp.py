"""Tensor parallelism: each rank computes its share of the heads, the MLP and the vocabulary.

A linear over a value of which a rank can compute its slice alone becomes that rank's part of the
sum, followed by one ``all_reduce`` (Shoeybi et al. 2019). Which values those are is not listed by
family: :mod:`.slicing` follows a slice back through what computes it, down to the weights. What
cannot be followed stays whole on every rank, as it was. Of two linears in a row, one alone can be
cut: that whose slice reaches more weights, so that a low-rank branch splits what it reads.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from torch import fx

from .binding import weight_only
from .contract import Context, Pass, PassResult
from .cuts import Cut, Part
from .graph import after, call, calls, fresh_input, path_of, shape_of, sweep
from .last_tokens import projection
from .pattern import NoMatch
from .slicing import Slicer


def _heads(graph: fx.Graph) -> tuple[int, ...]:
    """The sizes of the value heads, each once: what the joined heads may be cut at."""
    sizes = (shape_of(node.args[2]) for node in calls(graph, "attention"))
    return tuple(dict.fromkeys(int(shape[3]) for shape in sizes if shape is not None))


def _cut(node: fx.Node, slicer: Slicer, units: tuple[int, ...]) -> Cut | None:
    """Which slice of the input of ``linear(x, w, b)`` a rank can compute."""
    x, weight, *_ = node.args
    width = (shape_of(weight) or (None, None))[-1]
    if not isinstance(x, fx.Node) or not isinstance(width, int) or weight not in slicer.fixed:
        return None
    last = len(shape_of(x) or ()) - 1
    # of a sum, each rank takes terms of its own
    cuts = (Cut(last, u, 0, width) for u in units if width % u == 0 and width // u >= slicer.size)
    return next((cut for cut in cuts if slicer.follows(x, cut)), None)


def _spared(node: fx.Node, slicer: Slicer, units: tuple[int, ...]) -> int:
    """Elements of weights that ranks share once ``node`` is cut."""
    cut, (x, weight, *_) = _cut(node, slicer, units), node.args
    reached = slicer.reach(Part(x, cut)) if cut and isinstance(x, fx.Node) else None
    return 0 if reached is None else sum(prod(shape_of(w) or ()) for w in {weight, *reached})


def _partial(graph: fx.Graph, node: fx.Node, slicer: Slicer, units: tuple[int, ...]) -> bool:
    """Turn ``linear(x, w, b)`` into ``all_reduce(linear(x_r, w_r)) + b`` where x_r is at hand."""
    x, weight, *bias = node.args
    cut = _cut(node, slicer, units)
    if cut is None or not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return False
    local, path = slicer.slice(x, cut), path_of(node)
    columns = slicer.slice(weight, replace(cut, axis=1))
    with after(graph, node):
        part = call(graph, "linear", local, columns, None, path=path)
        total = call(graph, "all_reduce", part, fresh_input(graph, "group"), path=path)
        total.meta["val"] = part.meta["val"]
        if bias and isinstance(bias[0], fx.Node):
            total = call(graph, "add", total, bias[0], path=path)
    node.replace_all_uses_with(total)
    slicer.changed()
    return True


def _vocabulary(graph: fx.Graph, slicer: Slicer) -> bool:
    """Let each rank compute the logits of its part of the vocabulary, and gather them."""
    found = projection(next(n for n in graph.nodes if n.op == "output").args[0])
    shape = shape_of(found)
    if found is None or shape is None or not isinstance(shape[-1], int):
        return False
    cut = Cut(len(shape) - 1, 1, 0, shape[-1])
    if shape[-1] < slicer.size or not slicer.follows(found, cut):
        return False
    local = slicer.slice(found, cut)
    with after(graph, local):
        whole = call(
            graph,
            "all_gather",
            local,
            shape[-1],
            slicer.size,
            fresh_input(graph, "group"),
            path=path_of(found),
        )
    whole.meta["val"] = found.meta["val"]
    found.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not local)
    return True


def shard_tp(graph: fx.Graph, context: Context) -> PassResult:
    """Cut the graph for rank ``context.shard[0]`` of ``context.shard[1]``; one rank is no cut."""
    rank, size = context.shard
    if size == 1 or calls(graph, "all_reduce", "all_gather"):
        return PassResult(0)
    units = (1, *_heads(graph))
    slicer = Slicer(graph, rank, size, frozenset(weight_only(graph)))
    count = int(_vocabulary(graph, slicer))
    linears = [node for node in reversed(calls(graph, "linear")) if node not in slicer.fixed]
    spared = {node: _spared(node, slicer, units) for node in linears}
    for node in sorted(linears, key=lambda node: -spared[node]):
        if node.users:
            count += _partial(graph, node, slicer, units)
    sweep(graph)
    whole = [node for node in calls(graph, "attention") if node not in slicer.made]
    misses = [(path_of(node), _unshared(node, size)) for node in whole]
    return PassResult(count, tuple(misses))


def _unshared(attention: fx.Node, size: int) -> NoMatch:
    """Why an attention stays whole."""
    heads = (shape_of(attention.args[0]) or (0, "?"))[1]
    return NoMatch(attention.name, f"heads that {size} ranks share", f"{heads} heads")


SHARD_TP = Pass(
    "shard_tp",
    shard_tp,
    provides=frozenset({"sharded"}),
    conflicts=frozenset({"qkv_stacked", "gate_up_stacked", "mlp_fused", "threaded", "last_tokens"}),
    may_add=frozenset({"*"}),
    inputs=frozenset({"group"}),
)
