"""The two linear layers of an MLP and what lies between them become one operator."""

from __future__ import annotations

from torch import fx

from .contract import Context, Pass, PassResult
from .effects import written_memory
from .graph import call, dtype_of, name_of, path_of, same_shape, shape_of, sweep
from .layers import nodes_by_layer
from .pattern import Match, NoMatch
from .rewrite import safe_to_replace
from .roles import find_role


def _kind(found: Match) -> str | None:
    """The activation in the match: silu, relu, gelu or gelu_tanh."""
    names = {name_of(node) for node in found.nodes}
    if "tanh" in names or any("tanh" in node.kwargs.values() for node in found.nodes):
        return "gelu_tanh"
    return next((kind for kind in ("silu", "relu", "gelu") if kind in names), None)


def _halves(parts: fx.Node) -> bool:
    """Whether a call cuts the last axis into two equal parts."""
    if len(parts.args) != 3 or parts.args[2] != -1:
        return False
    if name_of(parts) == "chunk":
        return bool(parts.args[1] == 2)
    sizes = parts.args[1]
    equal = isinstance(sizes, tuple | list) and len(sizes) == 2 and sizes[0] == sizes[1]
    return name_of(parts) == "split" and equal


def _written(written: set[fx.Node], *first: fx.Node) -> NoMatch | None:
    """The fused operator reads what the first linears read, but where the last one stands."""
    for node in first:
        if written & {node, *node.all_input_nodes}:
            return NoMatch(node.name, "values that nothing writes in place", "a write")
    return None


def _gated(graph: fx.Graph, found: Match, kind: str, written: set[fx.Node]) -> fx.Node | NoMatch:
    gate, up = found["a"], found["up"]
    if name_of(gate) == name_of(up) == "linear" and gate.args[0] is up.args[0]:
        return _split_gated(graph, found, kind, written)
    parts = gate.args[0] if name_of(gate) == "getitem" else None
    expected = "gate and up as the halves of one linear (concat_gate_up)"
    if parts is None or name_of(up) != "getitem" or up.args != (parts, 1) or gate.args[1] != 0:
        return NoMatch(gate.name, expected, name_of(gate) or gate.op)
    if not _halves(parts) or name_of(parts.args[0]) != "linear":
        return NoMatch(parts.name, expected, name_of(parts) or parts.op)
    joined = parts.args[0]
    inner = {*found.nodes, parts, gate, up}
    if any(user not in inner for node in (joined, parts, gate, up) for user in node.users):
        return NoMatch(joined.name, "gate and up used by the MLP alone", "another user")
    if (late := _written(written, joined)) is not None:
        return late
    x, weight, bias = joined.args
    down = (found["down"], found["down_bias"])
    return call(graph, "gated_mlp", x, weight, bias, *down, kind, path=path_of(found.root))


def _split_gated(
    graph: fx.Graph, found: Match, kind: str, written: set[fx.Node]
) -> fx.Node | NoMatch:
    gate, up = found["a"], found["up"]
    if shared := next((n for n in (gate, up) if set(n.users) - set(found.nodes)), None):
        return NoMatch(shared.name, "gate and up used by the MLP alone", "another user")
    if dtype_of(gate) != dtype_of(up) or not same_shape(shape_of(gate), shape_of(up)):
        return NoMatch(up.name, f"the dtype and shape of {gate.name}", "others")
    if (late := _written(written, gate, up)) is not None:
        return late
    pieces = (*gate.args, *up.args[1:], found["down"], found["down_bias"])
    return call(graph, "split_gated_mlp", *pieces, kind, path=path_of(found.root))


def _plain(graph: fx.Graph, found: Match, kind: str, written: set[fx.Node]) -> fx.Node | NoMatch:
    up = found["a"]
    inner = set(found.nodes)
    if name_of(up) != "linear":
        return NoMatch(up.name, "a linear up projection", name_of(up) or up.op)
    if any(user not in inner for user in up.users):
        return NoMatch(up.name, "an up projection used by the MLP alone", "another user")
    if (late := _written(written, up)) is not None:
        return late
    x, weight, bias = up.args
    down = (found["down"], found["down_bias"])
    return call(graph, "plain_mlp", x, weight, bias, *down, kind, path=path_of(found.root))


def fuse_mlp(graph: fx.Graph, context: Context) -> PassResult:
    """The role ``mlp`` of each layer becomes one operator of :mod:`.kernels`."""
    count, misses = 0, []
    sweep(graph)  # a dead reader is no user
    written = written_memory(graph)
    nodes = nodes_by_layer(graph, context.layers)
    for path, layer in context.layers.items():
        role = layer.policy.role("mlp")
        if role is None or not context.wants("fuse_mlp", layer):
            continue
        found = find_role(graph, role, path, nodes[path])
        if isinstance(found, NoMatch):
            misses.append((path, found))
            continue
        match = found[0]
        kind = _kind(match)
        alone = safe_to_replace(match)
        if kind is None or not alone:
            misses.append((path, NoMatch(match.root.name, "an MLP of its own", "shared values")))
            continue
        with graph.inserting_before(match.root):
            build = _gated if "up" in match.bindings else _plain
            new = build(graph, match, kind, written)
        if isinstance(new, NoMatch):
            misses.append((path, new))
            continue
        match.root.replace_all_uses_with(new)
        count += 1
    if count:
        sweep(graph)
    return PassResult(count, tuple(misses))


#: Not in training: the activations write over what a backward pass reads.
FUSE_MLP = Pass(
    "fuse_mlp",
    fuse_mlp,
    provides=frozenset({"mlp_fused"}),
    may_add=frozenset({"gated_mlp", "split_gated_mlp", "plain_mlp"}),
)
