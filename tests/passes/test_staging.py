"""gather, hoist, thread_kv and keep_last_tokens: what turns one graph into a plan's stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured_models import canonical, model_of
from policy_graphs import logits as logits_of
from policy_graphs import weights
from small_graphs import Builder, count, far, run, same, text, values
from torch import fx

from hybrid_fx.passes.binding import weight_only, weights_first
from hybrid_fx.passes.contract import Context
from hybrid_fx.passes.gather import gather_weights
from hybrid_fx.passes.graph import calls, name_of
from hybrid_fx.passes.hoist import hoist
from hybrid_fx.passes.last_tokens import keep_last_tokens, keep_selected_tokens
from hybrid_fx.passes.spec import THREADED, check_graph
from hybrid_fx.passes.thread_kv import kv_shapes, thread_kv_decode, thread_kv_prefill
from hybrid_fx.passes.thread_masks import thread_masks

KINDS = ("llama", "gpt2", "opt")


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_passes_a_gather_once(kind: str) -> None:
    graph = canonical(kind)
    held = weights(model_of(kind))
    before = logits_of(graph, held)
    placeholders = [n for n in graph.nodes if "weight" in n.meta and n.op == "placeholder"]
    assert gather_weights(graph, Context()).count == len(placeholders)
    for node in placeholders:
        assert [name_of(user) for user in node.users] == ["gather"]
    assert same(logits_of(graph, held), before)
    after = text(graph)
    assert gather_weights(graph, Context()).count == 0
    assert text(graph) == after


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


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "opt350", "mistral", "phi3"])
@pytest.mark.parametrize(
    ("thread", "operator"), [(thread_kv_prefill, "attend"), (thread_kv_decode, "attend_one")]
)
def test_the_workspace_is_threaded_through_every_attention(
    kind: str, thread: object, operator: str
) -> None:
    graph = canonical(kind)
    shapes = kv_shapes(graph)
    assert thread(graph, Context()).count == 2  # type: ignore[operator]
    check_graph(graph, stage="threaded", rules=THREADED)
    inputs = [n.meta["input"] for n in graph.nodes if "input" in n.meta]
    assert sorted(inputs) == sorted(
        ["input_ids", "position_ids", "slots", "key_valid", "pitch"]
        + [f"{kind}_{i}" for i in range(2) for kind in ("keys", "values")]
    )
    first, second = calls(graph, operator)
    assert first.args[3] is not second.args[3], "each attention has memory of its own"
    assert first.args[5] is second.args[5], "and all share one table of slots"
    assert [shape.window for shape in shapes] == [4 if kind == "mistral" else 0] * 2
    assert {shape.heads for shape in shapes} == {2 if kind in ("llama", "mistral", "phi3") else 4}
    after = text(graph)
    assert thread(graph, Context()).count == 0  # type: ignore[operator]
    assert text(graph) == after


def test_attention_with_dropout_is_not_threaded_and_says_so() -> None:
    build = Builder()
    q = build.input("q", 1, 4, 3, 8)
    graph = build.output(build.call("attention", q, q, q, 0.5, 0, 0.0, None, 0.1, path="a"))
    result = thread_kv_decode(graph, Context())
    assert result.count == 0
    assert result.misses[0][1].expected == "attention without dropout"


@pytest.mark.parametrize("thread", [thread_kv_prefill, thread_kv_decode])
def test_what_an_attention_was_captured_with_reaches_its_threaded_form(thread: Any) -> None:
    build = Builder()
    q, k, v = (build.input(name, 1, 4, 3, 8) for name in "qkv")
    sinks = build.weight("sinks", 4)
    graph = build.output(build.call("attention", q, k, v, 0.3, 3, 20.0, sinks, path="a"))
    assert thread(graph, Context()).count == 1
    (new,) = calls(graph, "attend", "attend_one")
    assert new.args[:3] == (q, k, v)
    assert [arg.meta["input"] for arg in new.args[3:8]] == [
        "keys_0", "values_0", "slots", "key_valid", "pitch",
    ]  # fmt: skip
    assert new.args[8:] == (0.3, 3, 20.0, sinks)


def test_in_training_each_attention_takes_its_own_implementation_and_its_kind_of_mask() -> None:
    build = Builder()
    q, k, v = (build.input(name, 1, 4, 3, 8) for name in "qkv")
    plain = build.call("attention", q, k, v, 0.3, path="a")
    windowed = build.call("attention", q, k, v, 0.4, 3, 20.0, path="b")
    graph = build.output(plain, windowed)
    assert thread_masks(graph, Context()).count == 2
    first, second = calls(graph, "attend_as_configured")
    inputs = [[node.args[0].meta["input"], node.args[4].meta["input"]] for node in (first, second)]
    assert inputs == [["implementations_0", "causal_mask"], ["implementations_1", "window_mask"]]
    assert first.args[1:4] == second.args[1:4] == (q, k, v)
    assert (first.args[5:], second.args[5:]) == ((0.3,), (0.4, 3, 20.0))
    assert thread_masks(graph, Context()).count == 0


def test_in_training_the_tokens_kept_are_those_that_logits_to_keep_names() -> None:
    for keep, kept in ((2, [3, 4]), (0, [0, 1, 2, 3, 4]), (torch.tensor([0, 3]), [0, 3])):
        build = Builder()
        x, w = build.input("x", 2, 5, 3), build.weight("w", 4, 3)
        graph = build.output(build.call("linear", x, w, None))
        given = values(graph)
        whole = run(graph, given)[0]
        assert keep_selected_tokens(graph, Context()).count == 1
        got = fx.Interpreter(fx.GraphModule({}, graph)).run(given["x"], given["w"], keep)
        assert far(got, whole[:, kept]) < 1e-6
        assert keep_selected_tokens(graph, Context()).count == 0


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt350"])
def test_only_the_last_tokens_reach_the_vocabulary(kind: str) -> None:
    graph = canonical(kind)
    held = weights(model_of(kind))
    whole = logits_of(graph, held)
    assert keep_last_tokens(graph, Context()).count == 1
    (kept,) = calls(graph, "last_tokens")
    (user,) = kept.users
    assert name_of(user) == "linear"
    assert user.meta["path"].endswith("lm_head")
    given = _with_keep(graph, held, 2)
    assert far(given, whole[:, -2:]) < 1e-6
    assert keep_last_tokens(graph, Context()).count == 0


def _with_keep(graph: fx.Graph, held: dict[str, torch.Tensor], keep: int) -> torch.Tensor:
    """``logits_of``, with the input ``keep`` taken as a constant."""
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.meta.get("input") == "keep":
            for user in list(node.users):
                user.args = tuple(keep if arg is node else arg for arg in user.args)
            graph.erase_node(node)
    result: torch.Tensor = logits_of(graph, held)
    return result


def _head(build: Builder, tail: str) -> fx.Node:
    x, w = build.input("x", 2, 5, 4), build.weight("w", 6, 4)
    logits = build.call("linear", x, w, None)
    scale = build.weight("s", 6)
    return {
        "nothing": lambda: logits,
        "softcap": lambda: build.call(
            "mul", build.call("tanh", build.call("truediv", logits, 30.0)), 30.0
        ),
        "a part of the vocabulary": lambda: build.call("getitem", logits, (..., slice(None, 3))),
        "a cast and a scale": lambda: build.call(
            "mul", build.call("to", logits, torch.float64), scale
        ),
        "some tokens": lambda: build.call("getitem", logits, (slice(None), slice(1, None))),
        "one token": lambda: build.call("getitem", logits, (slice(None), -1)),
        "a mean over tokens": lambda: build.call(
            "sub", logits, build.call("mean", logits, 1, True)
        ),
        "a running sum": lambda: build.call("cumsum", logits, 1),
        "what others read": lambda: build.call("mul", logits, build.call("amax", logits, (0, 1))),
        "the tokens' own": lambda: build.call("add", logits, build.call("mean", x, -1, True)),
    }[tail]()


@pytest.mark.parametrize(
    ("tail", "early"),
    [
        ("nothing", True),
        ("softcap", True),
        ("a part of the vocabulary", True),
        ("a cast and a scale", True),
        ("some tokens", False),
        ("a mean over tokens", False),
        ("the tokens' own", False),
        ("a running sum", False),
        ("what others read", False),
    ],
)
def test_logits_are_cut_early_only_where_each_token_stands_alone(tail: str, early: bool) -> None:
    build = Builder()
    graph = build.output(_head(build, tail))
    given = values(graph)
    before = run(graph, given)[0]
    keep_last_tokens(graph, Context())
    (kept,) = calls(graph, "last_tokens")
    assert (name_of(kept.args[0]) is None) == early
    keep = next(n for n in graph.nodes if n.meta.get("input") == "keep")
    kept.args = (kept.args[0], 2)
    graph.erase_node(keep)
    assert far(run(graph, given)[0], before[:, -2:]) < 1e-6


def test_logits_that_something_else_reads_are_cut_late() -> None:
    build = Builder()
    logits = _head(build, "nothing")
    top = build.call("amax", logits, 1, True)
    graph = build.output(build.call("sub", logits, top))
    given = values(graph)
    before = run(graph, given)[0]
    keep_last_tokens(graph, Context())
    (kept,) = calls(graph, "last_tokens")
    assert name_of(kept.args[0]) == "sub"
    keep = next(n for n in graph.nodes if n.meta.get("input") == "keep")
    kept.args = (kept.args[0], 2)
    graph.erase_node(keep)
    assert same(run(graph, given)[0], before[:, -2:])
