"""One spelling for every operation, so that one pattern covers many ways to write it.

Calls are spelled first (:mod:`.spelling`), then freed of in-place writes where that is sound
(:mod:`.functionalize`). Rules by canonical name follow; each returns the node that stands for the
old one, or ``None`` to leave it: what does nothing goes, such as casts to the same dtype, dropout
that is off and scopes that change nothing. Every value stays as it was, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .contract import ANY, Context, Pass, PassResult
from .effects import QUIET, written_memory
from .functionalize import functionalize
from .grad_scopes import detach_scopes, is_switch
from .graph import (
    call,
    dtype_of,
    name_of,
    path_of,
    same_shape,
    same_size,
    shape_of,
    sweep,
    value_of,
)
from .operators import operator_name
from .spelling import arrange, spell


def _drop_scope(node: fx.Node) -> bool:
    """Scopes and checks that leave the values alone: autocast switched off, grad mode, asserts."""
    text = getattr(node.target, "__name__", str(node.target))
    if text == "requires_grad_":  # left by enable_input_require_grads(); without effect in eval
        node.replace_all_uses_with(node.args[0])
        return True
    if text == "_enter_autocast" and len(node.args) > 2 and node.args[2] is False:
        leave = next((u for u in node.users if "_exit_autocast" in str(u.target)), None)
        if leave is not None:
            node.graph.erase_node(leave)
        return not node.users
    return is_switch(node) or text in QUIET


def _to(graph: fx.Graph, node: fx.Node) -> Any:
    source, current = node.args[0], dtype_of(node)
    wanted = dtype_of(source)
    if wanted is None or current is None:
        return None
    moved = value_of(source).device != value_of(node).device
    copied = node.kwargs.get("copy") or any(a is True for a in node.args[2:])
    if current == wanted and not moved and not copied:
        return source
    if moved or copied or (node.args[1:] == (current,) and not node.kwargs):
        return None
    return call(graph, "to", source, current, path=path_of(node))


def _dropout(graph: fx.Graph, node: fx.Node) -> Any:
    training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
    rate = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
    return node.args[0] if training is False or rate == 0 else None


def _embedding(graph: fx.Graph, node: fx.Node) -> Any:
    names = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    options = dict(zip(names, node.args[2:], strict=False)) | dict(node.kwargs)
    if not options or options.get("max_norm") is not None:
        return None
    return call(graph, "embedding", *node.args[:2], path=path_of(node))


def _linear(graph: fx.Graph, node: fx.Node) -> Any:
    if len(node.args) != 2 or node.kwargs:
        return None
    return call(graph, "linear", *node.args, None, path=path_of(node))


def _matmul(graph: fx.Graph, node: fx.Node) -> Any:
    """A product with a matrix is a linear over the matrix turned, by torch's own definition."""
    x, matrix = node.args
    sizes, shape = shape_of(x), shape_of(matrix)
    if sizes is None or shape is None or len(shape) != 2 or len(sizes) < 2 or node.kwargs:
        return None
    turned = operator_name(getattr(matrix, "target", None)) == "t"
    weight = matrix.args[0] if turned else call(graph, "t", matrix, path=path_of(node))
    return call(graph, "linear", x, weight, None, path=path_of(node))


def _times(graph: fx.Graph, node: fx.Node) -> Any:
    """A factor of one changes no value; where it changes no dtype either, it goes."""
    for value, factor in (node.args, node.args[::-1]):
        if type(factor) in (int, float) and factor == 1 and isinstance(value, fx.Node):
            return value if dtype_of(value) == dtype_of(node) else None
    return None


def _getitem(graph: fx.Graph, node: fx.Node) -> Any:
    """A slice that takes everything goes."""
    source, index = node.args
    whole = (slice(None), slice(0, None), slice(None, None, 1), slice(0, None, 1), ...)
    parts = index if isinstance(index, tuple) else (index,)
    if shape_of(source) is None or not parts:
        return None
    return source if all(any(part == w for w in whole) for part in parts) else None


def _view(graph: fx.Graph, node: fx.Node) -> Any:
    """A view as it was goes; ``view(addmm(b, view(x, -1, n), w), size)`` of Conv1D is a linear."""
    inner = node.args[0]
    if same_shape(shape_of(inner), shape_of(node)):
        return inner if dtype_of(inner) == dtype_of(node) else None
    if operator_name(getattr(inner, "target", None)) != "addmm" or inner.kwargs:
        return None
    bias, flat, weight = inner.args
    if operator_name(getattr(flat, "target", None)) not in ("view", "reshape"):
        return None
    source, shape, sizes = flat.args[0], value_of(flat), value_of(node)
    before = value_of(source)
    if shape is None or before is None or sizes is None or weight is flat:
        return None
    same_rows = same_shape(before.shape[:-1], sizes.shape[:-1])
    if not same_rows or shape.dim() != 2 or not same_size(before.shape[-1], shape.shape[-1]):
        return None
    turned = call(graph, "t", weight, path=path_of(inner))
    return call(graph, "linear", source, turned, bias, path=path_of(inner))


def _size_tuple(node: fx.Node) -> None:
    """A size that is put together is written out where it is used."""
    dims = list(node.args[0])  # type: ignore[arg-type]
    for user in list(node.users):
        user.args = tuple(dims if arg is node else arg for arg in user.args)


_RULES: dict[str, Callable[[fx.Graph, fx.Node], Any]] = {
    "to": _to,
    "dropout": _dropout,
    "embedding": _embedding,
    "linear": _linear,
    "matmul": _matmul,
    "getitem": _getitem,
    "mul": _times,
    "view": _view,
    "reshape": _view,
}

#: Rules that leave out what only a backward pass sees: the row of padding that is not trained.
_WITHOUT_BACKWARD = (_embedding,)

#: Rules whose new node shares memory with others than the old one did.
_CHANGES_MEMORY = (_times, _view)


def canonicalize(graph: fx.Graph, context: Context) -> PassResult:
    """Rewrite every call into its canonical spelling.

    Returns:
        The number of nodes that were rewritten or dropped.
    """
    count = detach_scopes(graph) if context.training else 0
    count += spell_calls(graph) + functionalize(graph)
    count += simplify(graph, training=context.training)
    return PassResult(count + sweep(graph))


def spell_calls(graph: fx.Graph) -> int:
    """One target and one argument order for every call the table knows; others stay."""
    count = 0
    for node in list(graph.nodes):
        before = (node.op, node.target)
        if node.op in ("call_function", "call_method") and _drop_scope(node):
            graph.erase_node(node)
            count += 1
            continue
        spell(node)
        arrange(node)
        count += before != (node.op, node.target)
        if node.target is torch.Size:
            _size_tuple(node)
            if not node.users:
                graph.erase_node(node)
                count += 1
    return count


def simplify(graph: fx.Graph, *, training: bool = False) -> int:
    """Apply the rules by canonical name; what stands for an old node takes over its origin."""
    count = 0
    written = written_memory(graph)
    for node in list(graph.nodes):
        rule = _RULES.get(name_of(node) or "")
        if rule is None or not node.users:
            continue
        if rule in _WITHOUT_BACKWARD and training:
            continue
        if rule in _CHANGES_MEMORY and written & {node, *node.all_input_nodes}:
            continue
        with graph.inserting_before(node):
            new = rule(graph, node)
        if new is not None:
            if "origin" in node.meta:
                new.meta.setdefault("origin", node.meta["origin"])
            node.replace_all_uses_with(new)
            count += 1
    return count


CANONICALIZE = Pass(
    "canonicalize",
    canonicalize,
    requires=frozenset(),
    provides=frozenset({"canonical"}),
    may_add=ANY,
    exact=True,
    modes=frozenset({"inference", "training"}),
)
