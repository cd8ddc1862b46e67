"""hoist: what depends on weights alone moves to the prepare graph, and nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from captured_models import canonical
from small_graphs import Builder, count, run, same, text, values
from torch import fx

from hybrid_fx.passes.binding import weight_only, weights_first
from hybrid_fx.passes.contract import Context
from hybrid_fx.passes.gather import gather_weights
from hybrid_fx.passes.graph import calls, name_of
from hybrid_fx.passes.hoist import hoist

KINDS = ("llama", "gpt2", "opt")


def _hoisted_values(graph: fx.Graph) -> None:
    """Hoist, run both stages one after the other, and compare with the whole."""
    given = values(graph)
    before = run(graph, given)[0]
    staged = hoist(graph)
    prepared = run(staged.prepare, given)[0]
    feed = {}
    for node in staged.body.nodes:
        if node.op == "placeholder":
            index = node.meta.get("prepared")
            feed[node.name] = given[node.name] if index is None else prepared[index]
    assert same(run(staged.body, feed)[0], before)


def test_what_depends_on_weights_alone_moves_and_nothing_else() -> None:
    build = Builder()
    x, w, u = build.input("x", 3, 4), build.weight("w", 4, 4), build.weight("u", 4, 4)
    stacked = build.call("cat", (w, build.call("t", u)), 0)
    scaled = build.call("mul", stacked, 2.0)
    mixed = build.call("linear", x, scaled, None)
    graph = build.output(build.call("add", mixed, build.call("sum", x)))
    given = values(graph)
    before = run(graph, given)[0]
    staged = hoist(graph)
    assert [name_of(n) for n in staged.prepare.nodes if n.op == "call_function"] == [
        "t", "cat", "mul",
    ]  # fmt: skip
    assert [name_of(n) for n in staged.body.nodes if n.op == "call_function"] == [
        "linear", "sum", "add",
    ]  # fmt: skip
    assert staged.recipes == ("mul(cat((w, t(u)), 0), 2.0)",) or "cat" in staged.recipes[0]
    assert staged.owned == (True,)
    (tensor,) = run(staged.prepare, given)[0]
    holders = [n for n in staged.body.nodes if n.op == "placeholder"]
    feed = {n.name: tensor if "prepared" in n.meta else given[n.name] for n in holders}
    assert same(run(staged.body, feed)[0], before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_decoder_prepares_from_weights_alone(kind: str) -> None:
    graph = canonical(kind)
    gather_weights(graph, Context())
    staged = hoist(graph)
    inputs = [n for n in staged.prepare.nodes if n.op == "placeholder"]
    assert all("weight" in node.meta for node in inputs)
    left = [n for n in staged.body.nodes if n.op == "placeholder" and "weight" in n.meta]
    assert not left, "the body takes prepared tensors only"
    assert count(staged.body, "gather") == 0
    assert len(set(staged.names)) == len(staged.names)


def test_a_second_hoist_finds_nothing_more() -> None:
    graph = canonical("llama")
    gather_weights(graph, Context())
    staged = hoist(graph)
    before = text(staged.body)
    again = hoist(staged.body)
    assert not again.names
    assert text(again.body) == before


def test_a_buffer_that_is_written_stays_with_what_reads_it() -> None:
    """Longrope's way: the buffer is filled from what depends on the tokens, then read."""
    build = Builder()
    x, w = build.input("x", 4), build.weight("w", 4)
    buffer = build.weight("inv_freq", 4, parameter=False)
    build.call("copy_", buffer, build.call("mul", x, w))
    fixed = build.call("exp", w)
    graph = build.output(build.call("add", build.call("neg", buffer), fixed))
    given = values(graph)
    before = run(graph, given)
    gather_weights(graph, Context())
    staged = hoist(graph)
    names = [name_of(n) for n in staged.body.nodes if n.op == "call_function"]
    assert names == ["mul", "copy_", "neg", "add"] or set(names) >= {"copy_", "neg"}
    assert "exp" not in names
    assert "copy_" not in [name_of(n) for n in staged.prepare.nodes]
    own = {name: tensor.clone() for name, tensor in given.items()}
    holders = [n for n in staged.prepare.nodes if n.op == "placeholder"]
    prepared = fx.Interpreter(fx.GraphModule({}, staged.prepare)).run(
        *(own[n.name] for n in holders)
    )
    feed = [
        prepared[n.meta["prepared"]] if "prepared" in n.meta else own[n.name]
        for n in staged.body.nodes
        if n.op == "placeholder"
    ]
    assert same(fx.Interpreter(fx.GraphModule({}, staged.body)).run(*feed), before[0])
    assert same(own["inv_freq"], before[1]["inv_freq"]), "and the buffer itself is written"


def test_a_view_of_a_written_buffer_stays_as_well() -> None:
    build = Builder()
    x = build.input("x", 4)
    buffer = build.weight("b", 2, 2, parameter=False)
    early = build.call("view", buffer, (4,))
    build.call("add_", buffer, 1.0)
    graph = build.output(build.call("add", early, x))
    assert [n for n in weight_only(graph) if n.op != "placeholder"] == []


def test_what_reads_a_buffer_that_is_written_through_a_view_stays() -> None:
    build = Builder()
    x, buffer = build.input("x", 2, 2), build.weight("b", 2, 2, parameter=False)
    build.call("add_", build.call("view", buffer, (4,)), 1.0)
    graph = build.output(build.call("add", build.call("exp", buffer), x))
    assert [n for n in weight_only(graph) if n.op != "placeholder"] == []


def test_what_the_table_lacks_or_writes_by_a_keyword_stays() -> None:
    build = Builder()
    w = build.weight("w", 4, parameter=False)
    unknown = build.raw(torch.special.gammaln, w)
    writes = build.raw(F.relu, build.call("neg", w), inplace=True)
    graph = build.output(unknown, writes)
    assert not {unknown, writes} & weight_only(graph).keys()
    assert hoist(graph).names


def test_only_tensors_are_prepared_and_sizes_of_weights_stay_where_they_are_read() -> None:
    build = Builder()
    x, w = build.input("x", 8), build.weight("w", 2, 4)
    rows = build.call("size", w, 0)
    graph = build.output(build.call("reshape", x, (rows, -1)), build.call("linear", w, w, None))
    given = values(graph)
    before = run(graph, given)[0]
    staged = hoist(graph)
    prepared = run(staged.prepare, given)[0]
    assert all(isinstance(tensor, torch.Tensor) for tensor in prepared)
    assert count(staged.body, "size") == 1
    holders = [n for n in staged.body.nodes if n.op == "placeholder"]
    feed = {n.name: prepared[n.meta["prepared"]] for n in holders if "prepared" in n.meta}
    assert same(run(staged.body, {**given, **feed})[0], before)


def test_prepared_tensors_made_alike_have_names_of_their_own() -> None:
    build = Builder()
    x, w, u = build.input("x", 4, 4), build.weight("w", 4, 4), build.weight("u", 4, 4)
    turned = [build.call("t", tensor, path="layer") for tensor in (w, u)]
    graph = build.output(*(build.call("linear", x, tensor, None) for tensor in turned))
    assert hoist(graph).names == ("layer.t", "layer.t_2")


def test_what_writes_a_copy_of_a_weight_stays() -> None:
    build = Builder()
    x, w = build.input("x", 4), build.weight("w", 4)
    copy = build.call("clone", w)
    build.call("mul_", copy, 2.0)
    graph = build.output(build.call("add", copy, x))
    _hoisted_values(graph)


def test_what_draws_random_numbers_stays_and_draws_for_each_call() -> None:
    build = Builder()
    x, weight = build.input("x", 2, 4), build.weight("w", 3, 4)
    thinned = build.call("dropout", weight, 0.5, True)
    split = hoist(build.output(build.call("linear", x, thinned, None)))
    assert len(calls(split.body, "dropout")) == 1
    assert calls(split.prepare, "dropout") == []


def test_constants_stay_where_they_are_read() -> None:
    build = Builder()
    x, w = build.input("x", 4), build.weight("w", 4)
    constant = build.call("arange", 4)
    graph = build.output(build.call("add", build.call("mul", x, constant), w))
    # a constant has no fake tensor of the graph's own; the call alone decides
    staged = hoist(graph)
    assert "arange" in [name_of(n) for n in staged.body.nodes]
    assert "arange" not in [name_of(n) for n in staged.prepare.nodes]


def test_a_constant_that_only_weights_read_moves_with_them() -> None:
    build = Builder()
    x, w = build.input("x", 4), build.weight("w", 4)
    scaled = build.call("mul", w, build.call("arange", 4))
    graph = build.output(build.call("add", x, scaled))
    staged = hoist(graph)
    assert [name_of(n) for n in staged.body.nodes if n.op == "call_function"] == ["add"]


def test_memory_of_its_own_is_told_from_a_view_of_a_weight() -> None:
    build = Builder()
    x, w = build.input("x", 4, 4), build.weight("w", 4, 4)
    h = build.weight("h", 4, 4, dtype=torch.float16)
    turned = build.call("t", w)
    results = (
        build.call("linear", x, w, None),
        build.call("linear", x, turned, None),
        build.call("linear", x, build.call("to", h, torch.float32), None),
        build.call("linear", x, build.call("contiguous", turned), None),
        build.call("linear", x, build.call("contiguous", w), None),
        build.call("linear", x, build.call("neg", w), None),
    )
    graph = build.output(*results)
    staged = hoist(graph)
    owned = dict(zip(staged.recipes, staged.owned, strict=True))
    assert owned == {
        "w": False,
        "t(w)": False,
        "to(h, torch.float32)": True,
        "contiguous(t(w))": True,
        "contiguous(w)": False,
        "neg(w)": True,
    }


def test_weights_are_computed_first_in_the_order_they_had() -> None:
    build = Builder()
    x, w = build.input("x", 4), build.weight("w", 4)
    early = build.call("neg", x)
    first = build.call("exp", w)
    second = build.call("mul", first, w)
    graph = build.output(build.call("add", early, second))
    weights_first(graph)
    graph.lint()
    assert [n for n in graph.nodes if n.op == "call_function"][:3] == [first, second, early]
