"""A node shown with its neighbours: complete, in order, and no wider than a terminal."""

from __future__ import annotations

from small_graphs import Builder
from torch import fx

from hybrid_fx.passes.graph import calls
from hybrid_fx.passes.show import changes, line, listing, neighbourhood


def _chain(length: int) -> tuple[Builder, list[fx.Node]]:
    build = Builder()
    nodes = [build.input("x", 2, 3)]
    for index in range(length):
        nodes.append(build.call("neg", nodes[-1], path=f"layers.{index}"))
    return build, nodes


def test_a_line_says_name_kind_call_and_place() -> None:
    build = Builder()
    x, w = build.input("x", 2, 3), build.weight("lin.weight", 4, 3)
    buffer = build.weight("table", 4, parameter=False)
    assert line(x) == "x: float32[2, 3]  (input x)"
    assert line(w) == "lin_weight: float32[4, 3]  (parameter lin.weight)"
    assert line(buffer) == "table: float32[4]  (weight table)"
    out = build.call("linear", x, w, None, path="lin")
    assert line(out) == "linear: float32[2, 4] = linear(x, lin.weight, None)  in lin"
    parts = build.call("split", out, [1, 3], -1)
    assert line(parts) == "split: (float32[2, 1], float32[2, 3]) = split(linear, [1, 3], -1)"
    method = build.raw("sum", out, dim=(0,))
    assert line(method) == "sum_1: float32[4] = .sum(linear, dim=(0))"
    assert line(next(n for n in build.output(out).nodes if n.op == "output")) == "output(linear)"


def test_far_inputs_and_users_are_shown_in_order_with_gaps() -> None:
    build, nodes = _chain(12)
    middle = build.call("add", nodes[1], nodes[6], path="here")
    last = build.call("mul", middle, nodes[12], path="there")
    build.output(last)
    assert neighbourhood(middle, reach=1).splitlines() == [
        "         ...",
        "  input  neg: float32[2, 3] = neg(x)  in layers.0",
        "         ...",
        "  input  neg_5: float32[2, 3] = neg(neg_4)  in layers.5",
        "         ...",
        "         neg_11: float32[2, 3] = neg(neg_10)  in layers.11",
        "     ->  add: float32[2, 3] = add(neg, neg_5)  in here",
        "   user  mul: float32[2, 3] = mul(add, neg_11)  in there",
    ]


def test_many_neighbours_are_counted_and_lines_are_cut() -> None:
    build, (x,) = _chain(0)
    many = [build.call("neg", x, path="a") for _ in range(30)]
    joined = build.call("cat", many, 0, path="a")
    for _ in range(11):
        build.call("exp", joined, path="a")
    build.output(joined)
    text = neighbourhood(calls(build.graph, "cat")[0])
    assert "and 22 more inputs" in text
    assert "and 4 more users" in text  # ten are read: eight of them shown, and the output
    assert max(map(len, text.splitlines())) <= 119
    assert " …" in text


def test_a_listing_tells_names_as_seen_from_inside_the_module() -> None:
    build = Builder()
    x, w = build.input("x", 2, 3), build.weight("layers.0.lin.weight", 4, 3)
    build.output(build.call("linear", x, w, None, path="layers.0.lin"))
    assert listing(build.graph, "layers.0") == [
        "linear: float32[2, 4] = linear(x, lin.weight, None)  in lin"
    ]
    assert listing(build.graph, "layers.1") == []


def test_changes_show_what_went_and_what_came_with_gaps_between() -> None:
    before = [f"line {index}" for index in range(12)]
    after = [*before[:2], "new", *before[3:10], *before[11:]]
    assert changes(before, after, around=1).splitlines() == [
        "  ...",
        "  line 1",
        "- line 2",
        "+ new",
        "  line 3",
        "  ...",
        "  line 9",
        "- line 10",
        "  line 11",
    ]
    assert changes(before, before) == ""
