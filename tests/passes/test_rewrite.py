"""Rules, the driver of a pipeline, and what it records."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_graphs import Builder, count, run, same, text, values
from torch import fx

from hybrid_fx.passes.contract import Context, Pass, PassResult, Pipeline
from hybrid_fx.passes.driver import run_passes
from hybrid_fx.passes.graph import call, path_of
from hybrid_fx.passes.pattern import Any, Call, Match, match
from hybrid_fx.passes.pipeline import copy_graph
from hybrid_fx.passes.rewrite import Rule, apply_rule, safe_to_replace
from hybrid_fx.passes.spec import IllegalGraphError

DOUBLE = Call("add", Any("x", node=True), Any("x"))


def _twice(graph: fx.Graph, found: Match) -> fx.Node:
    return call(graph, "mul", found["x"], 2, path=path_of(found.root))


def _doubled() -> fx.Graph:
    build = Builder()
    x = build.input("x", 3)
    one = build.call("add", x, x, path="a")
    two = build.call("add", one, one, path="b")
    return build.output(two)


def _free(name: str, run: Callable[[fx.Graph, Context], PassResult]) -> Pass:
    """A pass that needs nothing."""
    return Pass(name, run, requires=frozenset())


def test_a_rule_rewrites_every_place_and_keeps_the_numbers() -> None:
    graph = _doubled()
    given = values(graph)
    before = run(graph, given)
    assert apply_rule(graph, Rule(DOUBLE, _twice)) == 2
    assert count(graph, "add") == 0
    assert same(run(graph, given)[0], before[0])


def test_a_rule_stays_within_a_module() -> None:
    graph = _doubled()
    assert apply_rule(graph, Rule(DOUBLE, _twice), within="a") == 1
    assert count(graph, "add") == 1


def test_a_rule_that_declines_changes_nothing() -> None:
    graph = _doubled()
    before = text(graph)
    assert apply_rule(graph, Rule(DOUBLE, lambda graph, found: None)) == 0
    assert text(graph) == before


def test_a_second_run_changes_nothing() -> None:
    graph = _doubled()
    apply_rule(graph, Rule(DOUBLE, _twice))
    before = text(graph)
    assert apply_rule(graph, Rule(DOUBLE, _twice)) == 0
    assert text(graph) == before


def test_what_others_use_stays() -> None:
    build = Builder()
    x = build.input("x", 3)
    inner = build.call("neg", x)
    outer = build.call("exp", inner)
    graph = build.output(build.call("add", outer, inner))
    given = values(graph)
    before = run(graph, given)[0]
    pattern = Call("exp", Call("neg", Any("x")))

    def reciprocal(graph: fx.Graph, found: Match) -> fx.Node:
        exp = call(graph, "exp", found["x"], path="")
        return call(graph, "reciprocal", exp, path="")

    assert apply_rule(graph, Rule(pattern, reciprocal)) == 1
    assert count(graph, "neg") == 1
    assert torch.allclose(run(graph, given)[0], before)


def test_a_match_is_safe_to_replace_only_where_its_inner_values_are_its_own() -> None:
    build = Builder()
    x = build.input("x", 3)
    inner = build.call("neg", x)
    root = build.call("exp", inner)
    pattern = Call("exp", Call("neg", Any()))
    assert safe_to_replace(match(pattern, root))  # type: ignore[arg-type]
    build.call("sin", inner)
    found = match(pattern, root)
    assert not safe_to_replace(found)  # type: ignore[arg-type]
    assert safe_to_replace(found, outputs=[inner])  # type: ignore[arg-type]


def test_a_match_on_memory_that_is_written_in_place_is_left_alone() -> None:
    build = Builder()
    x = build.input("x", 3)
    early = build.call("neg", x)
    build.call("add_", x, 1.0)
    graph = build.output(build.call("exp", early))
    given = values(graph)
    before = run(graph, given)
    rule = Rule(
        Call("exp", Call("neg", Any("x"))),
        lambda graph, found: call(graph, "exp", call(graph, "neg", found["x"], path=""), path=""),
    )
    assert apply_rule(graph, rule) == 0
    assert same(run(graph, given)[0], before[0])


def test_a_pipeline_records_names_counts_and_what_changed() -> None:
    graph = _doubled()

    def double(graph: fx.Graph, context: Context) -> PassResult:
        return PassResult(apply_rule(graph, Rule(DOUBLE, _twice)))

    def nothing(graph: fx.Graph, context: Context) -> PassResult:
        return PassResult(0)

    pipeline = Pipeline(
        (
            Pass("double", double, requires=frozenset(), may_add=frozenset({"mul"})),
            _free("nothing", nothing),
        )
    )
    first, second = run_passes(graph, pipeline, Context())
    assert (first.name, first.result.count, second.name) == ("double", 2, "nothing")
    assert dict(first.added) == {"mul": 2}
    assert dict(first.removed) == {"add": 2}
    assert not second.added
    assert not second.removed


def test_a_pass_that_leaves_an_illegal_graph_is_named() -> None:
    def break_it(graph: fx.Graph, context: Context) -> PassResult:
        for node in graph.nodes:
            if node.op == "call_function":
                node.target = torch.linalg.svd
                break
        return PassResult(1)

    with pytest.raises(IllegalGraphError, match="after break_it: node add in 'a'"):
        run_passes(_doubled(), Pipeline((_free("break_it", break_it),)), Context())


def test_a_pass_that_adds_what_it_did_not_declare_is_named() -> None:
    def double(graph: fx.Graph, context: Context) -> PassResult:
        return PassResult(apply_rule(graph, Rule(DOUBLE, _twice)))

    with pytest.raises(
        IllegalGraphError, match=r"after double: node mul .*: 2 more mul than .*may_add"
    ):
        run_passes(_doubled(), Pipeline((_free("double", double),)), Context())


def test_a_copied_graph_is_a_graph_of_its_own() -> None:
    graph = _doubled()
    copy = copy_graph(graph)
    before = text(graph)
    apply_rule(copy, Rule(DOUBLE, _twice))
    assert text(graph) == before
    assert [path_of(n) for n in copy.nodes if n.op == "call_function"] == ["a", "b"]
