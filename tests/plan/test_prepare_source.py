"""The source of a prepare graph: what it makes, and what it leaves to who stores it."""

from __future__ import annotations

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from hybrid_fx.passes.graph import call
from hybrid_fx.passes.hoist import Hoisted
from hybrid_fx.plan.build import number_weights
from hybrid_fx.plan.prepare import prepare_source


def staged(*, read_too: bool = False, twice: bool = False) -> Hoisted:
    """Two weights, stacked and packed; the stack may be read as it is, or hold one weight twice."""
    graph = fx.Graph()
    weights = [graph.placeholder(name) for name in "ab"]
    with FakeTensorMode():
        for node in weights:
            node.meta |= {"path": "", "weight": node.name, "val": torch.empty(2, 3)}
    stack = call(graph, "concat_rows", *([weights[0]] * 2 if twice else weights), path="")
    results = (call(graph, "pack", stack, path=""), *([stack] if read_too else []))
    graph.output(results)
    number_weights(graph)
    count = len(results)
    return Hoisted(graph, fx.Graph(), ("s", "t")[:count], ("", "")[:count], (True,) * count)


def test_a_packed_stack_is_stored_as_the_weights_that_it_is_packed_of() -> None:
    source, sites = prepare_source(staged(), [])
    assert sites == []
    assert "op.store_packed(prepared, 0, weights[0], weights[1])" in source
    assert "concat_rows" not in source
    assert "op.pack" not in source
    both, _ = prepare_source(staged(twice=True), [])
    assert "op.store_packed(prepared, 0, weights[0], weights[0])" in both


def test_a_stack_that_is_read_as_it_is_is_made_once() -> None:
    source, _ = prepare_source(staged(read_too=True), [])
    assert source.count("op.concat_rows(weights[0], weights[1])") == 1
    assert "op.store_packed(prepared, 0, concat_rows)" in source
    assert "op.store(prepared, 1, concat_rows)" in source
