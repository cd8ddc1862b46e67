"""In-place operations: freed where nothing else sees the memory, kept where something does."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given
from hypothesis import strategies as st
from small_graphs import Builder, count, run, same, text, values
from torch import fx

from hybrid_fx.passes.canonicalize import canonicalize
from hybrid_fx.passes.contract import Context
from hybrid_fx.passes.effects import written_memory
from hybrid_fx.passes.functionalize import functionalize
from hybrid_fx.passes.graph import name_of
from hybrid_fx.passes.operators import IN_PLACE
from hybrid_fx.passes.spec import IllegalGraphError, check_graph


def _holds(graph: fx.Graph) -> tuple[int, int]:
    """Canonicalize; output and inputs hold what they held; in-place calls before and after."""
    inputs = values(graph)
    before = run(graph, inputs)
    was = sum(str(n.target).endswith("_") or n.target is operator.iadd for n in graph.nodes)
    canonicalize(graph, Context())
    check_graph(graph, stage="canonicalize")
    after = run(graph, inputs)
    assert same(after[0], before[0])
    assert same(list(after[1].values()), list(before[1].values()))
    return was, sum(name_of(node) in IN_PLACE for node in graph.nodes)


def test_a_write_into_a_fresh_value_becomes_plain() -> None:
    build = Builder()
    x = build.raw("neg", build.input("x", 3))
    total = build.raw(operator.iadd, x, 1.0)
    graph = build.output(build.raw("exp", x), total)
    assert _holds(graph) == (1, 0)


@pytest.mark.parametrize("held", [False, True], ids=["fresh", "of the caller"])
@pytest.mark.parametrize("write", [operator.iadd, operator.isub, operator.imul, operator.itruediv])
def test_each_operator_that_writes_keeps_its_meaning(write: Callable[..., Any], held: bool) -> None:
    build = Builder()
    x, y = build.input("x", 3), build.input("y", 3)
    written = build.raw(write, x if held else build.raw("neg", x), y)
    assert _holds(build.output(build.raw("exp", written)))[1] == held


def test_a_chain_of_writes_becomes_plain() -> None:
    build = Builder()
    x = build.raw("neg", build.input("x", 3))
    for _ in range(3):
        build.raw("mul_", x, 2.0)
        build.raw(operator.iadd, x, x)
    assert _holds(build.output(x))[1] == 0


def test_a_view_taken_behind_the_write_does_not_hold_it_back() -> None:
    build = Builder()
    x = build.raw("neg", build.input("x", 2, 3))
    build.raw("add_", x, 1.0)
    assert _holds(build.output(build.raw("view", x, 6)))[1] == 0


def test_a_view_that_is_done_with_does_not_hold_a_write_back() -> None:
    build = Builder()
    x = build.raw("neg", build.input("x", 2, 3))
    early = build.raw("exp", build.raw("view", x, 6))
    build.raw("add_", x, 1.0)
    assert _holds(build.output(x, early))[1] == 0


@pytest.mark.parametrize("kind", ["view", "transpose", "getitem", "expand_as", "contiguous"])
def test_a_write_that_an_earlier_view_shows_stays(kind: str) -> None:
    build = Builder()
    x = build.raw("neg", build.input("x", 2, 3))
    arguments = {"view": (6,), "transpose": (0, 1), "expand_as": (x,), "contiguous": ()}
    if kind == "getitem":
        view = build.raw(operator.getitem, x, (slice(None), 0))
    else:
        view = build.raw(kind, x, *arguments[kind])
    build.raw("add_", x, 1.0)
    assert _holds(build.output(view)) == (1, 1)


def test_a_write_through_a_view_stays() -> None:
    build = Builder()
    x = build.raw("neg", build.input("x", 2, 3))
    build.raw("mul_", build.raw("view", x, 6), 3.0)
    assert _holds(build.output(x)) == (1, 1)


def test_a_write_that_a_view_of_a_view_shows_stays() -> None:
    build = Builder()
    x = build.raw("neg", build.input("x", 2, 3))
    view = build.raw("view", build.raw("transpose", x, 0, 1), 3, 2)
    build.raw("add_", x, 1.0)
    late = build.raw("select", view, 0, 1)
    assert _holds(build.output(late))[1] == 1


@pytest.mark.parametrize("kind", ["input", "buffer"])
def test_a_write_into_what_the_caller_holds_stays(kind: str) -> None:
    build = Builder()
    x = build.input("x", 3) if kind == "input" else build.weight("b", 3, parameter=False)
    build.raw("add_", x, 1.0)
    assert _holds(build.output(build.raw("exp", x)))[1] == 1


def test_a_write_whose_result_nobody_reads_stays() -> None:
    build = Builder()
    x, y = build.weight("inv_freq", 3, parameter=False), build.input("y", 3)
    build.raw("copy_", x, build.raw("exp", y))
    assert _holds(build.output(build.raw("neg", y)))[1] == 1


@pytest.mark.parametrize("view", [False, True])
def test_a_write_into_a_parameter_is_refused(view: bool) -> None:
    build = Builder()
    w = build.weight("w", 4)
    build.raw("add_", build.raw("view", w, 2, 2) if view else w, 1.0)
    graph = build.output(build.raw("exp", w))
    canonicalize(graph, Context())
    with pytest.raises(IllegalGraphError, match="writes the parameter w"):
        check_graph(graph, stage="canonicalize")


def test_what_writes_twice_through_one_result_is_seen_by_both_names() -> None:
    build = Builder()
    x = build.input("x", 3)
    first = build.raw("add_", x, 1.0)
    build.raw("mul_", first, 2.0)
    assert _holds(build.output(build.raw("exp", x), first))[1] == 2


def test_dropout_that_is_off_is_its_argument() -> None:
    build = Builder()
    x = build.raw("neg", build.input("x", 3))
    y = build.raw(F.dropout, x, 0.5, False)
    build.raw("add_", y, 1.0)
    assert _holds(build.output(x, y))[1] == 1


def test_a_write_in_place_keeps_the_dtype_it_has() -> None:
    build = Builder()
    x = build.raw("neg", build.input("x", 3, dtype=torch.float16))
    build.raw("add_", x, build.input("y", 3))
    assert _holds(build.output(x))[1] == 1, "float16 + float32 would be float32"


def test_a_write_into_expanded_memory_fails_as_it_did() -> None:
    build = Builder()
    x = build.raw("expand", build.raw("neg", build.input("x", 1)), 3)
    node = build.graph.call_method("add_", (x, 1.0))
    node.meta |= {"path": "", "val": x.meta["val"]}
    graph = build.output(x)
    canonicalize(graph, Context())
    with pytest.raises(RuntimeError, match="single memory location"):
        run(graph, values(graph))


@pytest.mark.parametrize("positional", [False, True])
def test_an_activation_in_place_on_a_callers_tensor_writes_it(positional: bool) -> None:
    build = Builder()
    x = build.input("x", 3)
    if positional:
        build.raw(F.relu, x, True)
    else:
        build.raw(F.relu, x, inplace=True)
    graph = build.output(build.raw("neg", x))
    assert _holds(graph)[1] == 1
    assert count(graph, "relu_") == 1


def test_an_activation_without_an_in_place_twin_is_refused_where_it_must_write() -> None:
    build = Builder()
    x = build.input("x", 3)
    build.raw(F.silu, x, inplace=True)
    graph = build.output(build.raw("neg", x))
    canonicalize(graph, Context())
    with pytest.raises(IllegalGraphError, match="inplace"):
        check_graph(graph, stage="canonicalize")


def test_arithmetic_on_sizes_is_plain_arithmetic() -> None:
    build = Builder()
    x = build.input("x", 3)
    size = build.raw("size", x, 0)
    more = build.raw(operator.iadd, size, 2)
    graph = build.output(build.raw("add", x, more))
    assert _holds(graph)[1] == 0
    assert count(graph, "add") == 2


def test_written_memory_holds_every_name_of_it_and_nothing_else() -> None:
    build = Builder()
    x, y = build.input("x", 2, 3), build.input("y", 2, 3, dtype=torch.int64)
    view = build.call("view", x, (6,))
    turned = build.call("transpose", x, 0, 1)
    write = build.call("add_", view, 1.0)
    other = build.call("neg", x)
    graph = build.output(turned, write, other, y)
    assert written_memory(graph) == {x, view, turned, write}


def test_a_second_run_changes_nothing() -> None:
    build = Builder()
    x = build.input("x", 2, 3)
    fresh = build.call("neg", x)
    build.call("add_", x, 1.0)
    build.call("add_", fresh, 1.0)
    graph = build.output(fresh, x)
    assert functionalize(graph) == 1
    before = text(graph)
    assert functionalize(graph) == 0
    assert text(graph) == before


#: One step of a random program: what it does, and on which of the values so far.
STEPS = st.tuples(
    st.sampled_from(
        ("neg", "add", "view", "t", "row", "times one", "off", "add_", "mul_", "iadd", "relu_")
    ),
    st.integers(0, 30),
    st.integers(0, 30),
)


def _program(steps: list[tuple[str, int, int]]) -> fx.Graph | None:
    """A graph over square matrices, each step on earlier values; all of them are its output."""
    build = Builder()
    found = [build.input("x", 2, 2), build.weight("b", 2, 2, parameter=False)]
    for kind, first, second in steps:
        a, b = found[first % len(found)], found[second % len(found)]
        new = {
            "neg": lambda a=a: build.raw("neg", a),
            "add": lambda a=a, b=b: build.raw(operator.add, a, b),
            "view": lambda a=a: build.raw("reshape", a, 2, 2),
            "t": lambda a=a: build.raw("t", a),
            "row": lambda a=a: build.raw("expand_as", build.raw(operator.getitem, a, 0), a),
            "times one": lambda a=a: build.raw(operator.mul, a, 1),
            "off": lambda a=a: build.raw(F.dropout, a, 0.5, False),
            "add_": lambda a=a, b=b: build.raw("add_", a, b),
            "mul_": lambda a=a: build.raw("mul_", a, 0.5),
            "iadd": lambda a=a, b=b: build.raw(operator.iadd, a, b),
            "relu_": lambda a=a: build.raw(F.relu, a, inplace=True),
        }[kind]
        found.append(new())
    return build.output(*found)


@given(st.lists(STEPS, min_size=1, max_size=9))
@example([("neg", 0, 0), ("view", 2, 0), ("add_", 2, 0), ("neg", 3, 0)])
@example([("neg", 0, 0), ("times one", 2, 0), ("t", 3, 0), ("iadd", 3, 0)])
@example([("off", 0, 0), ("add_", 2, 1), ("mul_", 3, 0)])
@example([("neg", 0, 0), ("relu_", 2, 0), ("add_", 3, 2), ("t", 2, 0), ("mul_", 5, 0)])
def test_a_random_program_computes_what_it_did(steps: list[tuple[str, int, int]]) -> None:
    try:
        graph = _program(steps)
        inputs = values(graph)  # type: ignore[arg-type]
        before = run(graph, inputs)  # type: ignore[arg-type]
    except RuntimeError:  # torch refuses to write expanded or partly overlapping memory
        assume(False)
        return
    assert graph is not None
    canonicalize(graph, Context())
    check_graph(graph, stage="canonicalize")
    after = run(graph, inputs)
    assert same(after[0], before[0])
    assert same(list(after[1].values()), list(before[1].values()))
