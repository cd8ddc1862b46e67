"""Replacements go back into the graph they were found in, each where it is sound."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from hybrid_fx.passes.graft import Grafted, graft, snapshot, working_copy
from hybrid_fx.passes.operators import OPERATORS

Edit = Callable[[fx.Graph, dict[str, fx.Node]], None]


def _graph(build: Callable[[fx.Graph, fx.Node, fx.Node], Any]) -> fx.Graph:
    graph = fx.Graph()
    result = build(graph, graph.placeholder("x"), graph.placeholder("y"))
    graph.output(result)
    return graph


def _through(graph: fx.Graph, edit: Edit) -> Grafted:
    """``edit`` a working copy, given its nodes by name, and graft."""
    work = working_copy(graph)
    before = snapshot(work)
    edit(work, {node.name: node for node in work.nodes})
    return graft(graph, work, before)


def _text(graph: fx.Graph) -> list[str]:
    return [str(node.format_node()) for node in graph.nodes]


def _run(graph: fx.Graph) -> Any:
    x, y = torch.arange(4.0), torch.full((4,), 3.0)
    return fx.Interpreter(fx.GraphModule({}, graph)).run(x, y), x, y


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return all(map(_same, one, other))


def _sum_of_squares(graph: fx.Graph, x: fx.Node, y: fx.Node) -> fx.Node:
    left = graph.call_method("square", (x,))
    total = graph.call_function(operator.add, (left, y))
    other = graph.call_method("exp", (y,))
    return graph.call_function(operator.mul, (total, other))


def _read_twice(graph: fx.Graph, x: fx.Node, y: fx.Node) -> tuple[fx.Node, fx.Node]:
    """``exp(x) + y`` and ``exp(x) * y``, the exponential computed once."""
    shared = graph.call_function(OPERATORS["exp"], (x,))
    one = graph.call_function(operator.add, (shared, y))
    return one, graph.call_function(operator.mul, (shared, y))


def _fuse_add(work: fx.Graph, at: dict[str, fx.Node]) -> None:
    """``square(x) + y`` becomes one ``scaled_add``, in front of the sum."""
    with work.inserting_before(at["add"]):
        square = work.call_function(OPERATORS["mul"], (at["x"], at["x"]))
        new = work.call_function(OPERATORS["scaled_add"], (square, at["y"]))
    at["add"].replace_all_uses_with(new)
    work.erase_node(at["add"])


def test_a_replacement_takes_its_place_and_nothing_else_changes() -> None:
    graph = _graph(_sum_of_squares)
    before = _text(graph)
    done = _through(graph, _fuse_add)
    assert done.count == 1
    assert done.declined == ()
    assert [node.name for node in done.graph.nodes] == [
        "x",
        "y",
        "mul_1",
        "add_1",
        "exp",
        "mul",
        "output",
    ]
    assert _text(graph) == before
    assert _same(_run(done.graph), _run(graph))


def test_where_a_pass_changed_nothing_the_graph_comes_back_as_it_was() -> None:
    graph = _graph(_sum_of_squares)
    done = _through(graph, lambda *_: None)
    assert done.count == 0
    assert _text(done.graph) == _text(graph)


def test_what_a_pass_only_moved_keeps_its_place() -> None:
    graph = _graph(_sum_of_squares)
    done = _through(graph, lambda _, at: at["square"].prepend(at["exp"]))
    assert _text(done.graph) == _text(graph)


def test_a_part_that_others_read_stays() -> None:
    def build(graph: fx.Graph, x: fx.Node, y: fx.Node) -> Any:
        result = _sum_of_squares(graph, x, y)
        return result, next(node for node in graph.nodes if node.name == "square")

    graph = _graph(build)
    done = _through(graph, _fuse_add)
    assert done.count == 1
    assert "square" in {node.name for node in done.graph.nodes}
    assert _same(_run(done.graph), _run(graph))


@pytest.mark.parametrize("what", ["x", "square", "add"])
def test_a_region_whose_values_are_written_in_place_is_left_alone(what: str) -> None:
    def build(graph: fx.Graph, x: fx.Node, y: fx.Node) -> Any:
        square = graph.call_function(OPERATORS["square"], (x,))
        if what == "x":
            graph.call_function(OPERATORS["add_"], (x, 5.0))
        if what == "square":
            graph.call_function(OPERATORS["add_"], (square, 5.0))
        total = graph.call_function(operator.add, (square, y))
        if what == "add":
            graph.call_function(OPERATORS["add_"], (total, 5.0))
        return total

    def edit(work: fx.Graph, at: dict[str, fx.Node]) -> None:
        with work.inserting_before(at["add"]):
            source = at["square"] if what == "square" else at["x"]
            args = (source, at["y"]) if what == "square" else (source, source)
            new = work.call_function(OPERATORS["mul"], args)
        at["add"].replace_all_uses_with(new)

    graph = _graph(build)
    done = _through(graph, edit)
    assert done.count == 0
    ((_, why),) = done.declined
    assert why.expected == "a value that nothing writes in place"
    assert _text(done.graph) == _text(graph)


def unheard_of(x: Any) -> Any:
    """Opens a scope, for all one knows."""
    return None


def test_a_region_around_a_call_of_which_nothing_is_known_is_left_alone() -> None:
    def build(graph: fx.Graph, x: fx.Node, y: fx.Node) -> Any:
        square = graph.call_function(OPERATORS["square"], (x,))
        graph.call_function(unheard_of, (7,))
        return graph.call_function(operator.add, (square, y))

    graph = _graph(build)
    done = _through(graph, _fuse_add)
    assert done.count == 0
    assert done.declined[0][1].expected == "the scope of add"
    assert _text(done.graph) == _text(graph)


def test_one_replacement_that_is_left_out_leaves_the_others_in() -> None:
    def build(graph: fx.Graph, x: fx.Node, y: fx.Node) -> Any:
        one = graph.call_function(OPERATORS["exp"], (x,))
        copy = graph.call_function(OPERATORS["clone"], (y,))
        other = graph.call_function(OPERATORS["exp"], (copy,))
        graph.call_function(OPERATORS["add_"], (copy, 1.0))
        return one, other

    def edit(work: fx.Graph, at: dict[str, fx.Node]) -> None:
        for old, source in ((at["exp"], at["x"]), (at["exp_1"], at["clone"])):
            with work.inserting_before(old):
                new = work.call_function(OPERATORS["exp2"], (source,))
            old.replace_all_uses_with(new)

    done = _through(_graph(build), edit)
    assert done.count == 1
    assert len(done.declined) == 1
    names = [node.target for node in done.graph.nodes if node.op == "call_function"]
    assert names == [OPERATORS[name] for name in ("exp2", "clone", "exp", "add_")]


def test_a_value_that_others_still_read_stays_for_them() -> None:
    def edit(work: fx.Graph, at: dict[str, fx.Node]) -> None:
        with work.inserting_before(at["add"]):
            new = work.call_function(OPERATORS["neg"], (at["x"],))
        at["add"].replace_input_with(at["exp"], new)

    done = _through(_graph(_read_twice), edit)
    assert done.count == 1
    (total, product), x, y = _run(done.graph)
    assert torch.equal(total, -x + y)
    assert torch.equal(product, x.exp() * y)


def test_a_reader_that_alone_left_a_value_is_replaced_itself() -> None:
    def edit(work: fx.Graph, at: dict[str, fx.Node]) -> None:
        with work.inserting_before(at["add"]):
            new = work.call_function(OPERATORS["neg"], (at["exp"],))
        at["add"].replace_input_with(at["exp"], new)

    graph = _graph(_read_twice)
    done = _through(graph, edit)
    (added, product), _, _ = _run(done.graph)
    x, y = torch.arange(4.0), torch.full((4,), 3.0)
    assert torch.equal(added, y - x.exp())
    assert torch.equal(product, x.exp() * y), "the other reader still sees the value"


def test_a_value_put_around_another_one_is_read_by_all_who_read_that() -> None:
    def edit(work: fx.Graph, at: dict[str, fx.Node]) -> None:
        with work.inserting_after(at["exp"]):
            new = work.call_function(OPERATORS["neg"], (at["exp"],))
        at["exp"].replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    graph = _graph(_sum_of_squares)
    done = _through(graph, edit)
    assert torch.equal(_run(done.graph)[0], -_run(graph)[0])


def test_random_numbers_that_a_replacement_leaves_unread_are_drawn_all_the_same() -> None:
    def build(graph: fx.Graph, x: fx.Node, y: fx.Node) -> Any:
        drawn = graph.call_function(F.dropout, (x, 0.5, True))
        off = graph.call_function(F.dropout, (y, 0.5, False))
        return graph.call_function(operator.add, (drawn, off))

    def edit(work: fx.Graph, at: dict[str, fx.Node]) -> None:
        with work.inserting_before(at["add"]):
            new = work.call_function(OPERATORS["sub"], (at["x"], at["y"]))
        at["add"].replace_all_uses_with(new)

    done = _through(_graph(build), edit)
    left = [node.args[2] for node in done.graph.nodes if node.target is F.dropout]
    assert left == [True]


def test_a_replacement_that_needs_a_later_value_is_left_out() -> None:
    def edit(work: fx.Graph, at: dict[str, fx.Node]) -> None:
        at["square"].prepend(at["exp"])
        with work.inserting_before(at["square"]):
            new = work.call_function(OPERATORS["neg"], (at["exp"],))
        at["square"].replace_all_uses_with(new)

    graph = _graph(_sum_of_squares)
    done = _through(graph, edit)
    assert done.count == 0
    assert done.declined[0][1].found == "a later one"
