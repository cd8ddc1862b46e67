"""Graphs cut for several ranks compute what the whole graph does, whatever it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_graphs import Builder
from threaded_ranks import Rank, on_ranks
from torch import Tensor, fx

from hybrid_fx.passes.binding import weight_only
from hybrid_fx.passes.driver import run_passes
from hybrid_fx.passes.graph import calls
from hybrid_fx.passes.pipeline import PASSES, Pipeline, copy_graph
from hybrid_fx.passes.shard_tp import SHARD_TP
from hybrid_fx.passes.slicing import Cut, Slicer
from hybrid_fx.testing import Example, decoders, graphs
from hybrid_fx.testing.run import distance, doubled, in_float64, run, tensors_of

_ONE_PASS = Pipeline((SHARD_TP,), given=SHARD_TP.requires)
_FEW = max(6, settings().max_examples // 4)

#: In float64, where what remains between two orders of a sum is rounding and a mistake is not.
_ALLOWED = 1e-6


def cut_for(example: Example, rank: int, size: int) -> tuple[fx.Graph, int]:
    """The graph of one rank, and how many places were cut."""
    graph = copy_graph(example.graph)
    context = replace(example.context, shard=(rank, size))
    (record,) = run_passes(graph, _ONE_PASS, context)
    return graph, record.result.count


def held(example: Example, graph: fx.Graph, group: Any = None) -> list[Tensor]:
    """In float64: every result of the calls of an example, and what its tensors hold behind."""
    wide = in_float64(graph)
    weights = doubled(example.weights())
    found: list[Tensor] = []
    for size in example.sizes:
        inputs = doubled(example.inputs(size))
        result = run(wide, weights, {**inputs, "group": group})
        found += [tensor.clone() for tensor in tensors_of(result)]
        found += list(inputs.values())
    return found + [tensor.clone() for tensor in weights.values()]


def compare(example: Example, size: int) -> int:
    """Every rank gets what the whole graph gives; how many places were cut."""
    cut = [cut_for(example, rank, size) for rank in range(size)]
    expected = held(example, example.graph)

    def work(rank: Rank) -> Sequence[Tensor]:
        return held(example, cut[rank.rank][0], rank)

    for results in on_ranks(size, work):
        for mine, whole in zip(results, expected, strict=True):
            assert mine.shape == whole.shape
            if bool(whole.double().isfinite().all()):
                assert distance(mine, whole) <= _ALLOWED, example
    assert len({count for _, count in cut}) == 1
    return cut[0][1]


SIZES = st.integers(2, 4)


@settings(max_examples=_FEW)
@given(graphs(pieces=("attention", "mlp", "joined")), SIZES)
def test_ranks_together_compute_a_random_graph(example: Example, size: int) -> None:
    compare(example, size)


@settings(max_examples=_FEW)
@given(decoders(disturbances=2), SIZES)
def test_ranks_together_compute_a_random_decoder(example: Example, size: int) -> None:
    compare(example, size)


def _written(operator: str | None) -> Builder:
    """An MLP in one linear after another; what stands between may be written in place."""
    b = Builder()
    x = b.input("x", 2, 3, 6)
    up = b.call("silu", b.call("linear", x, b.weight("up.weight", 8, 6), None))
    if operator is not None:
        b.call(operator, up, 2.0)
    down = b.call("linear", up, b.weight("down.weight", 6, 8), None)
    b.output(b.call("mul", down, down))  # no vocabulary, which is cut in a way of its own
    return b


@pytest.mark.parametrize("operator", ["mul_", "add_"])
def test_a_value_that_is_written_in_place_stays_whole(operator: str) -> None:
    assert compare(Example(_written(None).graph), 2) == 1
    assert compare(Example(_written(operator).graph), 2) == 0


def test_a_value_that_is_drawn_stays_whole() -> None:
    b = Builder()
    heads = [b.call("linear", b.input("x", 2, 3, 6), b.weight(n, 8, 6), None) for n in "qkv"]
    split = [b.call("transpose", b.call("view", h, (2, 3, 4, 2)), 1, 2) for h in heads]
    for rate, followed in ((0.0, True), (0.5, False)):
        value = b.call("attention", *split, 1.0, 0, 0.0, None, rate)
        slicer = Slicer(b.graph, 0, 2, frozenset(weight_only(b.graph)))
        assert slicer.follows(value, Cut(2, 1, 0, 4)) is followed


def test_a_group_is_asked_only_where_something_was_cut() -> None:
    assert PASSES["shard_tp"] is SHARD_TP
    graph, count = cut_for(Example(_written("mul_").graph), 0, 2)
    assert count == 0
    assert not calls(graph, "all_reduce", "all_gather")
    assert not [n for n in graph.nodes if n.meta.get("input") == "group"]
