"""One spelling for every operation, so that one pattern covers many ways to write it.

Rules by canonical name or by target; each returns the node that stands for the old one, or
``None`` to leave it. Afterwards every call is of the operator table, methods are functions,
constants are positional where a rule knows the signature, and what does nothing is gone: casts
to the same dtype, dropout that is off, scopes that change nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from .functionalize import functionalize
from .graph import call, dtype_of, path_of, shape_of, sweep, value_of
from .operators import NAMES, OPERATORS, operator_name
from .rewrite import Context, PassResult

#: Functions that are another spelling of a table entry, where they take no keyword.
_SAME: dict[Any, str] = {
    torch.add: "add",
    torch.sub: "sub",
    torch.mul: "mul",
    torch.multiply: "mul",
    torch.div: "truediv",
    torch.true_divide: "truediv",
    torch.matmul: "matmul",
    torch.neg: "neg",
    torch.pow: "pow",
    torch.concat: "cat",
    torch.relu: "relu",
    torch.softmax: "softmax",
    torch.clip: "clamp",
    torch.absolute: "abs",
    torch.select: "select",
    torch.narrow: "narrow",
    operator.__and__: "and_",
    torch.ops.hybrid_fx.attention: "attention",
}

_METHOD_NAMES = {
    "__add__": "add",
    "__mul__": "mul",
    "divide": "truediv",
    "div": "truediv",
    "true_divide": "truediv",
    "multiply": "mul",
    "type": "to",
    "concat": "cat",
    "bitwise_and": "and_",
    "bitwise_or": "or_",
    "bitwise_not": "invert",
    "__and__": "and_",
}

_CASTS = {
    "float": torch.float32,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "double": torch.float64,
    "long": torch.int64,
    "int": torch.int32,
    "bool": torch.bool,
}

#: Calls without meaning for the values: logging, hints and checks that capture left behind.
_IGNORED = (
    "_log_api_usage_once",
    "_assert_async",
    "_check",
    "_check_is_size",
    "sym_constrain_range",
    "_assert_tensor_metadata",
)

#: Operators that take a shape, loose or as one tuple.
_SHAPED = ("view", "reshape", "permute", "expand", "repeat", "new_ones", "new_zeros", "flip")

_SIGNATURES: dict[str, tuple[str, ...]] = {
    "linear": ("input", "weight", "bias"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "cat": ("tensors", "dim"),
    "mean": ("input", "dim", "keepdim"),
    "softmax": ("input", "dim", "_stacklevel", "dtype"),
    "split": ("tensor", "split_size_or_sections", "dim"),
    "chunk": ("input", "chunks", "dim"),
    "transpose": ("input", "dim0", "dim1"),
    "unsqueeze": ("input", "dim"),
    "addmm": ("input", "mat1", "mat2"),
}


def _spell(graph: fx.Graph, node: fx.Node) -> None:
    """Give one call the canonical target."""
    if node.op == "call_method":
        method = str(node.target)
        if method in _CASTS and len(node.args) == 1 and not node.kwargs:
            node.args, method = (*node.args, _CASTS[method]), "to"
        elif method == "type_as":
            method = "type_as"
        method = _METHOD_NAMES.get(method, method)
        if method in OPERATORS:
            node.op, node.target = "call_function", OPERATORS[method]
        return
    if node.op != "call_function":
        return
    if node.target is getattr and node.args[1:] == ("T",):
        shape = shape_of(node.args[0])
        if shape is not None and len(shape) == 2:
            node.target, node.args = OPERATORS["t"], node.args[:1]
        return
    if node.target in _SAME and not node.kwargs:
        node.target = OPERATORS[_SAME[node.target]]
    elif node.target in NAMES:
        return
    else:  # the same function reached by another road, e.g. torch._C._nn.linear
        name = getattr(node.target, "__name__", "")
        for owner in (F, torch):
            if getattr(owner, name, None) is node.target and name in OPERATORS:
                node.target = OPERATORS[name]
                return


def _arrange(node: fx.Node) -> None:
    """Known keywords become positional arguments, loose sizes one tuple."""
    name = operator_name(node.target) if node.op == "call_function" else None
    if name in _SHAPED and len(node.args) > 2:
        node.args = (node.args[0], tuple(node.args[1:]))
    names = _SIGNATURES.get(name or "")
    if names is None or not node.kwargs:
        return
    kwargs, args = dict(node.kwargs), list(node.args)
    while len(args) < len(names) and names[len(args)] in kwargs:
        args.append(kwargs.pop(names[len(args)]))
    node.args, node.kwargs = tuple(args), kwargs


def _drop_scope(node: fx.Node) -> bool:
    """Scopes and checks that leave the values alone: autocast switched off, grad mode, asserts."""
    text = getattr(node.target, "__name__", str(node.target))
    if text == "_enter_autocast" and len(node.args) > 2 and node.args[2] is False:
        leave = next((u for u in node.users if "_exit_autocast" in str(u.target)), None)
        if leave is not None:
            node.graph.erase_node(leave)
        return not node.users
    return text == "_set_grad_enabled" or text in _IGNORED


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


def _activation(graph: fx.Graph, node: fx.Node) -> Any:
    if "inplace" not in node.kwargs and len(node.args) == 1:
        return None
    if node.kwargs.get("inplace") or len(node.args) > 1:
        return None
    return call(graph, str(operator_name(node.target)), node.args[0], path=path_of(node))


def _linear(graph: fx.Graph, node: fx.Node) -> Any:
    return None if len(node.args) == 3 else call(
        graph, "linear", *node.args, None, path=path_of(node)
    )


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
    if shape_of(inner) is not None and shape_of(inner) == shape_of(node):
        return inner
    if operator_name(getattr(inner, "target", None)) != "addmm" or inner.kwargs:
        return None
    bias, flat, weight = inner.args
    if operator_name(getattr(flat, "target", None)) not in ("view", "reshape"):
        return None
    source, shape, sizes = flat.args[0], value_of(flat), value_of(node)
    before = value_of(source)
    if shape is None or before is None or sizes is None or weight is flat:
        return None
    same_rows = tuple(before.shape[:-1]) == tuple(sizes.shape[:-1])
    if not same_rows or shape.dim() != 2 or before.shape[-1] != shape.shape[-1]:
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
    "relu": _activation,
    "silu": _activation,
    "linear": _linear,
    "getitem": _getitem,
    "mul": _times,
    "view": _view,
    "reshape": _view,
}


def canonicalize(graph: fx.Graph, context: Context) -> PassResult:
    """Rewrite every call into its canonical spelling.

    Returns:
        The number of nodes that were rewritten or dropped.
    """
    count = 0
    for node in list(graph.nodes):
        before = (node.op, node.target)
        if node.op == "call_function" and _drop_scope(node):
            graph.erase_node(node)
            count += 1
            continue
        _spell(graph, node)
        _arrange(node)
        count += before != (node.op, node.target)
        if node.target is torch.Size:
            _size_tuple(node)
            if not node.users:
                graph.erase_node(node)
                count += 1
    count += functionalize(graph)
    for node in list(graph.nodes):
        rule = _RULES.get(operator_name(node.target) or "") if node.op == "call_function" else None
        if rule is None or (node.op == "call_function" and not node.users):
            continue
        with graph.inserting_before(node):
            new = rule(graph, node)
        if new is not None:
            node.replace_all_uses_with(new)
            count += 1
    return PassResult(count + sweep(graph))
