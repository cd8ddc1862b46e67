"""Pieces of decoder layers for random graphs: norms, projections, adapters, attention, MLPs.

Each piece is what a pass looks for, or differs from it in a point that matters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from ..passes.graph import dtype_of
from .draft import WIDTHS, Draft, sizes_of
from .names import ACTIVATIONS, FAMILIES, Names, policy


def written_out_norm(draft: Draft, x: fx.Node, path: str) -> fx.Node:
    """An RMSNorm as the Llama family writes it, or a near miss; or one call that is a norm."""
    size, dtype = sizes_of(x)[-1], dtype_of(x) or torch.float32
    weight = draft.weight(size, dtype=dtype, path=path)
    kind = draft.one(("written", "fused", "layer", "narrow", "late", "first axis"))
    if kind == "fused":
        return draft.call("rms_norm", x, weight, 0.1, path=path)
    if kind == "layer":
        bias = draft.weight(size, dtype=dtype, path=path) if draft.flag() else None
        return draft.call("layer_norm", x, (size,), weight, bias, 0.1, path=path)
    wide = x if kind == "narrow" else draft.call("to", x, torch.float32, path=path)
    axis = 1 if kind == "first axis" else -1
    mean = draft.call("mean", draft.call("pow", wide, 2, path=path), axis, True, path=path)
    scale = draft.call("rsqrt", draft.call("add", mean, 0.1, path=path), path=path)
    normed = draft.call("mul", wide, scale, path=path)
    if kind != "late" and dtype_of(normed) != dtype:
        normed = draft.call("to", normed, dtype, path=path)
    pair = (weight, normed) if draft.flag() else (normed, weight)
    root = draft.call("mul", *pair, path=path)
    return root if dtype_of(root) == dtype else draft.call("to", root, dtype, path=path)


def _low_rank(draft: Draft, x: fx.Node, rows: int, path: str, name: str) -> fx.Node:
    rank, size, dtype = draft.one((2, 1)), sizes_of(x)[-1], dtype_of(x) or torch.float32
    first, second = f"{path}.lora_A.{name}", f"{path}.lora_B.{name}"
    a = draft.weight(rank, size, dtype=dtype, path=first)
    b = draft.weight(rows, rank, dtype=dtype, path=second)
    inner = draft.call("linear", x, a, None, path=first)
    return draft.call("linear", inner, b, None, path=second)


def _own_factors(draft: Draft, x: fx.Node, rows: int, path: str) -> fx.Node:
    """``x @ right @ left`` of factors in the linear layer itself, in canonical spelling."""
    rank, size, dtype = draft.one((2, 1)), sizes_of(x)[-1], dtype_of(x) or torch.float32
    for shape in ((size, rank), (rank, rows)):
        factor = draft.call("t", draft.weight(*shape, dtype=dtype, path=path), path=path)
        x = draft.call("linear", x, factor, None, path=path)
    return x


def adapted(draft: Draft, x: fx.Node, rows: int, path: str, bias: bool) -> fx.Node:
    """A linear with LoRA branches beside it, or DoRA, or plain."""
    dtype = dtype_of(x) or torch.float32
    kind = draft.one(("plain", "lora", "two", "dora", "chat")) if draft.flag() else "plain"
    inner = path if kind in ("plain", "chat") else f"{path}.base_layer"
    weight = draft.weight(rows, sizes_of(x)[-1], dtype=dtype, path=inner)
    held = draft.weight(rows, dtype=dtype, path=inner) if bias else None
    base = draft.call("linear", x, weight, held, path=inner)
    if kind == "dora":
        low = _low_rank(draft, x, rows, path, "default")
        magnitude = draft.weight(1, rows, dtype=dtype, path=path)
        alone = base if held is None else draft.call("sub", base, held, path=path)
        excess = draft.call("sub", magnitude, 1, path=path)
        first = draft.call("mul", excess, alone, path=path)
        scaled = draft.call("mul", draft.call("mul", magnitude, low, path=path), 0.5, path=path)
        return draft.call("add", base, draft.call("add", first, scaled, path=path), path=path)
    names = {"plain": (), "lora": ("one",), "two": ("one", "two"), "chat": ("own",)}[kind]
    for name in names:
        own = name == "own"
        branch = (
            _own_factors(draft, x, rows, path) if own else _low_rank(draft, x, rows, path, name)
        )
        if draft.flag():
            branch = draft.call("mul", branch, draft.one((0.5, 2)), path=path)
        base = draft.call("add", *((branch, base) if draft.flag() else (base, branch)), path=path)
    return base


def attention(draft: Draft, x: fx.Node, layer: str, names: Names) -> fx.Node:
    """Projections, heads, the attention op and the output projection."""
    path = f"{layer}.{names.attention}"
    kv, groups, size = draft.one((1, 2)), draft.one((1, 2, 3)), draft.one((2, 1))
    batch = draft.build.call("size", x, 0, path=path)
    tokens = draft.build.call("size", x, 1, path=path)
    bias = draft.flag()
    heads = []
    for name, count in ((names.q, kv * groups), (names.k, kv), (names.v, kv)):
        y = adapted(draft, x, count * size, f"{path}.{name}", bias)
        y = draft.call("view", y, (batch, tokens, count, size), path=path)
        heads.append(draft.call("transpose", y, 1, 2, path=path))
    options = draft.one(((), (2,), (0, 3.0)))
    out = draft.call("attention", *heads, 0.5, *options, path=path)
    rows = sizes_of(x)[-1]
    out = draft.call("reshape", out, (batch, tokens, kv * groups * size), path=path)
    return adapted(draft, out, rows, f"{path}.{names.out}", draft.flag())


def joined(draft: Draft, x: fx.Node, layer: str, names: Names) -> fx.Node:
    """Three projections of one value that meet again without attention."""
    path = f"{layer}.{names.attention}"
    bias, rows = draft.flag(), draft.one(WIDTHS)
    parts = [adapted(draft, x, rows, f"{path}.{n}", bias) for n in (names.q, names.k, names.v)]
    if draft.flag():  # a view that needs the memory of a projection of its own
        size = draft.build.call("size", x, 0, path=path)
        parts = [draft.call("view", part, (size, -1), path=path) for part in parts]
    total = draft.call("add", draft.call("mul", *parts[:2], path=path), parts[2], path=path)
    if len(sizes_of(total)) == 2:
        total = draft.call("view", total, (*_leading(draft, x, path), rows), path=path)
    return adapted(draft, total, sizes_of(x)[-1], f"{path}.{names.out}", draft.flag())


def _leading(draft: Draft, x: fx.Node, path: str) -> tuple[fx.Node, ...]:
    return tuple(draft.build.call("size", x, axis, path=path) for axis in (0, 1))


def _activated(draft: Draft, x: fx.Node, kind: str, path: str) -> fx.Node:
    if kind != "gelu_tanh":
        return draft.call(kind, x, path=path)
    cube = draft.call("mul", 0.044715, draft.call("pow", x, 3.0, path=path), path=path)
    inner = draft.call("mul", 0.7978845608028654, draft.call("add", x, cube, path=path), path=path)
    outer = draft.call("add", 1.0, draft.call("tanh", inner, path=path), path=path)
    return draft.call("mul", draft.call("mul", 0.5, x, path=path), outer, path=path)


def mlp(draft: Draft, x: fx.Node, layer: str, names: Names) -> fx.Node:
    """A gated MLP over two linears or one, or a plain one."""
    path = f"{layer}.{names.mlp}" if names.mlp else layer
    form, rows, bias = draft.one(("plain", "gated", "halves")), draft.one(WIDTHS), draft.flag()
    kind = draft.one(ACTIVATIONS)
    draft.policies[layer] = policy(names, kind, gated=form != "plain")
    if form == "plain":
        up = adapted(draft, x, rows, f"{path}.{names.up}", bias)
        hidden = _activated(draft, up, kind, path)
    else:
        if form == "gated":
            gate = adapted(draft, x, rows, f"{path}.{names.gate}", bias)
            up = adapted(draft, x, rows, f"{path}.{names.up}", bias)
        else:
            both = adapted(draft, x, 2 * rows, f"{path}.{names.gate_up}", bias)
            pieces = draft.build.call("chunk", both, 2, -1, path=path)
            gate, up = (draft.call("getitem", pieces, i, path=path) for i in (0, 1))
        active = _activated(draft, gate, kind, path)
        hidden = draft.call("mul", *((active, up) if draft.flag() else (up, active)), path=path)
    return adapted(draft, hidden, sizes_of(x)[-1], f"{path}.{names.down}", draft.flag())


#: The pieces of a layer, in the order in which they stand in each of its two blocks.
PIECES = ("norm", "joined", "attention", "mlp", "residual")


def layer(draft: Draft, x: fx.Node, path: str, pieces: Sequence[str] = PIECES) -> fx.Node:
    """Pieces of one decoder layer in their usual order, each of which may be missing."""
    names: Names = draft.one(FAMILIES)
    draft.policies[path] = policy(names, "silu", gated=True)
    blocks = {"joined": joined, "attention": attention}
    first = [blocks[name] for name in pieces if name in blocks]
    second = [mlp] if "mlp" in pieces else []
    for options, norm in zip((first, second), names.norms, strict=True):
        before = x
        if "norm" in pieces and draft.often():
            x = written_out_norm(draft, x, f"{path}.{norm}")
        if options and draft.often():
            x = draft.one(options)(draft, x, path, names)
        if "residual" in pieces and x is not before and draft.often():
            x = draft.call("add", *((before, x) if draft.flag() else (x, before)), path=path)
    return x
