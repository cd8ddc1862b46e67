"""fold_lora: which branches fold, against float64; what stays a branch and why."""

from __future__ import annotations

from collections.abc import Container

import pytest
import torch
from captured_models import canonical, model_of
from policy_graphs import layers_of, logits, through, weights
from small_graphs import Builder, count, far, run, same, text, values
from torch import fx

from hybrid_fx.passes.binding import weight_only
from hybrid_fx.passes.contract import Context
from hybrid_fx.passes.fold_lora import fold_lora, site_of
from hybrid_fx.passes.graph import calls, name_of, weight_name
from hybrid_fx.passes.spec import check_graph

PLACE = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("kind", "lora", "operator"),
    [
        ("llama", "plain", "fold_lora"),
        ("llama", "rs", "fold_lora"),
        ("llama", "dora", "fold_dora"),
        ("gpt2", "plain", "fold_lora"),
        ("llama", "chat", "fold_lora"),
    ],
)
def test_every_adapter_folds_and_keeps_the_numbers(kind: str, lora: str, operator: str) -> None:
    graph = canonical(kind, lora)
    given = weights(model_of(kind, lora))
    before = logits(graph, given)
    told = layers_of(graph)
    sites = 14 if kind == "llama" else 8
    assert through(graph, "fold_lora", told=told) == [sites]
    assert count(graph, operator) == sites
    fixed = weight_only(graph)
    assert not _branches(graph, fixed), "no adapter reads the tokens any more"
    assert all(node in fixed for node in calls(graph, operator)), "all of it goes to prepare"
    assert far(logits(graph, given), before) < 1e-5
    after = text(graph)
    assert through(graph, "fold_lora", told=told) == [0]
    assert text(graph) == after


def _branches(graph: fx.Graph, fixed: Container[fx.Node] = ()) -> list[fx.Node]:
    """The first calls of adapters, but for those in ``fixed``."""
    found = []
    for node in calls(graph, "linear"):
        factor = node.args[1].args[0] if name_of(node.args[1]) == "t" else None
        own = str(weight_name(factor)).endswith("lora_right_weight")
        if node not in fixed and (own or "lora_A" in node.meta["path"]):
            found.append(node)
    return found


def test_a_graph_without_adapters_keeps_its_calls() -> None:
    graph = canonical("llama")
    before = sorted(text(graph).split("\n"))
    assert through(graph, "fold_lora") == [0]
    assert sorted(text(graph).split("\n")) == before


@pytest.mark.parametrize("lora", ["plain", "chat"])
def test_a_site_that_is_to_stay_stays_a_branch(lora: str) -> None:
    graph = canonical("llama", lora)
    given = weights(model_of("llama", lora))
    before = logits(graph, given)
    told = layers_of(graph, side=frozenset({"self_attn.q_proj"}))
    assert through(graph, "fold_lora", told=told) == [12]
    left = _branches(graph)
    assert len(left) == 2
    assert {site_of(n.meta["path"].split(".lora_A")[0]) for n in left} == {"self_attn.q_proj"}
    again = fold_lora(graph, told)
    assert [path.split(".lora_A")[0] for path, _ in again.misses] == [
        n.meta["path"].split(".lora_A")[0] for n in left
    ]
    assert far(logits(graph, given), before) < 1e-5


def test_projections_whose_adapters_stay_are_joined_all_the_same() -> None:
    """DoRA multiplies its factors with one another: linears that read no token."""
    graph = canonical("llama", "dora")
    given = weights(model_of("llama", "dora"))
    before = logits(graph, given)
    stay = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"})
    told = layers_of(graph, side=stay)
    assert through(graph, "fold_lora", "concat_qkv", told=told) == [8, 2]
    assert far(logits(graph, given), before) < 1e-5


def _adapted(build: Builder, change: str = "") -> tuple[fx.Node, ...]:
    """``linear(x, W, b) + linear(linear(x, A), B) * 2``, twice adapted or made odd."""
    dtype = torch.bfloat16 if change in ("narrow", "a wide sum") else torch.float32
    x = build.input("x", 2, 3, 4, dtype=dtype)
    w, b = build.weight("w", 5, 4, dtype=dtype), build.weight("b", 5, dtype=dtype)
    if change == "a weight of the tokens":
        w = build.call("mul", w, build.call("mean", x), path=PLACE)
    base = build.call("linear", x, w, b, path=f"{PLACE}.base_layer")
    total = base
    for name in ("one", "two") if change == "two adapters" else ("one",):
        a = build.weight(f"{name}_a", 2, 4)
        up = build.weight(f"{name}_b", 5, 2)
        source = build.call("exp", x) if change == "another input" else x
        if change in ("narrow", "a wide sum"):
            source = build.call("to", x, torch.float32, path=PLACE)
        if change == "factors of the tokens":
            up = build.call("mul", up, build.call("mean", x), path=PLACE)
        if change == "a written input":
            build.call("mul_", x, 2.0, path=PLACE)
        low = build.call("linear", source, a, None, path=f"{PLACE}.lora_A.{name}")
        branch = build.call("linear", low, up, None, path=f"{PLACE}.lora_B.{name}")
        if change != "no scale":
            branch = build.call("mul", branch, 2.0, path=PLACE)
        total = build.call("add", total, branch, path=PLACE)
    if change == "narrow":
        total = build.call("to", total, torch.bfloat16, path=PLACE)
    return (total, base) if change == "a base others use" else (total,)


def test_two_adapters_fold_at_once_so_that_the_sum_is_rounded_once() -> None:
    build = Builder()
    graph = build.output(*_adapted(build, "two adapters"))
    given = values(graph)
    before = run(graph, given)[0]
    assert fold_lora(graph, Context()).count == 1
    (folded,) = calls(graph, "fold_lora")
    assert len(folded.args) == 7
    assert far(run(graph, given)[0], before) < 1e-6


def test_a_branch_without_a_scale_folds_as_it_is() -> None:
    build = Builder()
    graph = build.output(*_adapted(build, "no scale"))
    given = values(graph)
    before = run(graph, given)[0]
    assert fold_lora(graph, Context()).count == 1
    assert far(run(graph, given)[0], before) < 1e-6


def _dora(build: Builder, change: str = "") -> fx.Node:
    """``base + ((m - 1) * (base - bias) + m * low_rank * 2)`` with a bias, maybe made odd."""
    x = build.input("x", 2, 3, 4)
    w, b = build.weight("w", 5, 4), build.weight("b", 5)
    m, a, up = build.weight("m", 1, 5), build.weight("a", 2, 4), build.weight("up", 5, 2)
    if change == "a magnitude of the tokens":
        m = build.call("mul", m, build.call("mean", x), path=PLACE)
    base = again = build.call("linear", x, w, b, path=f"{PLACE}.base_layer")
    if change == "another base":
        again = build.call("linear", build.call("exp", x), w, b, path=PLACE)
    bias = build.weight("other", 5) if change == "another bias" else b
    plain = build.call("sub", again, bias, path=PLACE)
    if change == "a written input":
        build.call("mul_", x, 2.0, path=PLACE)
    low = build.call("linear", x, a, None, path=f"{PLACE}.lora_A.one")
    low = build.call("linear", low, up, None, path=f"{PLACE}.lora_B.one")
    excess = build.call("mul", build.call("sub", m, 1, path=PLACE), plain, path=PLACE)
    scaled = build.call("mul", build.call("mul", m, low, path=PLACE), 2.0, path=PLACE)
    return build.call("add", base, build.call("add", excess, scaled, path=PLACE), path=PLACE)


def test_dora_over_a_biased_linear_folds_and_keeps_the_bias() -> None:
    build = Builder()
    graph = build.output(_dora(build))
    given = values(graph)
    before = run(graph, given)[0]
    assert fold_lora(graph, Context()).count == 1
    assert count(graph, "fold_dora") == 1
    assert far(run(graph, given)[0], before) < 1e-6


@pytest.mark.parametrize(
    "change", ["another base", "another bias", "a magnitude of the tokens", "a written input"]
)
def test_dora_stays_where_it_does_not_scale_the_weight_it_stands_beside(change: str) -> None:
    build = Builder()
    graph = build.output(_dora(build, change))
    given = values(graph)
    before = run(graph, given)[0]
    assert fold_lora(graph, Context()).count == 0
    assert same(run(graph, given)[0], before)


def test_adapters_in_float32_beside_narrow_weights_fold_in_float32() -> None:
    build = Builder()
    graph = build.output(*_adapted(build, "narrow"))
    given = values(graph)
    assert fold_lora(graph, Context()).count == 1
    got = run(graph, given)[0]
    assert got.dtype == torch.bfloat16
    d = {name: tensor.double() for name, tensor in given.items()}
    weight = (d["w"] + 2 * d["one_b"] @ d["one_a"]).bfloat16().double()
    assert far(got, d["x"] @ weight.T + d["b"]) < 4e-3


REASONS = {
    "another input": ("a branch on x", "exp"),
    "factors of the tokens": ("factors that are weights", "b"),
    "a base others use": ("a base used by the sum alone", "another user"),
    "a weight of the tokens": ("a base that is a weight", "mul"),
    "a written input": ("values that nothing writes in place", "a write"),
    "a wide sum": ("the base's dtype torch.bfloat16", "torch.float32"),
}


@pytest.mark.parametrize("why", REASONS)
def test_a_branch_stays_where_it_is_no_part_of_the_weight(why: str) -> None:
    build = Builder()
    graph = build.output(*_adapted(build, why))
    given = values(graph)
    before = run(graph, given)[0]
    result = fold_lora(graph, Context())
    assert result.count == 0
    ((path, missed),) = result.misses
    assert path == PLACE
    assert (missed.expected, missed.found) == REASONS[why]
    check_graph(graph, stage="fold_lora")
    assert same(run(graph, given)[0], before)


def test_a_branch_that_others_read_keeps_its_value_for_them() -> None:
    build = Builder()
    (total,) = _adapted(build)
    low = next(n for n in calls(build.graph, "linear") if "lora_A" in n.meta["path"])
    graph = build.output(total, low)
    given = values(graph)
    before = run(graph, given)[0]
    assert fold_lora(graph, Context()).count == 1
    after = run(graph, given)[0]
    assert same(after[1], before[1])
    assert far(after[0], before[0]) < 1e-6


def test_a_fold_reads_the_base_weight_and_never_writes_it() -> None:
    build = Builder()
    graph = build.output(*_adapted(build))
    fold_lora(graph, Context())
    given = values(graph)
    assert same(list(run(graph, given)[1].values()), list(given.values()))


def test_an_adapter_on_the_embedding_folds_into_the_table() -> None:
    build = Builder()
    ids = build.input("ids", 2, 3, dtype=torch.int64)
    table, a, b = build.weight("table", 8, 4), build.weight("a", 2, 8), build.weight("b", 4, 2)
    place = "model.embed_tokens"
    base = build.call("embedding", ids, table, path=place)
    low = build.call("embedding", ids, build.call("t", a, path=place), path=place)
    branch = build.call("linear", low, b, None, path=place)
    total = build.call("add", base, build.call("mul", branch, 0.5, path=place), path=place)
    graph = build.output(total)
    given = values(graph)
    before = run(graph, given)[0]
    assert fold_lora(graph, Context()).count == 1
    check_graph(graph, stage="fold_lora")
    (lookup,) = calls(graph, "embedding")
    assert far(run(graph, given)[0], before) < 1e-6
    assert lookup.args[1] in weight_only(graph)


def test_sites_are_named_by_their_place_in_the_layer() -> None:
    assert site_of("base.model.layers.3.self_attn.q_proj.base_layer") == "self_attn.q_proj"
    assert site_of("base.lm_head") == "base.lm_head"
