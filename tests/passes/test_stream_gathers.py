"""stream_gathers: layers wait for their weights, and issue the gather of the next layer."""

from __future__ import annotations

import pytest
import torch
from captured_models import canonical, model_of
from policy_graphs import weights
from small_graphs import Builder, text
from torch import fx

from hybrid_fx.passes.contract import Context
from hybrid_fx.passes.gather import gather_weights
from hybrid_fx.passes.graph import calls, name_of
from hybrid_fx.passes.hoist import hoist
from hybrid_fx.passes.operators import OPERATORS
from hybrid_fx.passes.spec import IllegalGraphError, check_graph
from hybrid_fx.passes.stream import stream_gathers
from hybrid_fx.testing.run import run as run_calls


def streamed(graph: fx.Graph) -> int:
    """How many weights were moved into the gathers of their layers."""
    gather_weights(graph, Context())
    return stream_gathers(graph, Context()).count


def attending(build: Builder, x: fx.Node, weight: fx.Node, layer: str) -> fx.Node:
    """A layer that reads one weight: ``attention(w * heads, ...)``."""
    made = build.call("mul", weight, 2.0, path=layer)
    heads = build.call("mul", x, made, path=layer)
    return build.call("attention", heads, heads, heads, 0.5, path=layer)


def two_layers(shared: bool = False) -> fx.Graph:
    """Two layers of one weight each, or of the same."""
    build = Builder()
    x = build.input("x", 2, 1, 3, 4)
    first = build.weight("layers.0.w", 4)
    second = first if shared else build.weight("layers.1.w", 4)
    x = attending(build, x, first, "layers.0")
    x = attending(build, x, second, "layers.1")
    return build.output(x)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_each_layer_gathers_its_own_weights_one_layer_ahead(kind: str) -> None:
    graph = canonical(kind)
    own = [n for n, _ in model_of(kind).named_parameters() if ".layers." in n or ".h." in n]
    assert streamed(graph) == len(own)
    check_graph(graph, stage="stream_gathers")
    names = [name_of(n) for n in graph.nodes if name_of(n) in ("issue_gather", "wait_gather")]
    assert names == ["issue_gather", "wait_gather", "issue_gather", "wait_gather"]
    held = weights(model_of(kind))
    given = {n.meta["input"]: n for n in graph.nodes if "streamed" in n.meta}
    taken = [name for node in given.values() for name in node.meta["streamed"]]
    assert sorted(taken) == sorted(own)
    assert set(taken) <= set(held)


def test_what_waits_and_what_is_made_of_it_stays_in_the_layer() -> None:
    graph = two_layers()
    assert streamed(graph) == 2
    staged = hoist(graph)
    assert not calls(staged.prepare, "gather", "wait_gather", "mul")
    assert len(calls(staged.body, "mul")) == 4
    for node in calls(staged.body, "wait_gather", "issue_gather"):
        assert node.meta["path"] in ("", "layers.0", "layers.1")


def test_a_weight_of_two_layers_and_one_read_outside_are_gathered_before() -> None:
    graph = two_layers(shared=True)
    assert streamed(graph) == 0
    assert not calls(graph, "issue_gather", "wait_gather")
    build = Builder()
    x = build.input("x", 2, 1, 3, 4)
    weight = build.weight("layers.0.w", 4)
    out = attending(build, x, weight, "layers.0")
    graph = build.output(build.call("add", out, weight, path=""))
    assert streamed(graph) == 0


def test_a_buffer_is_gathered_before() -> None:
    build = Builder()
    x = build.input("x", 2, 1, 3, 4)
    buffer = build.weight("layers.0.b", 4, parameter=False)
    graph = build.output(attending(build, x, buffer, "layers.0"))
    assert streamed(graph) == 0


def test_weights_are_made_early_and_still_read_what_was_waited_for() -> None:
    """What is computed of weights alone may stand in front of all layers."""
    build = Builder()
    x = build.input("x", 2, 1, 3, 4)
    pairs = []
    for layer in ("layers.0", "layers.1"):
        weight = build.weight(f"{layer}.w", 4)
        pairs.append((layer, build.call("mul", weight, 2.0, path=layer)))
    for layer, made in pairs:
        heads = build.call("mul", x, made, path=layer)
        x = build.call("attention", heads, heads, heads, 0.5, path=layer)
    graph = build.output(x)
    values = {"layers.0.w": _drawn(4), "layers.1.w": _drawn(4) + 1}
    given = {"x": _drawn(2, 1, 3, 4)}
    before = run_calls(graph, values, given)
    assert streamed(graph) == 2
    order = [name_of(n) for n in graph.nodes if n.op == "call_function"]
    layer = ["wait_gather", "getitem", "issue_gather", "mul", "mul", "attention"]
    assert order == ["issue_gather", *layer, "wait_gather", "getitem", *layer[3:]]
    assert run_calls(graph, values, given).equal(before)


def _drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def test_a_second_run_changes_nothing() -> None:
    graph = canonical("llama")
    streamed(graph)
    before = text(graph)
    assert streamed(graph) == 0
    assert text(graph) == before


def test_a_weight_that_was_waited_for_is_never_written() -> None:
    graph = two_layers()
    streamed(graph)
    part = next(n for n in calls(graph, "getitem"))
    user = next(iter(part.users))
    with graph.inserting_before(user):
        bad = graph.call_function(OPERATORS["add_"], (part, 1.0))
    bad.meta["path"] = "layers.0"
    with pytest.raises(IllegalGraphError, match="writes the parameter"):
        check_graph(graph, stage="a test")
