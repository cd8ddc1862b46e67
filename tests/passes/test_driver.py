"""What happens to a graph when a pass fails: it is named, stopped, and the graph is given back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_graphs import Builder, run, same, text, values
from torch import fx

from hybrid_fx.passes.contract import ANY, Context, Pass, PassError, PassResult, Pipeline
from hybrid_fx.passes.driver import run_passes
from hybrid_fx.passes.graph import call, calls, fresh_input, sweep
from hybrid_fx.passes.operators import OPERATORS
from hybrid_fx.passes.pattern import Any as Value
from hybrid_fx.passes.pattern import Call, Match
from hybrid_fx.passes.pipeline import NORMALIZE
from hybrid_fx.passes.rewrite import Rule, apply_rule
from hybrid_fx.passes.spec import IllegalGraphError

Run = Callable[[fx.Graph, Context], Any]


def _pipeline(*runs: Run) -> Pipeline:
    return Pipeline(
        tuple(Pass(r.__name__.strip("_"), r, requires=frozenset(), may_add=ANY) for r in runs)
    )


def _graph() -> fx.Graph:
    build = Builder()
    x, w = build.input("x", 2, 2), build.weight("w", 2, 2)
    one = build.call("neg", x, path="first")
    two = build.call("add", one, w, path="second")
    build.call("sin", two, path="dead")
    return build.output(build.call("mul", two, one, path="third"))


def _scramble(graph: fx.Graph, context: Context) -> PassResult:
    """Erase, add, move, retarget and rename: everything that a pass may do to a graph."""
    sweep(graph)
    (add,) = calls(graph, "add")
    fresh_input(graph, "more")
    with graph.inserting_before(add):
        new = call(graph, "sub", *add.args, path="new")
    add.replace_all_uses_with(new)
    graph.erase_node(add)
    (neg,) = calls(graph, "neg")
    neg.target = torch.exp
    neg.name = "renamed"
    neg.meta["path"] = "elsewhere"
    neg.meta["mark"] = True
    (mul,) = calls(graph, "mul")
    mul.args = (mul.args[1], mul.args[0])
    first = next(iter(graph.nodes))
    first.prepend(next(n for n in graph.nodes if n.name == "w"))
    return PassResult(1)


def _break(graph: fx.Graph, context: Context) -> PassResult:
    calls(graph, "mul")[0].target = torch.linalg.svdvals
    return PassResult(1)


def _raise(graph: fx.Graph, context: Context) -> PassResult:
    raise ZeroDivisionError("of its own")


def _interrupt(graph: fx.Graph, context: Context) -> PassResult:
    raise KeyboardInterrupt


def _grow(graph: fx.Graph, context: Context) -> PassResult:
    last = next(iter(graph.nodes))
    while True:
        with graph.inserting_before(calls(graph, "mul")[0]):
            last = call(graph, "cos", last, path="more")


def _whole(graph: fx.Graph) -> list[Any]:
    """All that a graph is made of, but for the identity of its nodes."""
    return [
        (n.name, n.op, n.target, str(n.args), str(n.kwargs), n.type, dict(n.meta))
        for n in graph.nodes
    ]


@pytest.mark.parametrize(
    ("failing", "error"),
    [
        (_break, IllegalGraphError),
        (_raise, ZeroDivisionError),
        (_interrupt, KeyboardInterrupt),
        (_grow, PassError),
    ],
)
def test_where_a_pipeline_fails_the_graph_is_as_it_was(
    failing: Run, error: type[BaseException]
) -> None:
    graph = _graph()
    before, given = _whole(graph), values(graph)
    kept = next(n for n in graph.nodes if n.name == "neg")
    wanted = run(graph, given)[0]
    with pytest.raises(error):
        run_passes(graph, _pipeline(_scramble, failing), Context())
    assert _whole(graph) == before
    assert kept in list(graph.nodes), "a node that was not erased is the same object"
    graph.lint()
    assert same(run(graph, given)[0], wanted)
    assert [n.name for n in graph.find_nodes(op="call_function", target=OPERATORS["neg"])] == [
        "neg"
    ]
    with graph.inserting_before(next(n for n in graph.nodes if n.op == "output")):
        new = call(graph, "neg", kept, path="")
    assert new.name != "neg", "names stay unique"


def test_the_scrambling_pass_itself_is_legal_and_changes_the_graph() -> None:
    graph = _graph()
    before = text(graph)
    run_passes(graph, _pipeline(_scramble), Context())
    assert text(graph) != before


def test_an_error_of_a_pass_says_which_pass_it_was() -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        run_passes(_graph(), _pipeline(_scramble, _raise), Context())
    assert raised.value.__notes__ == ["raised in pass raise; the graph is as it was before"]


def test_a_pass_that_creates_nodes_without_end_is_stopped_and_named() -> None:
    with pytest.raises(PassError) as stopped:
        run_passes(_graph(), _pipeline(_grow), Context())
    said = str(stopped.value)
    assert said.startswith("pass grow was stopped: it created 1071 nodes in a graph of 7 ")
    assert "the last of them cos_1070 = cos(cos_1069). Where" in said


def test_a_rule_that_matches_what_it_builds_is_stopped() -> None:
    def again(graph: fx.Graph, found: Match) -> fx.Node:
        return call(graph, "neg", call(graph, "neg", found["x"], path=""), path="")

    def until_none_is_left(graph: fx.Graph, context: Context) -> PassResult:
        count = 0
        while changed := apply_rule(graph, Rule(Call("neg", Value("x")), again)):
            count += changed
        return PassResult(count)

    with pytest.raises(PassError, match=r"pass until_none_is_left was stopped.*let it decline"):
        run_passes(_graph(), _pipeline(until_none_is_left), Context())


def test_rules_that_undo_each_other_with_the_nodes_there_are_end() -> None:
    """Nothing is created, so that no bound counts: each match leaves a node unused, which goes."""

    def swap(name: str, other: str) -> Rule:
        return Rule(Call(name, Value("x")), lambda graph, _: next(iter(calls(graph, other)), None))

    build = Builder()
    x = build.input("x", 2)
    graph = build.output(build.call("add", build.call("neg", x), build.call("abs", x)))
    there = swap("neg", "abs"), swap("abs", "neg")
    counts = [sum(apply_rule(graph, rule) for rule in there) for _ in range(20)]
    assert counts == [1, *[0] * 19]


def test_the_bound_is_gone_behind_the_pass() -> None:
    graph = _graph()
    run_passes(graph, _pipeline(_scramble), Context())
    assert "create_node" not in vars(graph)
    with pytest.raises(PassError):
        run_passes(graph, _pipeline(_grow), Context())
    assert "create_node" not in vars(graph)


def test_a_large_graph_may_be_rewritten_all_over() -> None:
    build = Builder()
    x = build.input("x", 2)
    for _ in range(300):
        x = build.call("neg", x)
    graph = build.output(x)

    def nine_for_one(graph: fx.Graph, context: Context) -> PassResult:
        for node in calls(graph, "neg"):
            with graph.inserting_before(node):
                new = node.args[0]
                for _ in range(9):
                    new = call(graph, "neg", new, path="")
            node.replace_all_uses_with(new)
            graph.erase_node(node)
        return PassResult(300)

    (record,) = run_passes(graph, _pipeline(nine_for_one), Context())
    assert record.added == {"neg": 8 * 300}


def test_a_pass_that_returns_nothing_is_told_what_to_return() -> None:
    def forgets(graph: fx.Graph, context: Context) -> None:
        return None

    with pytest.raises(PassError, match=r"pass forgets returned None; let it return PassResult"):
        run_passes(_graph(), _pipeline(forgets), Context())


def test_an_input_that_a_pass_did_not_declare_is_refused() -> None:
    def asks(graph: fx.Graph, context: Context) -> PassResult:
        fresh_input(graph, "temperature")
        return PassResult(1)

    one = Pass("asks", asks, requires=frozenset())
    with pytest.raises(IllegalGraphError, match=r"1 more placeholder than before.*'s inputs"):
        run_passes(_graph(), Pipeline((one,)), Context())
    declared = Pass("asks", asks, requires=frozenset(), inputs=frozenset({"temperature"}))
    (record,) = run_passes(_graph(), Pipeline((declared,)), Context())
    assert record.added == {"placeholder": 1}


def test_the_rules_of_a_legal_graph_are_the_callers() -> None:
    build = Builder()
    bad = build.raw(torch.linalg.svdvals, build.input("x", 2, 2))
    graph = build.output(bad)
    with pytest.raises(IllegalGraphError, match="after canonicalize: node linalg_svdvals"):
        run_passes(graph, NORMALIZE, Context())
    run_passes(graph, NORMALIZE, Context(), rules=())
