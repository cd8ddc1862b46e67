"""Compute the logits of the last tokens only: slice before the vocabulary projection."""

from __future__ import annotations

from torch import fx

from .graph import call, fresh_input, name_of, path_of
from .layers import ATTENTION
from .rewrite import Context, PassResult

#: What may stand between the projection and the output: it works on each value alone.
_POINTWISE = ("truediv", "mul", "tanh", "to", "getitem", "add")


def keep_last_tokens(graph: fx.Graph, context: Context) -> PassResult:
    """Slice the input of the final linear to the last ``keep`` tokens.

    Where the output is not a linear under pointwise operations, the whole output is sliced.
    """
    output = next(node for node in graph.nodes if node.op == "output")
    node = output.args[0]
    if any(name_of(n) == "last_tokens" for n in graph.nodes):
        return PassResult(0)
    found = node
    while name_of(found) in _POINTWISE and isinstance(found.args[0], fx.Node):
        found = found.args[0]
    keep = fresh_input(graph, "keep")
    if name_of(found) == "linear" and name_of(found.args[0]) not in ATTENTION:
        source = found.args[0]
        with graph.inserting_before(found):
            kept = call(graph, "last_tokens", source, keep, path=path_of(found))
        kept.meta["val"] = source.meta.get("val")
        found.update_arg(0, kept)
    else:
        with graph.inserting_before(output):
            kept = call(graph, "last_tokens", node, keep, path="")
        output.args = (kept,)
    return PassResult(1)
