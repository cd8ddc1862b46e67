"""RMSNorm written out becomes one ``rms_norm``; a residual sum feeding a norm joins it."""

from __future__ import annotations

import torch
from torch import fx

from .graph import call, calls, dtype_of, inside, name_of, path_of, sweep
from .pattern import Match
from .rewrite import Context, PassResult, Rule, apply_rule


def _rms_norm(graph: fx.Graph, found: Match) -> fx.Node | None:
    if name_of(found.root) != "mul":
        return None
    x = found["x"]
    narrow = dtype_of(x) != torch.float32
    cast = any(name_of(node) == "to" for node in found.nodes)
    if narrow and not cast:  # computed in the narrow dtype: not what the operator does
        return None
    return call(
        graph, "rms_norm", x, found["weight"], found["eps"], path=path_of(found.root)
    )


def fuse_rms_norm(graph: fx.Graph, context: Context) -> PassResult:
    """Each policy's ``norm`` pattern, anywhere in the graph, where it is an RMSNorm."""
    patterns = {
        id(role.pattern): role.pattern
        for layer in context.layers.values()
        if (role := layer.policy.role("norm"))
    }
    rules = (Rule(pattern, _rms_norm) for pattern in patterns.values())
    return PassResult(sum(apply_rule(graph, rule) for rule in rules))


def fuse_add_norm(graph: fx.Graph, context: Context) -> PassResult:
    """``norm(x + y)`` becomes one operator that also hands out the sum, inside each layer."""
    count = 0
    for norm in calls(graph, "rms_norm", "layer_norm"):
        layer = next((path for path in context.layers if inside(norm, path)), None)
        total = norm.args[0]
        if layer is None or name_of(total) != "add" or not inside(total, layer):
            continue
        x, y = total.args
        if not (isinstance(x, fx.Node) and isinstance(y, fx.Node)):
            continue
        if dtype_of(x) != dtype_of(y) or name_of(norm) == "rms_norm" and len(norm.args) > 3:
            continue
        with graph.inserting_before(total):
            path = path_of(norm)
            pair = call(graph, f"add_{name_of(norm)}", x, y, *norm.args[1:], path=path)
            sums = call(graph, "getitem", pair, 0, path=path)
            normed = call(graph, "getitem", pair, 1, path=path)
        total.replace_all_uses_with(sums)
        norm.replace_all_uses_with(normed)
        sweep(graph)
        count += 1
    return PassResult(count)
