"""The specification of the legal graph: each rule refuses, and says where."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_graphs import Builder
from torch import fx

from hybrid_fx.passes.spec import RULES, THREADED, IllegalGraphError, check_graph


def _method(build: Builder, x: fx.Node) -> fx.Node:
    return build.raw("neg", x)


def _unknown(build: Builder, x: fx.Node) -> fx.Node:
    return build.raw(torch.linalg.svdvals, x)


def _unbound(build: Builder, x: fx.Node) -> fx.Node:
    del x.meta["input"]
    return build.call("neg", x)


def _nowhere(build: Builder, x: fx.Node) -> fx.Node:
    node = build.call("neg", x)
    del node.meta["path"]
    return node


def _object(build: Builder, x: fx.Node) -> fx.Node:
    node = build.call("mul", x, 2)
    node.args = (x, object())  # type: ignore[assignment]
    return node


def _inner_object(build: Builder, x: fx.Node) -> fx.Node:
    node = build.call("getitem", x, (slice(None), 0))
    node.args = (x, (slice(None, 3j), 0))  # type: ignore[assignment]
    return node


def _written_weight(build: Builder, x: fx.Node) -> fx.Node:
    return build.call("add_", build.weight("w", 2, 2), x)


def _written_view(build: Builder, x: fx.Node) -> fx.Node:
    turned = build.call("t", build.call("view", build.weight("w", 4), (2, 2)))
    return build.call("mul_", turned, x)


def _hidden_write(build: Builder, x: fx.Node) -> fx.Node:
    return build.call("silu", build.call("neg", x), inplace=True)


def _out(build: Builder, x: fx.Node) -> fx.Node:
    out = build.call("neg", x)
    node = build.call("exp", x)
    node.kwargs = {"out": out}
    return node


BROKEN: dict[str, tuple[Callable[[Builder, fx.Node], fx.Node], str]] = {
    "a method": (_method, "a call_method node is not legal"),
    "an unknown function": (_unknown, "is not in the operator table"),
    "an unbound placeholder": (_unbound, "stands for no weight, prepared tensor or input"),
    "a call without a place": (_nowhere, "no module path"),
    "an argument that is no literal": (_object, "of type object cannot be written"),
    "one inside a slice": (_inner_object, "of type complex cannot be written"),
    "a written parameter": (_written_weight, "writes the parameter w"),
    "a written view of a parameter": (_written_view, "writes the parameter w"),
    "a write behind a keyword": (_hidden_write, "the keyword inplace"),
    "an out argument": (_out, "the keyword out"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_specification_refuses(what: str) -> None:
    build = Builder()
    x = build.input("x", 2, 2)
    breaks, reason = BROKEN[what]
    graph = build.output(breaks(build, x))
    with pytest.raises(IllegalGraphError, match=reason):
        check_graph(graph, stage="somewhere")


def test_a_refusal_names_the_stage_the_node_its_place_and_its_neighbours() -> None:
    build = Builder()
    x = build.input("x", 2, 2)
    bad = build.raw(torch.linalg.svdvals, x, path="model.layers.3")
    graph = build.output(build.call("exp", build.call("neg", bad)))
    with pytest.raises(IllegalGraphError) as refused:
        check_graph(graph, stage="some_pass")
    first, *around = str(refused.value).splitlines()
    assert first.startswith(f"after some_pass: node {bad.name} in 'model.layers.3': ")
    assert around == [
        "  input  x: float32[2, 2]  (input x)",
        "     ->  linalg_svdvals: float32[2] = linalg_svdvals(x)  in model.layers.3",
        "   user  neg: float32[2] = neg(linalg_svdvals)",
        "         exp: float32[2] = exp(neg)",
    ]


def test_each_rule_is_needed() -> None:
    """Without a rule, what it refuses passes: no rule is covered by the others."""
    needed = set()
    for breaks, _ in BROKEN.values():
        build = Builder()
        x = build.input("x", 2, 2)
        graph = build.output(breaks(build, x))
        for rule in RULES:
            try:
                check_graph(graph, stage="s", rules=[r for r in RULES if r is not rule])
            except IllegalGraphError:
                continue
            needed.add(rule)
    unneeded = {rule.__name__ for rule in RULES if rule not in needed}
    assert unneeded <= {"known_kind"}, "a method is refused by two rules; all others stand alone"


def test_a_use_before_its_definition_is_refused() -> None:
    build = Builder()
    x = build.input("x", 2, 2)
    first, second = build.call("neg", x), build.call("exp", x)
    graph = build.output(second)
    first.args = (second,)
    with pytest.raises(IllegalGraphError, match=r"after s: .*before it has been defined"):
        check_graph(graph, stage="s")


def test_a_legal_graph_passes() -> None:
    build = Builder()
    x, buffer = build.input("x", 2, 2), build.weight("b", 2, 2, parameter=False)
    build.call("copy_", buffer, x)
    last = build.call("getitem", build.call("neg", buffer), (..., slice(None, 1), None))
    check_graph(build.output(last), stage="s")


def test_a_threaded_graph_holds_no_attention_without_a_workspace() -> None:
    build = Builder()
    x = build.input("x", 1, 2, 3, 4)
    graph = build.output(build.call("attention", x, x, x, 0.5))
    check_graph(graph, stage="captured")
    with pytest.raises(IllegalGraphError, match="not threaded"):
        check_graph(graph, stage="prefill", rules=THREADED)
