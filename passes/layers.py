"""Decoder layers of a graph: found by where the attention operators stand, not by class name."""

from __future__ import annotations

import re

from torch import fx

from .graph import calls, inside, path_of

_IN_A_LIST = re.compile(r"^(.*?\.)?(\d+)(\.|$)")

ATTENTION = ("attention", "attend", "attend_one", "attend_as_configured")


def layer_of(path: str) -> str | None:
    """The part of a module path up to its first list index: ``model.layers.3`` of
    ``model.layers.3.self_attn``; ``None`` where no list is on the way."""
    found = _IN_A_LIST.match(path)
    return path[: found.end(2)] if found else None


def layer_paths(graph: fx.Graph) -> tuple[str, ...]:
    """The layers of a graph in order: every list element in which an attention op stands."""
    paths = (layer_of(path_of(node)) for node in calls(graph, *ATTENTION))
    return tuple(dict.fromkeys(path for path in paths if path is not None))


def nodes_of(graph: fx.Graph, layer: str) -> list[fx.Node]:
    """The calls that stand in a layer, in order."""
    return [n for n in graph.nodes if n.op == "call_function" and inside(n, layer)]
