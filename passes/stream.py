"""Gather, use, release: the weights of a layer are made whole where the layer runs.

A layer begins by waiting for its own weights, all of them in one gather that the layer before it
issued, and then issues the gather of the next layer, so that it is under way while this one
computes. A whole weight is named in its layer alone: it dies behind its last use there. What is
made of such weights alone stays in the layer with them; hoisting leaves what waits where it is.

Weights outside of layers, those that several layers read, and buffers keep their own gathers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from .binding import weight_only
from .contract import Context, Pass, PassResult
from .graph import calls, inside, order, path_of, tail_names
from .layers import layer_paths
from .operators import OPERATORS

#: What the shards of a layer are called as a runtime input, before the layer's number.
SHARDS = "shards"


@dataclass(frozen=True)
class _Stage:
    """A layer that gathers.

    Attributes:
        gathers: Of its weights.
        early: What is made of them alone and stands before its first call on tokens.
        first: That call.
    """

    layer: str
    gathers: tuple[fx.Node, ...]
    early: tuple[fx.Node, ...]
    first: fx.Node


def _weight_of(gather: fx.Node) -> fx.Node:
    weight = gather.args[0]
    assert isinstance(weight, fx.Node)
    return weight


def _made_of(gather: fx.Node, fixed: Mapping[fx.Node, None]) -> list[fx.Node]:
    """What is computed from a weight and other weights alone."""
    found: dict[fx.Node, None] = {}
    todo = [gather]
    while todo:
        for user in todo.pop().users:
            if user in fixed and user not in found:
                found[user] = None
                todo.append(user)
    return list(found)


def _stages(graph: fx.Graph) -> list[_Stage]:
    """The layers with weights of their own, in the order in which they run."""
    place, fixed = order(graph), weight_only(graph)
    gathers = [node for node in calls(graph, "gather") if _weight_of(node).meta.get("parameter")]
    found = []
    for layer in layer_paths(graph):
        own, made = [], dict[fx.Node, None]()
        for gather in gathers:
            derived = _made_of(gather, fixed)
            readers = {user for node in (gather, *derived) for user in node.users}
            if readers and all(inside(n, layer) for n in (*derived, *readers)):
                own.append(gather)
                made |= dict.fromkeys(derived)
        runs = (n for n in graph.nodes if n.op == "call_function" and inside(n, layer))
        first = next((n for n in runs if n not in fixed), None)
        if own and first is not None:
            early = [node for node in made if place[node] < place[first]]
            early.sort(key=place.__getitem__)
            found.append(_Stage(layer, tuple(own), tuple(early), first))
    return sorted(found, key=lambda stage: place[stage.first])


def _input(graph: fx.Graph, gathers: Iterable[fx.Node], number: int) -> fx.Node:
    """The placeholder of the shards that a stage gathers."""
    held = list(map(_weight_of, gathers))
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        node = graph.placeholder(f"{SHARDS}_{number}")
    node.meta |= {
        "path": "",
        "input": f"{SHARDS}_{number}",
        "streamed": tuple(weight.meta["weight"] for weight in held),
        "val": tuple(weight.meta.get("val") for weight in held),
        "parameter": True,
    }
    return node


def _wait(graph: fx.Graph, stage: _Stage, pending: fx.Node) -> fx.Node:
    """Put the stage's whole weights in front of its first call, and use them; the last of them."""
    with graph.inserting_before(stage.first):
        values = pending.meta["val"]
        whole = _named(graph, "whole", "wait_gather", pending, path=stage.layer, val=values)
        parts = []
        for index, (gather, val) in enumerate(zip(stage.gathers, values, strict=True)):
            name = tail_names(_weight_of(gather).meta["weight"], stage.layer)
            parts.append(
                _named(graph, name, "getitem", whole, index, path=path_of(gather), val=val)
            )
    for node in stage.early:
        stage.first.prepend(node)
    for gather, part in zip(stage.gathers, parts, strict=True):
        weight = _weight_of(gather)
        gather.replace_all_uses_with(part)
        graph.erase_node(gather)
        if not weight.users:
            graph.erase_node(weight)
    return parts[-1]


def _named(graph: fx.Graph, name: str, operator: str, *args: Any, path: str, val: Any) -> fx.Node:
    """A call at the insert point, called ``name`` as far as that is free."""
    node = graph.create_node("call_function", OPERATORS[operator], args, name=name)
    node.meta |= {"path": path, "val": val}
    return node


def _issue(graph: fx.Graph, shards: fx.Node, path: str, name: str = "following") -> fx.Node:
    return _named(graph, name, "issue_gather", shards, path=path, val=shards.meta["val"])


def stream_gathers(graph: fx.Graph, context: Context) -> PassResult:
    """Gather the weights of each layer together, one layer ahead."""
    stages: Sequence[_Stage] = _stages(graph)
    if not stages:
        return PassResult(0)
    taken = sum(n.meta.get("input", "").startswith(f"{SHARDS}_") for n in graph.nodes)
    inputs = [_input(graph, s.gathers, taken + number) for number, s in enumerate(stages)]
    begin = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(begin):
        pending = _issue(graph, inputs[0], "", "pending")
    for stage, following in zip(stages, [*inputs[1:], None], strict=True):
        last = _wait(graph, stage, pending)
        if following is not None:
            with graph.inserting_after(last):
                pending = _issue(graph, following, stage.layer)
    return PassResult(sum(len(stage.gathers) for stage in stages))


STREAM_GATHERS = Pass(
    "stream_gathers",
    stream_gathers,
    requires=frozenset({"canonical", "gathered"}),
    provides=frozenset({"streamed"}),
    may_add=frozenset({"issue_gather", "wait_gather", "getitem"}),
    exact=True,
    inputs=frozenset({SHARDS}),
)
