"""Compute the logits of the last tokens only: slice before the vocabulary projection."""

from __future__ import annotations

import torch
from torch import fx

from .contract import Context, Pass, PassResult
from .graph import call, fresh_input, name_of, path_of, shape_of
from .layers import ATTENTION
from .pattern import NoMatch

#: What may stand between the projection and the output: it works on each value alone.
_POINTWISE = ("truediv", "mul", "tanh", "to", "contiguous", "getitem", "add")


def _each_alone(node: fx.Node) -> bool:
    """Whether a call gives each token's logits from that token's logits alone."""
    if name_of(node) == "all_gather":
        return True
    if name_of(node) not in _POINTWISE or not node.args or node.kwargs:
        return False
    source, *rest = node.args
    if not isinstance(source, fx.Node):
        return False
    wide = len(shape_of(source) or ()) > 2  # [B, T, ...]: the last axis is not that of the tokens
    if name_of(node) == "getitem":  # logits[..., :v] keeps all tokens
        index = rest[0] if isinstance(rest[0], tuple) else (rest[0],)
        whole = (slice(None), slice(None, None, 1), slice(0, None), slice(0, None, 1))
        lead = index[:2] if index[:1] != (...,) else ()
        tail = index[len(lead) :] if lead else index[1:]
        plain = all(isinstance(part, int | slice) for part in tail)
        return wide and plain and all(part in whole for part in lead) and len(tail) <= 1
    others = [s for s in rest if isinstance(s, fx.Node)]
    shapes = [shape_of(other) for other in others]
    return all(shape is not None and len(shape) <= wide for shape in shapes)


def projection(node: object) -> fx.Node | None:
    """The linear that gives the logits, where nothing but the output sees what it gives."""
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if name_of(node) in ("linear", "packed_linear"):
            source = node.args[0]
            tokens = len(shape_of(source) or ()) == 3 and name_of(source) not in ATTENTION
            return node if tokens else None
        if not _each_alone(node):
            return None
        node = node.args[0]
    return None


def _over_tokens(result: object, graph: fx.Graph) -> bool:
    """Whether the second axis of a result may be that of the tokens: in a graph that serves every
    number of them it is symbolic."""
    shape = shape_of(result)
    if shape is None or len(shape) < 2:
        return False
    inputs = (shape_of(node) or () for node in graph.nodes if node.op == "placeholder")
    dynamic = any(isinstance(size, torch.SymInt) for sizes in inputs for size in sizes)
    return isinstance(shape[1], torch.SymInt) or not dynamic


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
    if not _over_tokens(node, graph):
        shape = shape_of(node)
        found = "several" if isinstance(node, tuple | list) else str(shape and list(shape))
        return PassResult(0, (("", NoMatch(output.name, "one result [B, T, ...]", found)),))
    head = projection(node)
    keep = fresh_input(graph, "keep")
    if head is not None:
        source = head.args[0]
        with graph.inserting_before(head):
            kept = call(graph, operator, source, keep, path=path_of(head))
        kept.meta["val"] = source.meta.get("val")
        head.update_arg(0, kept)
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
