"""The claims refuse: for each of them a pass that breaks it, and nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, find, settings
from torch import Tensor, fx

from hybrid_fx.passes.contract import Context, Pass, PassResult
from hybrid_fx.passes.graph import call, calls, name_of, value_of
from hybrid_fx.passes.operators import IN_PLACE, OPERATORS
from hybrid_fx.passes.spec import IllegalGraphError
from hybrid_fx.testing import (
    Builder,
    Example,
    check_hoist,
    check_pass,
    check_same,
    graphs,
)
from hybrid_fx.testing.decoders import decoder
from hybrid_fx.testing.modules import Shape


def _example() -> Example:
    """``(x * w + 1, buffer)`` with the buffer written."""
    build = Builder()
    x = build.input("x", build.batch, build.tokens, 4)
    weight, buffer = build.weight("w", 4), build.weight("b", 4, parameter=False)
    build.call("add_", buffer, 1.0)
    total = build.call("add", build.call("mul", x, weight), 1)
    return Example(build.output(total, buffer))


def _first(graph: fx.Graph, name: str) -> fx.Node:
    return calls(graph, name)[0]


def _wrong_constant(graph: fx.Graph, context: Context) -> PassResult:
    _first(graph, "add").args = (_first(graph, "add").args[0], 2)
    return PassResult(0)


def _slightly_off(graph: fx.Graph, context: Context) -> PassResult:
    _first(graph, "add").args = (_first(graph, "add").args[0], 1.00002)
    return PassResult(0)


def _drops_a_write(graph: fx.Graph, context: Context) -> PassResult:
    for node in calls(graph, "add_"):
        graph.erase_node(node)
    return PassResult(0)


def _writes_an_input(graph: fx.Graph, context: Context) -> PassResult:
    x = next(node for node in graph.nodes if node.meta.get("input") == "x")
    output = next(node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(output):
        node = graph.call_function(OPERATORS["mul_"], (x, 2))
        node.meta |= {"path": "", "val": value_of(x)}
    return PassResult(0)


def _never_done(graph: fx.Graph, context: Context) -> PassResult:
    total = _first(graph, "add")
    with graph.inserting_after(total):
        node = call(graph, "neg", total, path="")
    with graph.inserting_after(node):
        again = call(graph, "neg", node, path="")
    total.replace_all_uses_with(again, delete_user_cb=lambda user: user is not node)
    return PassResult(1)


def _counts_nothing_done(graph: fx.Graph, context: Context) -> PassResult:
    return PassResult(1)


def _only_two_rows(graph: fx.Graph, context: Context) -> PassResult:
    """What holds at the sizes that the graph was built with, and at no others."""
    total = _first(graph, "add")
    with graph.inserting_after(total):
        node = call(graph, "narrow", total, 1, 0, 1, path="")
    if total.users.keys() == {node}:
        return PassResult(0)
    total.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    return PassResult(0)


WRONG = {
    "another constant": (_wrong_constant, "changes result 0"),
    "a small error": (_slightly_off, "relative error"),
    "a lost write": (_drops_a_write, "changes result 1"),
    "a write of its own": (_writes_an_input, "what input 'x' holds"),
    "no end": (_never_done, "a second run of wrong changes the graph"),
    "a count of nothing": (_counts_nothing_done, "a second run of wrong counts 1"),
    "one size alone": (_only_two_rows, "changes result 0"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_pass_is_refused_for(what: str) -> None:
    run, said = WRONG[what]
    may_add = frozenset({"neg", "mul_", "narrow"})
    with pytest.raises(AssertionError, match=said):
        check_pass(Pass("wrong", run, may_add=may_add), _example())


def test_operators_that_a_pass_does_not_declare_are_refused() -> None:
    with pytest.raises(IllegalGraphError, match="2 more neg"):
        check_pass(Pass("wrong", _never_done), _example())


def test_a_difference_in_the_last_bit_is_refused_of_an_exact_pass_alone() -> None:
    def last_bit(graph: fx.Graph, context: Context) -> PassResult:
        _first(graph, "add").args = (_first(graph, "add").args[0], 1.0000001)
        return PassResult(0)

    check_pass(Pass("close", last_bit), _example())
    with pytest.raises(AssertionError, match="close changes result 0"):
        check_pass(Pass("close", last_bit, exact=True), _example())


def test_a_bias_that_goes_unnoticed_in_half_precision_is_no_error_there() -> None:
    """The measure is the rounding of the graph itself, not a constant."""
    for dtype, refused in ((torch.float32, True), (torch.bfloat16, False)):
        graphs_: list[fx.Graph] = []
        for factor in (1.5, 1.5001):
            build = Builder()
            x = build.input("x", build.batch, build.tokens, 4, dtype=dtype)
            graphs_.append(build.output(build.call("mul", x, factor)))
        if refused:
            with pytest.raises(AssertionError):
                check_same(Example(graphs_[0]), graphs_[1], exact=False)
        else:
            check_same(Example(graphs_[0]), graphs_[1], exact=False)


def test_what_depends_on_a_written_buffer_may_not_be_hoisted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build = Builder()
    x = build.input("x", build.batch, build.tokens, 4)
    buffer = build.weight("b", 4, parameter=False)
    before = build.call("neg", buffer)
    build.call("add_", buffer, 1.0)
    example = Example(build.output(build.call("add", x, before)))
    check_hoist(example)
    monkeypatch.setattr("hybrid_fx.passes.binding.written_memory", lambda graph: set())
    with pytest.raises(AssertionError):
        check_hoist(example)


def _aliased(example: Example) -> bool:
    inputs = example.inputs((2, 3))
    return len({id(tensor) for tensor in inputs.values()}) < len(inputs)


def _weights(graph: fx.Graph) -> list[str]:
    return [node.meta["weight"] for node in graph.nodes if "weight" in node.meta]


REACHED = {
    "a write in place": lambda e: bool(calls(e.graph, *IN_PLACE)),
    "a written buffer": lambda e: any(
        "weight" in node.args[0].meta for node in calls(e.graph, *IN_PLACE)
    ),
    "a written input": lambda e: any(
        "input" in node.args[0].meta for node in calls(e.graph, *IN_PLACE)
    ),
    "one tensor as two inputs": _aliased,
    "weights tied under one name": lambda e: len({*_weights(e.graph)}) < len(_weights(e.graph)),
    "one buffer under two names": lambda e: any(n in _weights(e.graph) for n in e.shared),
    "dead calls": lambda e: any(
        not node.users and name_of(node) == "neg" for node in e.graph.nodes
    ),
    "several dtypes": lambda e: (
        len({v.dtype for v in map(value_of, e.graph.nodes) if isinstance(v, Tensor)}) > 2
    ),
    "several results": lambda e: isinstance(list(e.graph.nodes)[-1].args[0], tuple),
    "attention": lambda e: bool(calls(e.graph, "attention")),
}


@pytest.mark.parametrize("what", REACHED)
def test_random_graphs_reach(what: str) -> None:
    drawn = settings(max_examples=400, database=None, phases=(Phase.generate,))
    find(graphs(), REACHED[what], settings=drawn)


def test_values_are_those_that_fake_evaluation_gives() -> None:
    """The probing builder notes the shapes, strides and dtypes that a capture would."""
    example = decoder(Shape(adapters=(("q_proj", "dora"), ("up_proj", "two"))))
    checked = 0
    for node in example.graph.nodes:
        if node.op == "call_function" and isinstance(value_of(node), Tensor):
            old = value_of(node)
            with example.graph.inserting_after(node):
                new = call(example.graph, str(name_of(node)), *node.args, path="", **node.kwargs)
            val = value_of(new)
            assert str((val.shape, val.dtype)) == str((old.shape, old.dtype)), node
            example.graph.erase_node(new)
            checked += 1
    assert checked > 20
