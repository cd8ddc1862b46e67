"""The steps of a random graph: each adds a call or two on values so far, or declines."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from ..passes.graph import dtype_of
from .draft import WIDTHS, Draft, is_float, sizes_of

_UNARY = (
    "neg silu tanh sigmoid relu gelu cos abs pos clone contiguous detach dropout_off square"
).split()
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def _static(node: fx.Node) -> bool:
    return bool(sizes_of(node)) and isinstance(sizes_of(node)[-1], int)


def unary(draft: Draft) -> None:
    """One value in, one of its shape out; some give their argument back."""
    x = draft.value(is_float)
    if x is None:
        return
    name = draft.one(_UNARY)
    if name == "dropout_off":
        draft.call("dropout", x, 0.1, False)
    elif name == "square":
        draft.call("pow", x, 2)
    else:
        draft.call(name, x)


def scalar(draft: Draft) -> None:
    """Arithmetic with a constant, on either side; a factor of one as well."""
    x = draft.value(is_float)
    if x is None:
        return
    name, constant = draft.one(("mul", "add", "sub")), draft.one((1, 0.5, 1.0, 2))
    draft.call(name, *((constant, x) if draft.flag() else (x, constant)))


def binary(draft: Draft) -> None:
    """Arithmetic of two values, of one shape or one a vector of the last axis."""
    x = draft.value(lambda n: is_float(n) and bool(sizes_of(n)))
    if x is None:
        return

    def fits(n: fx.Node) -> bool:
        return is_float(n) and sizes_of(n) in (sizes_of(x), sizes_of(x)[-1:])

    y = draft.value(fits)
    name = draft.one(("add", "mul", "sub", "scaled_add"))
    if name == "scaled_add":
        draft.call(name, x, y, alpha=0.5)
    else:
        draft.call(name, *((x, y) if draft.flag() else (y, x)))


def cast(draft: Draft) -> None:
    """Another dtype, or the one it has."""
    x = draft.value(is_float)
    if x is not None:
        draft.call("to", x, draft.one(_DTYPES))


def linear(draft: Draft) -> None:
    """A linear with or without bias, over a weight of any origin."""
    x = draft.value(lambda n: is_float(n) and _static(n) and len(sizes_of(n)) > 1)
    if x is None:
        return
    rows, dtype = draft.one(WIDTHS), dtype_of(x) or torch.float32
    weight = draft.weight(rows, sizes_of(x)[-1], dtype=dtype)
    bias = draft.weight(rows, dtype=dtype) if draft.flag() else None
    draft.call("linear", x, weight, bias)


def product(draft: Draft) -> None:
    """``x @ matrix``, of a weight or of any value that is a matrix."""
    x = draft.value(lambda n: is_float(n) and _static(n) and len(sizes_of(n)) > 1)
    if x is None:
        return

    def fits(n: fx.Node) -> bool:
        shape = sizes_of(n)
        return len(shape) == 2 and shape[0] == sizes_of(x)[-1] and dtype_of(n) == dtype_of(x)

    matrix = draft.value(fits) if draft.flag() else None
    if matrix is None:
        columns, dtype = draft.one(WIDTHS), dtype_of(x) or torch.float32
        matrix = draft.weight(sizes_of(x)[-1], columns, dtype=dtype)
    draft.call("matmul", x, matrix)


def norm(draft: Draft) -> None:
    """Layer norm, or softmax."""
    x = draft.value(lambda n: is_float(n) and _static(n))
    if x is None:
        return
    if draft.flag():
        draft.call("softmax", x, -1)
        return
    size, dtype = sizes_of(x)[-1], dtype_of(x) or torch.float32
    weights = (draft.weight(size, dtype=dtype), draft.weight(size, dtype=dtype))
    draft.call("layer_norm", x, (size,), *weights, 0.1)


def view(draft: Draft) -> None:
    """Another name for the same memory, or for a part of it."""
    x = draft.value(lambda n: is_float(n) and len(sizes_of(n)) > 1)
    if x is None:
        return
    shape = sizes_of(x)
    kind = draft.one(("transpose", "unsqueeze", "slice", "first", "same", "flat", "swap", "pieces"))
    if kind == "transpose":
        draft.call("transpose", x, -1, -2)
    elif kind == "unsqueeze":
        draft.call("unsqueeze", x, draft.one((-1, 0)))
    elif kind == "slice":
        draft.call("getitem", x, (..., slice(None, -1) if draft.flag() else slice(None)))
    elif kind == "first":
        draft.call("getitem", x, (..., 0))
    elif kind == "pieces" and isinstance(shape[-1], int):
        pieces = draft.build.call("unbind", x, -1)
        draft.call("getitem", pieces, draft.one(range(shape[-1])))
    else:
        sizes = [
            s if isinstance(s, int) else draft.build.call("size", x, i) for i, s in enumerate(shape)
        ]
        if kind == "swap":
            sizes[:2] = sizes[1::-1]
        wanted = (*sizes[:-2], -1) if kind == "flat" else tuple(sizes)
        draft.call("reshape", x, wanted)


def join(draft: Draft) -> None:
    """Two values side by side along the last axis."""
    x = draft.value(lambda n: is_float(n) and _static(n))
    if x is None:
        return

    def fits(n: fx.Node) -> bool:
        return sizes_of(n) == sizes_of(x) and dtype_of(n) == dtype_of(x)

    draft.call("cat", (x, draft.value(fits)), -1)


def reduce(draft: Draft) -> None:
    """A sum or mean along the last axis."""
    x = draft.value(lambda n: is_float(n) and len(sizes_of(n)) > 1)
    if x is not None:
        draft.call(draft.one(("mean", "sum")), x, -1, keepdim=True)


def lookup(draft: Draft) -> None:
    """Rows of a table."""
    ids = draft.value(lambda n: dtype_of(n) == torch.int64)
    if ids is not None:
        draft.call("embedding", ids, draft.weight(4, draft.one(WIDTHS)))


def of_weights(draft: Draft) -> None:
    """A weight, or a value that is computed of weights alone; and calls without arguments."""
    kind = draft.one(("weight", "product", "arange"))
    if kind == "arange":
        draft.call("to", draft.call("arange", 4), torch.float32)
    elif kind == "product":
        draft.call("matmul", draft.weight(4, 4), draft.weight(4, 4))
    else:
        draft.weight(4)


STEPS: tuple[Callable[[Draft], None], ...] = (
    unary, scalar, binary, cast, linear, product, norm, view, join, reduce, lookup, of_weights
)  # fmt: skip
