"""keep_last_tokens and keep_selected_tokens: only what is asked for reaches the vocabulary."""

from __future__ import annotations

import pytest
import torch
from captured_models import canonical, model_of
from policy_graphs import logits as logits_of
from policy_graphs import weights
from small_graphs import Builder, far, run, same, values
from torch import fx

from hybrid_fx.passes.contract import Context
from hybrid_fx.passes.graph import calls, name_of
from hybrid_fx.passes.last_tokens import keep_last_tokens, keep_selected_tokens


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
