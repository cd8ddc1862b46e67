"""Threading masks and implementations through attention, and what a training graph keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_graphs import Builder
from torch import fx

from hybrid_fx.passes.canonicalize import canonicalize
from hybrid_fx.passes.contract import Context, PipelineError
from hybrid_fx.passes.driver import run_passes
from hybrid_fx.passes.graph import calls, draws, is_pure, sweep
from hybrid_fx.passes.last_tokens import keep_selected_tokens
from hybrid_fx.passes.operators import OPERATORS
from hybrid_fx.passes.pipeline import DECODE, TRAIN
from hybrid_fx.passes.thread_masks import thread_masks


def two_attentions() -> fx.Graph:
    """Attention, then one with a window of 3 and dropout; values are the keys negated."""
    graph = fx.Graph()
    hidden = graph.placeholder("hidden")
    hidden.meta |= {"path": "", "input": "hidden"}
    value = graph.call_function(OPERATORS["neg"], (hidden,))
    value.meta["path"] = ""
    node = hidden
    for index, options in enumerate(((0.5,), (0.25, 3, 0.0, None, 0.1))):
        node = graph.call_function(OPERATORS["attention"], (node, hidden, value, *options))
        node.meta["path"] = f"layers.{index}.attn"
        node = graph.call_function(OPERATORS["transpose"], (node, 1, 2))
        node.meta["path"] = f"layers.{index}.attn"
    graph.output(node)
    return graph


def test_each_attention_gets_its_implementation_and_the_mask_of_its_kind() -> None:
    graph = two_attentions()
    result = thread_masks(graph, Context(training=True))
    assert result.count == 2
    first, second = calls(graph, "attend_as_configured")
    assert [n.meta.get("input") for n in first.all_input_nodes] == [
        "implementations_0",
        "hidden",
        None,
        "causal_mask",
    ]
    assert second.args[0].meta["input"] == "implementations_1"
    assert second.args[4].meta["input"] == "window_mask"
    assert (first.args[5:], second.args[5:]) == ((0.5,), (0.25, 3, 0.0, None, 0.1))
    assert second.meta["path"] == "layers.1.attn"
    assert not calls(graph, "attention")


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


def test_a_second_run_changes_nothing() -> None:
    graph = two_attentions()
    run_passes(graph, TRAIN, Context(training=True))
    before = str(graph)
    assert thread_masks(graph, Context(training=True)).count == 0
    assert str(graph) == before


def test_the_threaded_graph_computes_what_its_implementations_compute() -> None:
    graph = two_attentions()
    plain = fx.GraphModule({}, two_attentions())
    for node in calls(plain.graph, "attention"):
        node.args = node.args[:7]  # the numbers of two dropouts cannot be compared
    plain.recompile()
    thread_masks(graph, Context(training=True))
    seen = []

    def implementation(query: Any, key: Any, value: Any, mask: Any, *options: Any) -> Any:
        seen.append((mask, options))
        return OPERATORS["attention"](query, key, value, *options[:4])

    holders = [n for n in graph.nodes if n.op == "placeholder"]
    given = {"causal_mask": "causal", "window_mask": "window", "hidden": torch.randn(2, 2, 5, 4)}
    inputs = [given.get(n.meta["input"], implementation) for n in holders]
    got = fx.GraphModule({}, graph)(*inputs)
    assert torch.equal(got, plain(given["hidden"]))
    assert seen == [("causal", (0.5, 0, 0.0, None, 0.0)), ("window", (0.25, 3, 0.0, None, 0.1))]


def test_a_graph_is_threaded_for_training_or_for_a_workspace_and_never_for_both() -> None:
    for order in ((TRAIN, DECODE), (DECODE, TRAIN)):
        with pytest.raises(PipelineError):
            order[0] + order[1]


def projected(pointwise: bool) -> fx.Graph:
    """hidden -> linear -> logits, through a cube of all of them where not ``pointwise``."""
    build = Builder()
    hidden, weight = build.input("hidden", 2, 5, 4), build.weight("weight", 7, 4)
    node = build.call("linear", hidden, weight, None, path="head")
    return build.output(node if pointwise else build.call("pow", node, 3, path="head"))


@pytest.mark.parametrize("pointwise", [True, False], ids=["before the head", "behind it"])
@pytest.mark.parametrize("keep", [0, 2, torch.tensor([0, 3])], ids=["all", "two", "places"])
def test_kept_tokens_are_those_that_logits_to_keep_means(keep: Any, pointwise: bool) -> None:
    graph = projected(pointwise)
    plain = fx.GraphModule({}, projected(pointwise))
    result = keep_selected_tokens(graph, Context(training=True))
    assert result.count == 1
    hidden, weight = torch.randn(2, 5, 4), torch.randn(7, 4)
    got = fx.GraphModule({}, graph)(hidden, weight, keep)
    rows = keep if isinstance(keep, torch.Tensor) else slice(-keep, None)
    torch.testing.assert_close(got, plain(hidden, weight)[:, rows])
    (kept,) = calls(graph, "select_tokens")
    assert (kept.args[0].op == "placeholder") is pointwise
    assert keep_selected_tokens(graph, Context(training=True)).count == 0


@pytest.mark.parametrize(
    ("operator", "args", "random"),
    [
        ("dropout", (0.1, True), True),
        ("dropout", (0.1,), True),
        ("dropout", (0.1, False), False),
        ("dropout", (0.0, True), False),
        ("attention", (0.5,), False),
        ("attention", (0.5, 0, 0.0, None, 0.1), True),
        ("scaled_dot_product_attention", (None, 0.1), True),
        ("scaled_dot_product_attention", (None, 0.0), False),
    ],
)
def test_what_draws_random_numbers_is_neither_moved_nor_dropped(
    operator: str, args: tuple[Any, ...], random: bool
) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    tensors = (x,) if operator == "dropout" else (x, x, x)
    node = graph.call_function(OPERATORS[operator], (*tensors, *args))
    graph.output(x)
    assert draws(node) is random
    assert is_pure(node) is not random
    sweep(graph)
    assert bool(calls(graph, operator)) is random


def test_only_a_training_graph_keeps_the_row_of_padding() -> None:
    for training in (False, True):
        graph = fx.Graph()
        ids, table = graph.placeholder("ids"), graph.placeholder("table")
        node = graph.call_function(F.embedding, (ids, table, 0))
        node.meta["path"] = ""
        graph.output(node)
        canonicalize(graph, Context(training=training))
        (kept,) = calls(graph, "embedding")
        assert kept.args == ((ids, table, 0) if training else (ids, table))


OPTIONS = {
    "plain": {},
    "window": {"window": 2},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_canonical_attention_has_the_gradient_of_its_values(name: str) -> None:
    rng = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        value = torch.randn(shape, generator=rng, dtype=torch.float64)
        return value.requires_grad_()

    options: dict[str, Any] = dict(OPTIONS[name])
    tensors = [random(1, 4, 3, 2), random(1, 2, 3, 2), random(1, 2, 3, 2)]
    if options.pop("sinks", None):
        tensors.append(random(4))

    def attention(query: Any, key: Any, value: Any, sinks: Any = None) -> Any:
        return OPERATORS["attention"](query, key, value, 0.7, sinks=sinks, **options)

    assert torch.autograd.gradcheck(attention, tensors)


def test_the_canonical_attention_has_the_gradient_of_sdpa() -> None:
    rng = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 2, 5, 4, generator=rng).requires_grad_() for _ in range(3)]
    got = torch.autograd.grad(OPERATORS["attention"](*tensors, 0.5).square().sum(), tensors)
    plain = F.scaled_dot_product_attention(*tensors, is_causal=True, scale=0.5)
    want = torch.autograd.grad(plain.square().sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
