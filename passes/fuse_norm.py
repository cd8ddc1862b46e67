"""RMSNorm written out becomes one ``rms_norm``; a residual sum feeding a norm joins it."""

from __future__ import annotations

import torch
from torch import fx

from .binding import weights_first
from .contract import Context, Pass, PassResult
from .effects import written_memory
from .graph import call, calls, dtype_of, inside, name_of, order, path_of, sweep
from .pattern import Match
from .rewrite import Rule, apply_rule


def _rms_norm(graph: fx.Graph, found: Match) -> fx.Node | None:
    """The operator computes in float32 and rounds to x's dtype before the weight; so must this."""
    root = found.root
    if name_of(root) != "mul" or not {"x", "weight", "eps"} <= found.bindings.keys():
        return None  # an rms_norm already, or a norm of another kind
    x = found["x"]
    normed = next((arg for arg in root.args if arg is not found["weight"]), None)
    if dtype_of(normed) != dtype_of(x):
        return None
    rounding = {root, normed} if name_of(normed) == "to" else {root}
    if any(dtype_of(node) != torch.float32 for node in found.nodes if node not in rounding):
        return None
    return call(graph, "rms_norm", x, found["weight"], found["eps"], path=path_of(root))


def fuse_rms_norm(graph: fx.Graph, context: Context) -> PassResult:
    """Each policy's ``norm`` pattern, anywhere in the graph, where it is an RMSNorm."""
    patterns = {
        id(role.pattern): role.pattern
        for layer in context.layers.values()
        if (role := layer.policy.role("norm"))
    }
    rules = (Rule(pattern, _rms_norm) for pattern in patterns.values())
    return PassResult(sum(apply_rule(graph, rule) for rule in rules))


#: How many arguments a norm has that gives all of them, but no offset of the weight.
_ARGUMENTS = {"rms_norm": 3, "layer_norm": 5}


def _summed(norm: fx.Node, context: Context, written: set[fx.Node]) -> fx.Node | None:
    """The sum that feeds a norm of the same layer, where the two may become one."""
    total = norm.args[0]
    layer = next((path for path in context.layers if inside(norm, path)), None)
    if layer is None or name_of(total) != "add" or not inside(total, layer):
        return None
    if not context.wants("fuse_add_norm", context.layers[layer]):
        return None
    if len(norm.args) != _ARGUMENTS[str(name_of(norm))] or norm.kwargs or total.kwargs:
        return None
    x, y = total.args
    if not (isinstance(x, fx.Node) and isinstance(y, fx.Node)) or dtype_of(x) != dtype_of(y):
        return None
    assert isinstance(total, fx.Node)
    return None if written & {x, y, total, norm, *norm.all_input_nodes} else total


def fuse_add_norm(graph: fx.Graph, context: Context) -> PassResult:
    """``norm(x + y)`` becomes one operator that also hands out the sum, inside each layer."""
    count = 0
    weights_first(graph)
    written = written_memory(graph)
    for norm in calls(graph, "rms_norm", "layer_norm"):
        total = _summed(norm, context, written)
        if total is None:
            continue
        place = order(graph)
        if any(place[s] > place[total] for s in norm.all_input_nodes):
            continue  # a norm whose weight is computed from the tokens
        with graph.inserting_before(total):
            path = path_of(norm)
            pair = call(graph, f"add_{name_of(norm)}", *total.args, *norm.args[1:], path=path)
            sums = call(graph, "getitem", pair, 0, path=path)
            normed = call(graph, "getitem", pair, 1, path=path)
        total.replace_all_uses_with(sums)
        norm.replace_all_uses_with(normed)
        sweep(graph)
        count += 1
    return PassResult(count)


FUSE_RMS_NORM = Pass(
    "fuse_rms_norm",
    fuse_rms_norm,
    provides=frozenset({"rms_norms_fused"}),
    conflicts=frozenset({"add_norms_fused"}),
    may_add=frozenset({"rms_norm"}),
    exact=True,
    modes=frozenset({"inference", "training"}),
)
FUSE_ADD_NORM = Pass(
    "fuse_add_norm",
    fuse_add_norm,
    provides=frozenset({"add_norms_fused"}),
    may_add=frozenset({"add_rms_norm", "add_layer_norm", "getitem"}),
    exact=True,
    modes=frozenset({"inference", "training"}),
)
