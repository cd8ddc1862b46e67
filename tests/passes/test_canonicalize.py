"""One spelling for every operation; the values stay as they were, bit by bit."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small_graphs import Builder, count, run, same, text, values
from torch import fx

from hybrid_fx.passes.canonicalize import canonicalize
from hybrid_fx.passes.contract import Context
from hybrid_fx.passes.graph import calls
from hybrid_fx.passes.operators import OPERATORS
from hybrid_fx.passes.spec import IllegalGraphError, check_graph

Make = Callable[[Builder, fx.Node, fx.Node], fx.Node]


def _turned(b: Builder, x: fx.Node, y: fx.Node) -> fx.Node:
    """The rows of y at the places that a column of x sorts them to."""
    column = b.raw(operator.getitem, x, (slice(None), 0, 0))
    places = b.raw(operator.getitem, b.raw(torch.sort, column), 1)
    out = b.raw("neg", x)
    b.raw(operator.setitem, out, places, y)
    return b.raw("neg", out)


#: Four rows, and the matrices of two groups: sizes that the kernel takes in half precision.
_GROUPS = {"rows": (4, 8), "matrices": (2, 8, 16)}

#: What is written, how (x and y are [2, 3, 4] float32), and the operators that are left of it.
SPELLINGS: dict[str, tuple[Make, str]] = {
    "torch.add": (lambda b, x, y: b.raw(torch.add, x, y), "add"),
    "x.add": (lambda b, x, y: b.raw("add", x, y), "add"),
    "x.add(other=)": (lambda b, x, y: b.raw("add", x, other=y), "add"),
    "torch.add(alpha)": (lambda b, x, y: b.raw(torch.add, x, y, alpha=0.3), "scaled_add"),
    "x.sub(alpha)": (lambda b, x, y: b.raw("sub", x, y, alpha=3), "scaled_sub"),
    "x.add_(alpha)": (lambda b, x, y: b.raw("add_", b.raw("neg", x), y, alpha=3), "neg scaled_add"),
    "torch.div": (lambda b, x, y: b.raw(torch.div, x, y), "truediv"),
    "number * x": (lambda b, x, y: b.raw(operator.mul, 0.1, x), "mul"),
    "torch.mul(number)": (lambda b, x, y: b.raw(torch.mul, 0.1, x), "torch_mul"),
    "torch.add(number)": (lambda b, x, y: b.raw(torch.add, 0.1, x), "scaled_add"),
    "torch.sub(number)": (lambda b, x, y: b.raw(torch.sub, 0.1, x), "scaled_sub"),
    "torch.div(number)": (lambda b, x, y: b.raw(torch.div, 0.1, x), "div"),
    "floor": (lambda b, x, y: b.raw(torch.div, x, y, rounding_mode="floor"), "div"),
    "x.div floor": (lambda b, x, y: b.raw("div", x, y, rounding_mode="floor"), "div"),
    "x.pow": (lambda b, x, y: b.raw("pow", x, 2), "pow"),
    "torch.pow": (lambda b, x, y: b.raw(torch.pow, x, exponent=2), "pow"),
    "torch.matmul": (
        lambda b, x, y: b.raw(torch.matmul, x, other=b.raw("transpose", y, dim0=1, dim1=2)),
        "transpose matmul",
    ),
    "x.mean": (lambda b, x, y: b.raw("mean", x, -1, keepdim=True), "mean"),
    "x.mean(dim=)": (lambda b, x, y: b.raw(torch.mean, x, dim=-1, keepdim=True), "mean"),
    "x.softmax(dtype)": (lambda b, x, y: b.raw("softmax", x, -1, torch.float64), "softmax"),
    "torch.softmax(dtype)": (
        lambda b, x, y: b.raw(torch.softmax, x, -1, torch.float64),
        "softmax",
    ),
    "F.softmax(dtype)": (
        lambda b, x, y: b.raw(F.softmax, x, dim=-1, dtype=torch.float64),
        "softmax",
    ),
    "F.softmax(stacklevel)": (lambda b, x, y: b.raw(F.softmax, x, -1, 3), "softmax"),
    "x.log_softmax": (
        lambda b, x, y: b.raw("log_softmax", x, -1, torch.float64),
        "log_softmax",
    ),
    "x.where": (lambda b, x, y: b.raw("where", x, b.raw("gt", x, 0), y), "gt where"),
    "torch.where": (lambda b, x, y: b.raw(torch.where, b.raw("gt", x, 0), x, y), "gt where"),
    "x.float": (lambda b, x, y: b.raw("float", b.raw("double", x)), "to to"),
    "x.to(other)": (lambda b, x, y: b.raw("to", x, b.raw("double", y)), "to"),
    "x.type": (lambda b, x, y: b.raw("type", x, torch.float64), "to"),
    "x.view": (lambda b, x, y: b.raw("view", x, 2, -1), "view"),
    "x.view(tuple)": (lambda b, x, y: b.raw("view", x, (2, -1)), "view"),
    "x.reshape(size)": (lambda b, x, y: b.raw("reshape", x, -1), "reshape"),
    "x[index] = y": (_turned, "getitem sort getitem neg index_put neg"),
    "x.view(dtype)": (lambda b, x, y: b.raw("view", x, torch.int32), "view"),
    "x.permute": (lambda b, x, y: b.raw("permute", x, 2, 0, 1), "permute"),
    "x.T": (lambda b, x, y: b.raw(getattr, b.raw("flatten", x, 1), "T"), "flatten t"),
    "x.split(split_size=)": (
        lambda b, x, y: b.raw(operator.getitem, b.raw("split", x, split_size=1, dim=-1), 1),
        "split getitem",
    ),
    "torch.cat(dim=)": (lambda b, x, y: b.raw(torch.cat, [x, y], dim=-1), "cat"),
    "concat": (lambda b, x, y: b.raw(torch.concat, (x, y), -1), "cat"),
    "x.clip": (lambda b, x, y: b.raw("clip", x, -1, 1), "clamp"),
    "relu(inplace)": (
        lambda b, x, y: b.raw(F.relu, b.raw("neg", x), inplace=True),
        "neg relu",
    ),
    "relu(positional)": (lambda b, x, y: b.raw(F.relu, b.raw("neg", x), True), "neg relu"),
    "silu(not in place)": (lambda b, x, y: b.raw(F.silu, x, inplace=False), "silu"),
    "leaky_relu": (
        lambda b, x, y: b.raw(F.leaky_relu, b.raw("neg", x), 0.2, True),
        "neg leaky_relu",
    ),
    "x += y": (lambda b, x, y: b.raw(operator.iadd, b.raw("neg", x), y), "neg add"),
    "F.linear(input=, weight=)": (
        lambda b, x, y: b.raw(F.linear, input=x, weight=b.raw("flatten", y, 0, 1)),
        "flatten linear",
    ),
    "F.embedding(input=, weight=)": (
        lambda b, x, y: b.raw(
            F.embedding,
            input=b.raw("long", b.raw("gt", x, 0)),
            weight=b.raw("flatten", y, 0, 1),
            padding_idx=0,
            max_norm=None,
            norm_type=2.0,
            scale_grad_by_freq=False,
            sparse=False,
        ),
        "gt to flatten embedding",
    ),
    "x.index_copy(source=)": (
        lambda b, x, y: b.raw("index_copy", x, dim=0, index=b.raw(torch.tensor, [1, 0]), source=y),
        "tensor index_copy",
    ),
    "layer_norm": (
        lambda b, x, y: b.raw(F.layer_norm, x, normalized_shape=(4,), eps=1e-3),
        "layer_norm",
    ),
}
GONE: dict[str, Make] = {
    "a cast to the same dtype": lambda b, x, y: b.raw("float", x),
    "a move to the same device": lambda b, x, y: b.raw("to", x, "cpu"),
    "dropout that is off": lambda b, x, y: b.raw(F.dropout, x, 0.5, False),
    "dropout of nothing": lambda b, x, y: b.raw(F.dropout, x, p=0.0, training=True),
    "a factor of one": lambda b, x, y: b.raw(operator.mul, x, 1.0),
    "one times": lambda b, x, y: b.raw(operator.mul, 1, x),
    "a whole slice": lambda b, x, y: b.raw(operator.getitem, x, (slice(None), slice(0, None))),
    "an ellipsis": lambda b, x, y: b.raw(operator.getitem, x, ...),
    "a view as it was": lambda b, x, y: b.raw("view", x, 2, 3, 4),
}
STAYS: dict[str, tuple[Make, str]] = {
    "a cast": (lambda b, x, y: b.raw("half", x), "to"),
    "a copy": (lambda b, x, y: b.raw("to", x, torch.float32, copy=True), "to"),
    "a factor of one that changes the dtype": (
        lambda b, x, y: b.raw(operator.mul, b.raw("gt", x, 0), 1),
        "gt mul",
    ),
    "a factor of True": (lambda b, x, y: b.raw(operator.mul, x, True), "mul"),
    "a factor of two": (lambda b, x, y: b.raw(operator.mul, x, 2), "mul"),
    "a slice of a part": (
        lambda b, x, y: b.raw(operator.getitem, x, (..., slice(1, None))),
        "getitem",
    ),
    "a new axis": (lambda b, x, y: b.raw(operator.getitem, x, (..., None)), "getitem"),
    "a view of another shape": (lambda b, x, y: b.raw("view", x, 6, 4), "view"),
    "dropout that is on": (lambda b, x, y: b.raw(F.dropout, x, 1.0, True), "dropout"),
    "an embedding that clips its rows": (
        lambda b, x, y: b.raw(
            F.embedding, b.raw("long", b.raw("gt", x, 0)), b.raw("flatten", y, 0, 1), max_norm=0.5
        ),
        "gt to flatten embedding",
    ),
}


def _graph(make: Make) -> fx.Graph:
    build = Builder()
    x, y = build.input("x", 2, 3, 4), build.input("y", 2, 3, 4)
    return build.output(make(build, x, y))


def _names(graph: fx.Graph) -> str:
    from hybrid_fx.passes.graph import name_of

    return " ".join(str(name_of(n)) for n in graph.nodes if n.op == "call_function")


@pytest.mark.parametrize("what", SPELLINGS)
def test_a_spelling_becomes_the_canonical_one(what: str) -> None:
    make, names = SPELLINGS[what]
    graph = _graph(make)
    given = values(graph)
    before = run(graph, given)
    canonicalize(graph, Context())
    check_graph(graph, stage="canonicalize")
    assert _names(graph) == names
    assert not any({"input", "weight", "source"} & n.kwargs.keys() for n in graph.nodes)
    assert same(run(graph, given)[0], before[0])
    assert same(list(run(graph, given)[1].values()), list(before[1].values()))


@pytest.mark.parametrize("what", GONE)
def test_what_does_nothing_goes(what: str) -> None:
    graph = _graph(GONE[what])
    given = values(graph)
    before = run(graph, given)[0]
    assert canonicalize(graph, Context()).count > 0
    assert _names(graph) == ""
    assert same(run(graph, given)[0], before)


@pytest.mark.parametrize("what", STAYS)
def test_what_does_something_stays(what: str) -> None:
    make, names = STAYS[what]
    graph = _graph(make)
    given = values(graph)
    before = run(graph, given)[0]
    canonicalize(graph, Context())
    assert _names(graph) == names
    assert same(run(graph, given)[0], before)


@pytest.mark.parametrize("what", [*SPELLINGS, *GONE, *STAYS])
def test_a_second_run_changes_nothing(what: str) -> None:
    make = GONE[what] if what in GONE else (SPELLINGS | STAYS)[what][0]
    graph = _graph(make)
    canonicalize(graph, Context())
    before = text(graph)
    assert canonicalize(graph, Context()).count == 0
    assert text(graph) == before


def test_what_others_use_keeps_its_value() -> None:
    build = Builder()
    x = build.input("x", 2, 3)
    cast = build.raw("float", x)
    dropped = build.raw(F.dropout, cast, 0.1, False)
    graph = build.output(build.raw(operator.add, cast, dropped), cast, dropped)
    given = values(graph)
    before = run(graph, given)[0]
    canonicalize(graph, Context())
    assert same(run(graph, given)[0], before)
    assert _names(graph) == "add"


def _conv1d(build: Builder, *, rows: int = -1) -> fx.Node:
    """GPT-2's Conv1D: addmm on flattened rows, viewed back."""
    x = build.input("x", 2, 3, 4)
    weight, bias = build.weight("w", 4, 5), build.weight("b", 5)
    flat = build.raw("view", x, rows, 4)
    return build.raw(torch.addmm, bias, flat, weight)


def test_products_of_groups_are_one_operator_with_places_for_its_arguments() -> None:
    build = Builder()
    rows, matrices = (build.raw("bfloat16", build.input(n, *s)) for n, s in _GROUPS.items())
    ends = build.raw(torch.arange, 1, 5, 3, dtype=torch.int32)
    graph = build.output(build.raw(F.grouped_mm, rows, matrices, offs=ends, bias=None))
    given = values(graph)
    before = run(graph, given)[0]
    canonicalize(graph, Context())
    (node,) = calls(graph, "grouped_mm")
    assert node.args[2].target is OPERATORS["arange"]
    assert not node.kwargs
    assert same(run(graph, given)[0], before)
    check_graph(graph, stage="canonicalize")


def test_conv1d_becomes_a_linear_on_the_turned_weight() -> None:
    build = Builder()
    graph = build.output(build.raw("view", _conv1d(build), (2, 3, 5)))
    given = values(graph)
    before = run(graph, given)[0]
    canonicalize(graph, Context())
    assert _names(graph) == "t linear"
    assert torch.allclose(run(graph, given)[0], before, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 2, 5), (6, 5), (2, 15)])
def test_a_product_viewed_otherwise_is_no_linear(shape: tuple[int, ...]) -> None:
    build = Builder()
    graph = build.output(build.raw("view", _conv1d(build), shape))
    given = values(graph)
    before = run(graph, given)[0]
    canonicalize(graph, Context())
    assert not calls(graph, "linear")
    assert same(run(graph, given)[0], before)


def test_a_rule_leaves_memory_that_is_written_in_place_alone() -> None:
    build = Builder()
    x = build.input("x", 2, 3)
    copy = build.raw(operator.mul, x, 1)
    view = build.raw("view", copy, 6)
    build.raw("add_", copy, 1.0)
    graph = build.output(view, x)
    given = values(graph)
    before = run(graph, given)
    canonicalize(graph, Context())
    after = run(graph, given)
    assert same(after[0], before[0])
    assert same(after[1]["x"], given["x"]), "x itself is not written"


def test_a_product_written_in_place_is_no_linear() -> None:
    build = Builder()
    product = _conv1d(build)
    view = build.raw("view", product, (2, 3, 5))
    build.raw("mul_", product, 2.0)
    graph = build.output(view)
    given = values(graph)
    before = run(graph, given)[0]
    canonicalize(graph, Context())
    assert torch.allclose(run(graph, given)[0], before, atol=1e-6)


def test_scopes_that_change_nothing_go_and_others_are_refused() -> None:
    for enabled in (False, True):
        build = Builder()
        x = build.input("x", 2)
        enter = build.graph.call_function(
            torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, enabled, None)
        )
        enter.meta |= {"path": "", "val": None}
        y = build.raw("neg", x)
        leave = build.graph.call_function(torch.amp.autocast_mode._exit_autocast, (enter,))
        leave.meta |= {"path": "", "val": None}
        graph = build.output(y)
        canonicalize(graph, Context())
        if enabled:
            with pytest.raises(IllegalGraphError, match="_enter_autocast"):
                check_graph(graph, stage="s")
        else:
            assert _names(graph) == "neg"


@pytest.mark.parametrize("name", ["linalg_svdvals", "__setitem__", "index_fill_"])
def test_what_the_table_lacks_is_left_for_the_specification(name: str) -> None:
    build = Builder()
    x = build.input("x", 4)
    if name == "linalg_svdvals":
        build.raw(torch.linalg.svdvals, build.raw("view", x, 2, 2))
    elif name == "__setitem__":
        node = build.graph.call_function(operator.setitem, (x, 0, 1.0))
        node.meta |= {"path": "", "val": None}
    else:
        build.raw("index_fill_", x, 0, build.raw(torch.arange, 2), 1.0)
    graph = build.output(x)
    canonicalize(graph, Context())
    with pytest.raises(IllegalGraphError):
        check_graph(graph, stage="canonicalize")


def test_gather_of_a_tensor_is_not_the_gather_of_a_weight() -> None:
    build = Builder()
    x = build.input("x", 2, 3)
    index = build.input("i", 2, 3, dtype=torch.int64)
    graph = build.output(build.raw("gather", x, 0, build.raw("clamp", index, 0, 1)))
    given = values(graph)
    before = run(graph, given)[0]
    canonicalize(graph, Context())
    check_graph(graph, stage="s")
    assert count(graph, "gather_along") == 1
    assert same(run(graph, given)[0], before)
