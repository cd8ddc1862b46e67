"""One target and one argument order for every call; what it computes stays as it is.

Methods become functions, the many names of one function become the table's, keywords become
positional where the signature is known, loose sizes one tuple. A call whose arguments the table's
function would read otherwise keeps its own spelling, and the specification refuses it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from .graph import shape_of, value_of
from .operators import INPLACE_AT, NAMES, OPERATORS, operator_name

#: Functions that are another spelling of a table entry, where they take no keyword.
_SAME: dict[Any, str] = {
    torch.add: "add",
    torch.sub: "sub",
    torch.mul: "mul",
    torch.multiply: "mul",
    torch.div: "truediv",
    torch.true_divide: "truediv",
    torch.matmul: "matmul",
    torch.rms_norm: "torch_rms_norm",
    F.rms_norm: "torch_rms_norm",
    torch.neg: "neg",
    torch.pow: "pow",
    torch.concat: "cat",
    torch.relu: "relu",
    torch.clip: "clamp",
    torch.absolute: "abs",
    torch.select: "select",
    torch.narrow: "narrow",
    operator.__and__: "and_",
    F.grouped_mm: "grouped_mm",
    torch._grouped_mm: "grouped_mm",  # what Dynamo makes of it
    torch.ops.hybrid_fx.attention: "attention",
}

#: Operators that others registered, by name: what transformers takes for torch's where it traces.
_REGISTERED = {"transformers.grouped_mm_fallback": "grouped_mm"}

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
    "gather": "gather_along",
    "clip": "clamp",
    "absolute": "abs",
}

#: What stands for a Python operator that would compute something else: torch's has keywords,
#: ``add(x, y, alpha=2)``, and rounds a number to the tensor's dtype where it comes first.
_TORCH_OWN = {"add": "scaled_add", "sub": "scaled_sub", "mul": "torch_mul", "truediv": "div"}

_NUMBERS = (int, float, complex, torch.SymInt, torch.SymFloat)

_CASTS = {
    "float": torch.float32,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "double": torch.float64,
    "long": torch.int64,
    "int": torch.int32,
    "bool": torch.bool,
}

#: Operators that take a shape, loose or as one tuple.
_SHAPED = ("view", "reshape", "permute", "expand", "repeat", "new_ones", "new_zeros", "flip")

_SIGNATURES: dict[str, tuple[str, ...]] = {
    "linear": ("input", "weight", "bias"),
    "embedding": (
        *("input", "weight", "padding_idx", "max_norm", "norm_type"),
        *("scale_grad_by_freq", "sparse"),
    ),
    "index_copy": ("input", "dim", "index", "source"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "cat": ("tensors", "dim"),
    "mean": ("input", "dim", "keepdim"),
    "split": ("tensor", "split_size_or_sections", "dim"),
    "chunk": ("input", "chunks", "dim"),
    "transpose": ("input", "dim0", "dim1"),
    "unsqueeze": ("input", "dim"),
    "addmm": ("input", "mat1", "mat2"),
    "grouped_mm": ("input", "weight", "offs"),
}

_SOFTMAX = ("softmax", "log_softmax")


def _is_python(name: str) -> bool:
    return getattr(operator, name, None) is OPERATORS[name]


def _table_name(name: str, node: fx.Node) -> str | None:
    """The entry that serves a call of ``name`` with this node's arguments, if one does."""
    if name not in OPERATORS:
        return None
    if _is_python(name) and node.kwargs:
        if node.kwargs.keys() <= {"other", "exponent"}:
            node.args, node.kwargs = (*node.args, *node.kwargs.values()), {}
        else:
            return _TORCH_OWN.get(name)
    if _is_python(name) and isinstance(value_of(node.args[0]), _NUMBERS):
        return _TORCH_OWN.get(name, name)
    return name


def _retarget(node: fx.Node, name: str) -> None:
    node.op, node.target = "call_function", OPERATORS[name]


def _spell_method(node: fx.Node) -> None:
    method = str(node.target)
    if method in _CASTS and len(node.args) == 1 and not node.kwargs:
        node.args, method = (*node.args, _CASTS[method]), "to"
    elif method == "type" and not (len(node.args) == 2 and isinstance(node.args[1], torch.dtype)):
        return
    elif method == "where":  # x.where(condition, other)
        if len(node.args) == 3:
            node.args = (node.args[1], node.args[0], node.args[2])
            _retarget(node, "where")
        return
    elif method in _SOFTMAX:
        _spell_softmax(node, method, stacklevel=False)
        return
    if name := _table_name(_METHOD_NAMES.get(method, method), node):
        _retarget(node, name)


def _spell_softmax(node: fx.Node, name: str, *, stacklevel: bool) -> None:
    """torch's takes ``(x, dim, dtype)``, the functional one ``(x, dim, _stacklevel, dtype)``."""
    kwargs = {k: v for k, v in node.kwargs.items() if k != "_stacklevel"}
    rest = node.args[3:] if stacklevel else node.args[2:]
    args = list(node.args[:2])
    if len(args) == 1 and "dim" in kwargs:
        args.append(kwargs.pop("dim"))
    dtype = rest[0] if rest else kwargs.pop("dtype", None)
    node.args, node.kwargs = tuple(args), {**kwargs, **({} if dtype is None else {"dtype": dtype})}
    _retarget(node, name)


def _spell_setitem(node: fx.Node) -> None:
    """``x[index] = values``, of a tensor each; values have an axis for each that they go into."""
    into, index, values = node.args
    found = [value_of(arg) for arg in node.args]
    if not all(isinstance(value, torch.Tensor) for value in found):
        return
    target, places, given = found
    fits = given.dim() <= places.dim() + target.dim() - 1 and places.dim() > 0
    if fits and places.dtype != torch.bool and target.dtype == given.dtype:
        node.args = (into, (index,), values)
        node.meta["val"] = target
        _retarget(node, "index_put_")


def spell(node: fx.Node) -> None:
    """Give one call the canonical target."""
    if node.op == "call_method":
        _spell_method(node)
        return
    if node.op != "call_function":
        return
    if node.target is operator.setitem:
        _spell_setitem(node)
        return
    if node.target is getattr and node.args[1:] == ("T",):
        shape = shape_of(node.args[0])
        if shape is not None and len(shape) == 2:
            node.target, node.args = OPERATORS["t"], node.args[:1]
        return
    for name in _SOFTMAX:
        if node.target in (getattr(torch, name), getattr(F, name)):
            _spell_softmax(node, name, stacklevel=node.target is getattr(F, name))
            return
    if node.target in _SAME:
        if same := _table_name(_SAME[node.target], node):
            _retarget(node, same)
        return
    if known := _REGISTERED.get(str(node.target).removesuffix(".default")):
        _retarget(node, known)
        return
    if node.target in NAMES:
        return
    # the same function reached by another road, e.g. torch._C._nn.linear
    known = getattr(node.target, "__name__", "")
    for owner in (F, torch):
        if getattr(owner, known, None) is node.target and known in OPERATORS:
            if table := _table_name(known, node):
                _retarget(node, table)
            return


def arrange(node: fx.Node) -> None:
    """Known keywords become positional arguments, loose sizes one tuple."""
    name = operator_name(node.target) if node.op == "call_function" else None
    if name in _SHAPED:
        sizes = node.args[1:]
        if len(sizes) > 1 or any(isinstance(value_of(size), int | torch.SymInt) for size in sizes):
            node.args = (node.args[0], sizes)
    if name in INPLACE_AT:
        _arrange_inplace(node, INPLACE_AT[name])
    if name == "gelu" and node.kwargs.get("approximate") == "none":
        node.kwargs = {}
    if name == "grouped_mm":
        node.kwargs = {key: value for key, value in node.kwargs.items() if value is not None}
    names = _SIGNATURES.get(name or "")
    if names is None or not node.kwargs:
        return
    kwargs, args = dict(node.kwargs), list(node.args)
    if name == "split" and "split_size" in kwargs:
        kwargs["split_size_or_sections"] = kwargs.pop("split_size")
    while len(args) < len(names) and names[len(args)] in kwargs:
        args.append(kwargs.pop(names[len(args)]))
    node.args, node.kwargs = tuple(args), kwargs


def _arrange_inplace(node: fx.Node, at: int) -> None:
    kwargs = dict(node.kwargs)
    inplace = node.args[at] if len(node.args) > at else kwargs.pop("inplace", False)
    node.args = node.args[:at]
    node.kwargs = {**kwargs, "inplace": True} if inplace else kwargs
