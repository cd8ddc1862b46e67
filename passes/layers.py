"""Decoder layers of a graph: found by where calls stand, not by class name.

A layer is an element of a module list. Where attention stands in it (the canonical op, torch's
own, or a softmax that weighs values), it is a layer whatever else it holds. Graphs that Dynamo
hands over may hold a part of a layer only, or none of its attention: there the module names in
which a policy's roles stand (:func:`tails`) find it as well.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from torch import fx

from .graph import inside, name_of, path_of

_IN_A_LIST = re.compile(r"^(.*?\.)?(\d+)(\.|$)")
_ELEMENT = re.compile(r"(?:^|\.)\d+(?=\.)")

#: The canonical op, its forms over a workspace, and its lowering in training.
ATTENTION = ("attention", "attend", "attend_one", "attend_as_configured")

_BETWEEN = ("to", "dropout", "getitem", "contiguous", "view", "reshape", "type_as")
_PRODUCTS = ("matmul", "bmm")


def layer_of(path: str) -> str | None:
    """The part of a module path up to its first list index: ``model.layers.3`` of
    ``model.layers.3.self_attn``; ``None`` where no list is on the way."""
    found = _IN_A_LIST.match(path)
    return path[: found.end(2)] if found else None


def attends(node: fx.Node) -> bool:
    """Whether a call is attention, or the softmax of one that is written out."""
    name = name_of(node)
    if name in ATTENTION or name == "scaled_dot_product_attention":
        return True
    return name == "softmax" and any(map(_weighs, node.users))


def _weighs(node: fx.Node) -> bool:
    """Whether a value ends up as a factor of a product, through casts and dropout."""
    if name_of(node) in _PRODUCTS:
        return True
    return name_of(node) in _BETWEEN and any(map(_weighs, node.users))


def layer_with(path: str, tails: Collection[str]) -> str | None:
    """The list element below which ``path`` ends in one of ``tails``: ``model.layers.3`` of
    ``model.layers.3.self_attn.q_proj`` for the tail ``self_attn.q_proj``.

    A path that is a tail as it stands belongs to the layer "", the root of the graph.
    """
    for element in _ELEMENT.finditer(path):
        if path[element.end() + 1 :] in tails:
            return path[: element.end()]
    return "" if path in tails else None


def layer_paths(graph: fx.Graph, tails: Collection[str] = ()) -> tuple[str, ...]:
    """The layers of a graph in order.

    Args:
        graph: Its nodes say where they stand.
        tails: Module names, relative to a layer, that make a list element a layer too.
    """
    found: dict[str, None] = {}
    elements: dict[str, str | None] = {}
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        path = path_of(node)
        if tails and path not in elements:
            elements[path] = layer_with(path, tails)
        layer = elements.get(path)
        if layer is None and attends(node):
            layer = layer_of(path)
        if layer is not None:
            found[layer] = None
    return tuple(found)


def nodes_by_layer(graph: fx.Graph, layers: Iterable[str]) -> dict[str, list[fx.Node]]:
    """The calls that stand in each layer, in order."""
    found: dict[str, list[fx.Node]] = {layer: [] for layer in layers}
    homes: dict[str, list[list[fx.Node]]] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            path = path_of(node)
            if path not in homes:
                homes[path] = [found[layer] for layer in found if inside(node, layer)]
            for home in homes[path]:
                home.append(node)
    return found


def nodes_of(graph: fx.Graph, layer: str) -> list[fx.Node]:
    """The calls that stand in a layer, in order."""
    return [n for n in graph.nodes if n.op == "call_function" and inside(n, layer)]
