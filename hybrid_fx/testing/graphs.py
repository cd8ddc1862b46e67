"""The strategy of random legal graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, fx

from ..passes.contract import Context
from ..passes.roles import Policy, match_layer
from .disturb import disturbed
from .draft import WIDTHS, Draft, is_float, sizes_of
from .example import Example
from .layers import PIECES, layer
from .steps import STEPS


def context_of(graph: fx.Graph, policies: Mapping[str, Policy], **options: Any) -> Context:
    """What passes are told about a graph whose layers are described by these policies."""
    layers = {path: match_layer(graph, path, (one,)) for path, one in policies.items()}
    return Context(layers=layers, **options)


def _results(draft: Draft, last: fx.Node) -> tuple[Any, ...] | fx.Node:
    kind = draft.one(("last", "logits", "two", "any"))
    if kind == "last" or not isinstance(sizes_of(last)[-1], int):
        return last
    if kind == "any":
        return draft.value(is_float) or last
    if kind == "two":
        return last, draft.value(is_float) or last
    dtype = last.meta["val"].dtype
    weight = draft.weight(3, sizes_of(last)[-1], dtype=dtype)
    head = draft.call("linear", last, weight, None, path="lm_head")
    tail = draft.one(("", "mul", "flat", "row", "vector"))
    if tail == "mul":
        return draft.call("mul", head, 0.5)
    if tail == "vector":
        return draft.call("add", head, draft.weight(3, dtype=dtype))
    if tail == "flat":
        return draft.call("getitem", head, (..., 0))
    return draft.call("getitem", head, 0) if tail == "row" else head


@st.composite
def graphs(
    draw: st.DrawFn,
    *,
    layers: int = 1,
    steps: int = 6,
    disturbances: int = 3,
    pieces: Sequence[str] = PIECES,
) -> Example:
    """Random legal graphs over inputs [B, T, E] and [B, T], B and T symbolic.

    Args:
        layers: At most this many decoder layers, or parts of them.
        steps: At most this many free steps, before and behind the layers.
        disturbances: At most this many writes in place, aliases, shared users and dead calls.
        pieces: What layers may hold, of :data:`~hybrid_fx.testing.layers.PIECES`.
    """
    draft = Draft(draw)
    build = draft.build
    size = draft.one(WIDTHS)
    dtype = draft.one((torch.float32, torch.bfloat16, torch.float64))
    x = draft.input("x", build.batch, build.tokens, size, dtype=dtype)
    if draft.flag():
        draft.input("y", build.batch, build.tokens, size, dtype=dtype)
    if draft.flag():
        draft.input("ids", build.batch, build.tokens, dtype=torch.int64)
    before = draw(st.integers(0, steps))
    for _ in range(before):
        _step(draft)
    alike = [n for n in draft.values if sizes_of(n) == sizes_of(x) and n.meta["val"].dtype == dtype]
    hidden = draft.one([n for n in alike if "weight" not in n.meta])
    for index in range(layers if draft.often() else 0):
        hidden = layer(draft, hidden, f"layers.{index}", pieces)
    for _ in range(draw(st.integers(0, steps - before))):
        _step(draft)
    results = _results(draft, hidden)
    graph = build.output(*results) if isinstance(results, tuple) else build.output(results)
    assume(all(_dynamic(node) for node in graph.nodes if node.op == "placeholder"))
    example = Example(
        graph,
        seed=draw(st.integers(0, 3)),
        limits=draft.limits,
        shared=draft.shared,
    )
    example = disturbed(draw, example, disturbances)
    told = context_of(example.graph, draft.policies)
    return Example(example.graph, told, example.seed, limits=example.limits, shared=example.shared)


def _step(draft: Draft) -> None:
    """One free step; what cannot be called as drawn leaves the values it made before."""
    with contextlib.suppress(RuntimeError, IndexError, ValueError):
        draft.one(STEPS)(draft)


def _dynamic(node: fx.Node) -> bool:
    """Whether the sizes of an input are still symbolic after all calls were added."""
    val = node.meta["val"]
    if "input" not in node.meta or not isinstance(val, Tensor):
        return True
    return not any(isinstance(s, int) for s in val.shape[:2])
