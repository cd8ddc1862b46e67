"""Linear layers that read the same input become one, over stacked weights.

``concat_qkv`` joins the query, key and value projections, ``concat_gate_up`` gate and up. The
stacked weights depend on parameters only, so the hoist pass moves them into the prepare graph.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any as Value

from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from .binding import weight_only, weights_first
from .contract import Context, Pass, PassResult
from .effects import shares_memory, written_memory
from .graph import (
    call,
    dtype_of,
    fake_values,
    name_of,
    order,
    owner_of,
    same_size,
    shape_of,
    sweep,
    value_of,
)
from .layers import nodes_by_layer
from .pattern import Match, NoMatch
from .rewrite import reads_written
from .roles import find_role


def _unlike(found: Sequence[Match], written: set[fx.Node]) -> NoMatch | None:
    """Why several linear layers cannot become one, or ``None``."""
    first = found[0]
    for match in found[1:]:
        if match["x"] is not first["x"]:
            return NoMatch(match.root.name, f"the input {first['x'].name}", match["x"].name)
        if (match["bias"] is None) != (first["bias"] is None):
            return NoMatch(match.root.name, "a bias on all of them or on none", "some")
        if dtype_of(match["weight"]) != dtype_of(first["weight"]):
            kinds = str(dtype_of(first["weight"])), str(dtype_of(match["weight"]))
            return NoMatch(match.root.name, f"weights of {kinds[0]}", kinds[1])
    if shared := next((m for m in found if reads_written(m, written)), None):
        return NoMatch(shared.root.name, "values that nothing writes in place", "a write")
    rows = _rows(found)
    if not all(isinstance(size, int) for size in rows):
        return NoMatch(first.root.name, "weights of known sizes", str(rows))
    return None


def _rows(found: Sequence[Match]) -> list[object]:
    return [(shape_of(match["weight"]) or (None,))[0] for match in found]


def _joined(
    graph: fx.Graph, found: Sequence[Match], place: dict[fx.Node, int], roles: Sequence[str]
) -> fx.Node | NoMatch:
    """One linear in place of several; each old one becomes a slice of it."""
    roots = [match.root for match in found]
    weights, biases = [m["weight"] for m in found], [m["bias"] for m in found]
    early = min(roots, key=place.__getitem__)
    for weight in (*weights, *biases):
        if weight is not None and place[weight] > place[early]:
            return NoMatch(weight.name, "weights that do not depend on the tokens", weight.name)
    path = owner_of(roots)
    with graph.inserting_before(early):
        weight = call(graph, "concat_rows", *weights, path=path)
        bias = None if biases[0] is None else call(graph, "concat_rows", *biases, path=path)
        joined = call(graph, "linear", found[0]["x"], weight, bias, path=path)
        parts = call(graph, "split", joined, _rows(found), -1, path=path)
        slices = [call(graph, "getitem", parts, i, path=path) for i in range(len(found))]
    for old, new in zip(roots, slices, strict=True):
        if not _views_fit(old, value_of(new)):
            for added in (*reversed(slices), parts, joined, bias, weight):
                if added is not None:
                    graph.erase_node(added)
            return NoMatch(old.name, "views that a slice of a wider product allows", "view")
    joined.meta["stack"] = roles
    for old, new in zip(roots, slices, strict=True):
        old.replace_all_uses_with(new)
    return joined


def _views_fit(node: fx.Node, val: Value) -> bool:
    """Whether every view of ``node`` is one of ``val`` as well: the rows of a slice lie apart."""
    if not isinstance(val, FakeTensor):
        return True
    for user in node.users:
        if not shares_memory(user) or _splits_last(user, node):
            continue
        args, kwargs = fx.map_arg(
            (user.args, user.kwargs), lambda n: val if n is node else value_of(n)
        )
        try:
            with fake_values(val.fake_mode):
                view = user.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, ValueError):  # fake tensors raise the second
            return False
        if not _views_fit(user, view):
            return False
    return True


def _splits_last(view: fx.Node, source: fx.Node) -> bool:
    """Whether a view only cuts the last axis into heads, and no view is taken of what it gives."""
    shape, before = shape_of(view), shape_of(source)
    if name_of(view) != "view" or shape is None or before is None or len(shape) < len(before):
        return False
    deeper = [view]
    while deeper:
        users = deeper.pop().users
        if any(name_of(user) in ("view", "view_as") for user in users):
            return False
        deeper += [user for user in users if shares_memory(user)]
    return all(map(same_size, before[:-1], shape[: len(before) - 1]))


def _on_tokens(found: Sequence[Match], fixed: Container[fx.Node]) -> Match:
    """The first match that reads tokens: adapters also multiply weights with one another."""
    return next((match for match in found if match["x"] not in fixed), found[0])


def _join_roles(graph: fx.Graph, context: Context, roles: Sequence[str]) -> PassResult:
    count, misses = 0, []
    alike: dict[str, list[Match]] = {}
    fixed, written = weight_only(graph), written_memory(graph)
    nodes = nodes_by_layer(graph, context.layers)
    for path, layer in context.layers.items():
        wanted = [layer.policy.role(name) for name in roles]
        if any(role is None for role in wanted):
            continue
        if any(node.meta.get("stack") == roles for node in nodes[path]):
            continue  # what else these roles find now are the factors of adapters
        found = [find_role(graph, role, path, nodes[path]) for role in wanted if role is not None]
        failure = next((f for f in found if isinstance(f, NoMatch)), None)
        if failure is None:
            alike[path] = [_on_tokens(f, fixed) for f in found if not isinstance(f, NoMatch)]
            failure = _unlike(alike[path], written)
        if failure is not None:
            alike.pop(path, None)
            misses.append((path, failure))
    if alike:
        weights_first(graph)
        place = order(graph)
    for path, matches in alike.items():
        result = _joined(graph, matches, place, roles)
        if isinstance(result, NoMatch):
            misses.append((path, result))
        else:
            count += 1
    if count:
        weights_first(graph)  # the last layer's stacks too: like layers stay alike
        sweep(graph)
    return PassResult(count, tuple(misses))


def concat_qkv(graph: fx.Graph, context: Context) -> PassResult:
    """One product for the roles ``q``, ``k`` and ``v`` of each layer."""
    return _join_roles(graph, context, ("q", "k", "v"))


def concat_gate_up(graph: fx.Graph, context: Context) -> PassResult:
    """One product for the roles ``gate`` and ``up`` of each layer."""
    return _join_roles(graph, context, ("gate", "up"))


_STACKS = frozenset({"concat_rows", "split", "getitem"})

CONCAT_QKV = Pass(
    "concat_qkv",
    concat_qkv,
    provides=frozenset({"qkv_stacked"}),
    may_add=_STACKS,
    modes=frozenset({"inference", "training"}),
)
CONCAT_GATE_UP = Pass(
    "concat_gate_up",
    concat_gate_up,
    provides=frozenset({"gate_up_stacked"}),
    conflicts=frozenset({"mlp_fused"}),
    may_add=_STACKS,
    modes=frozenset({"inference", "training"}),
)
