"""Compute the logits of the last tokens only: slice before the vocabulary projection."""

from __future__ import annotations

from torch import fx

from .contract import Context, Pass, PassResult
from .graph import call, fresh_input, name_of, path_of, shape_of
from .layers import ATTENTION

#: What may stand between the projection and the output: it works on each value alone.
_POINTWISE = ("truediv", "mul", "tanh", "to", "contiguous", "getitem", "add")


def _each_alone(node: fx.Node) -> bool:
    """Whether a call gives each token's logits from that token's logits alone."""
    source, *rest = node.args
    if name_of(node) == "all_gather":
        return True
    if name_of(node) not in _POINTWISE or not isinstance(source, fx.Node) or node.kwargs:
        return False
    if name_of(node) == "getitem":  # logits[..., :v] keeps all tokens
        index = rest[0] if isinstance(rest[0], tuple) else (rest[0],)
        whole = (slice(None), slice(None, None, 1), slice(0, None), slice(0, None, 1))
        lead = index[:2] if index[:1] != (...,) else ()
        tail = index[len(lead) :] if lead else index[1:]
        return all(part in whole for part in lead) and len(tail) <= 1
    others = [s for s in rest if isinstance(s, fx.Node)]
    return all(len(shape_of(other) or (0, 0)) <= 1 for other in others)


def projection(node: object) -> fx.Node | None:
    """The linear that gives the logits, where nothing but the output sees what it gives."""
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if name_of(node) == "linear":
            source = node.args[0]
            tokens = len(shape_of(source) or ()) == 3 and name_of(source) not in ATTENTION
            return node if tokens else None
        if not _each_alone(node):
            return None
        node = node.args[0]
    return None


def keep_last_tokens(graph: fx.Graph, context: Context) -> PassResult:
    """Slice the input of the final linear to the last ``keep`` tokens.

    Where the output is not a linear under pointwise operations, the whole output is sliced.
    """
    return _keep(graph, "last_tokens")


def keep_selected_tokens(graph: fx.Graph, context: Context) -> PassResult:
    """The same for training: ``keep`` means what ``logits_to_keep`` means to the model."""
    return _keep(graph, "select_tokens")


def _keep(graph: fx.Graph, operator: str) -> PassResult:
    output = next(node for node in graph.nodes if node.op == "output")
    node = output.args[0]
    if any(name_of(n) in ("last_tokens", "select_tokens") for n in graph.nodes):
        return PassResult(0)
    found = projection(node)
    keep = fresh_input(graph, "keep")
    if found is not None:
        source = found.args[0]
        with graph.inserting_before(found):
            kept = call(graph, operator, source, keep, path=path_of(found))
        kept.meta["val"] = source.meta.get("val")
        found.update_arg(0, kept)
    else:
        with graph.inserting_before(output):
            kept = call(graph, operator, node, keep, path="")
        output.args = (kept,)
    return PassResult(1)


KEEP_LAST_TOKENS = Pass(
    "keep_last_tokens",
    keep_last_tokens,
    provides=frozenset({"last_tokens"}),
    may_add=frozenset({"last_tokens"}),
    inputs=frozenset({"keep"}),
)

KEEP_SELECTED_TOKENS = Pass(
    "keep_selected_tokens",
    keep_selected_tokens,
    provides=frozenset({"last_tokens"}),
    may_add=frozenset({"select_tokens"}),
    modes=frozenset({"training"}),
    inputs=frozenset({"keep"}),
)
