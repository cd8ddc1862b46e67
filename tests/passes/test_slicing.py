"""A slice that is followed back equals the slice of the whole, operator by operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_graphs import Builder, run, values
from torch import fx

from hybrid_fx.passes.binding import weight_only
from hybrid_fx.passes.collectives import share
from hybrid_fx.passes.graph import calls, shape_of
from hybrid_fx.passes.slicing import Cut, Slicer

Made = Callable[[Builder, fx.Node], fx.Node]


def _up(b: Builder, x: fx.Node, out: int = 8, *, bias: bool = True) -> fx.Node:
    weight = b.weight("up.weight", out, 6)
    return b.call("linear", x, weight, b.weight("up.bias", out) if bias else None)


def _heads(b: Builder, x: fx.Node) -> fx.Node:
    return b.call("view", _up(b, x), (2, 3, -1, 2))


def _rotary(b: Builder, x: fx.Node) -> fx.Node:
    heads = b.call("transpose", _heads(b, x), 1, 2)
    cos = b.input("cos", 2, 1, 3, 2)
    first = b.call("getitem", heads, (..., slice(None, 1)))
    second = b.call("getitem", heads, (..., slice(1, None)))
    turned = b.call("cat", (b.call("neg", second), first), -1)
    return b.call("add", b.call("mul", heads, cos), turned)


def _attention(b: Builder, x: fx.Node) -> fx.Node:
    query = b.call("transpose", _heads(b, x), 1, 2)
    small = b.call("linear", x, b.weight("kv.weight", 4, 6), None)
    key = b.call("transpose", b.call("view", small, (2, 3, -1, 2)), 1, 2)
    return b.call("attention", query, key, key, 0.7)


def _piece(b: Builder, x: fx.Node) -> fx.Node:
    return b.call("getitem", b.call("split", _up(b, x, 12), (3, 8, 1), -1), 1)


def _chunk(b: Builder, x: fx.Node) -> fx.Node:
    return b.call("getitem", b.call("chunk", _up(b, x, 16), 2, -1), 1)


def _range(b: Builder, x: fx.Node) -> fx.Node:
    return b.call("getitem", _up(b, x, 12), (..., slice(4, None)))


def _normed_heads(b: Builder, x: fx.Node) -> fx.Node:
    heads = _heads(b, x)
    mean = b.call("mean", b.call("pow", heads, 2), -1, True)
    return b.call("mul", heads, b.call("rsqrt", mean))


def _joined(b: Builder, x: fx.Node) -> fx.Node:
    return b.call("reshape", _heads(b, x), (2, 3, 8))


FOLLOWED: dict[str, tuple[Made, int, int]] = {  # the axis that is cut, and in which units
    "linear": (_up, 2, 1),
    "activation and product": (
        lambda b, x: b.call("mul", b.call("silu", _up(b, x)), b.weight("scale", 8)),
        2,
        1,
    ),
    "a scalar": (lambda b, x: b.call("add", 1.5, _up(b, x)), 2, 1),
    "heads": (_heads, 2, 1),
    "rotary": (_rotary, 1, 1),
    "attention": (_attention, 2, 1),
    "a piece of a split": (_piece, 2, 2),
    "a half": (_chunk, 2, 1),
    "a range": (_range, 2, 4),
    "norm of each head": (_normed_heads, 2, 1),
    "heads joined again": (_joined, 2, 2),
}


@pytest.mark.parametrize("name", FOLLOWED)
@pytest.mark.parametrize("size", [2, 4])
def test_the_slices_of_all_ranks_are_the_whole(name: str, size: int) -> None:
    make, axis, unit = FOLLOWED[name]
    parts, covered = [], []
    for rank in range(size):
        b = Builder()
        whole = make(b, b.input("x", 2, 3, 6))
        graph = b.output(whole)
        given = values(graph)
        wanted, _ = run(graph, given)
        slicer = Slicer(graph, rank, size, frozenset(weight_only(graph)))
        cut = Cut(axis, unit, 0, wanted.shape[axis])
        assert slicer.follows(whole, cut)
        graph.output_node().args = (slicer.slice(whole, cut),)
        graph.lint()
        part, _ = run(graph, given)
        low, high = share(wanted.shape[axis], unit, rank, size)
        torch.testing.assert_close(part, wanted.narrow(axis, low, high - low))
        assert shape_of(graph.output_node().args[0]) == tuple(part.shape)
        covered += range(low, high)
        parts.append(part)
    if wanted.shape[axis] // unit >= size:
        assert covered == list(range(wanted.shape[axis]))


NOT_FOLLOWED: dict[str, tuple[Made, int, int]] = {
    "an input": (lambda b, x: x, 2, 1),
    "a norm along the axis": (lambda b, x: b.call("softmax", _up(b, x), -1), 2, 1),
    "a sum along the axis": (lambda b, x: b.call("mean", _up(b, x), -1, True), 2, 1),
    "joined heads in parts of one": (_joined, 2, 1),
    "a view that moves other axes": (lambda b, x: b.call("view", _up(b, x), (3, 2, 8)), 2, 1),
    "pieces put together": (lambda b, x: b.call("cat", (_up(b, x), x), -1), 2, 1),
    "a weight computed from the input": (
        lambda b, x: b.call("linear", x, b.call("getitem", x, 0), None),
        2,
        1,
    ),
}


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_what_no_rule_covers_is_not_followed(name: str) -> None:
    make, axis, unit = NOT_FOLLOWED[name]
    b = Builder()
    value = make(b, b.input("x", 2, 3, 6))
    graph = b.output(value)
    slicer = Slicer(graph, 0, 2, frozenset(weight_only(graph)))
    size: Any = (shape_of(value) or ())[axis]
    before = len(graph.nodes)
    assert not slicer.follows(value, Cut(axis, unit, 0, size))
    assert len(graph.nodes) == before


def test_a_value_that_is_read_twice_is_cut_once() -> None:
    b = Builder()
    x = b.input("x", 2, 3, 6)
    up = _up(b, x)
    graph = b.output(b.call("mul", b.call("silu", up), up))
    slicer = Slicer(graph, 0, 2, frozenset(weight_only(graph)))
    cut = Cut(2, 1, 0, 8)
    graph.output_node().args = (slicer.slice(graph.output_node().args[0], cut),)
    assert len(calls(graph, "linear")) == 2  # the whole one, which is unused now, and the slice


def test_heads_that_the_ranks_cannot_share_are_not_followed() -> None:
    b = Builder()
    value = _attention(b, b.input("x", 2, 3, 6))
    slicer = Slicer(b.output(value), 0, 3, frozenset(weight_only(value.graph)))
    assert not slicer.follows(value, Cut(2, 1, 0, 4))
