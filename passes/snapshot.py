"""What a graph was, so that a pipeline that fails leaves it as it found it."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx


class Snapshot:
    """A graph's nodes with their order, targets, arguments, names and ``meta``.

    Fake values and other objects in ``meta`` are not copied.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._rows: list[tuple[fx.Node, dict[str, Any], Any, Any]] = [
            (node, _fields(node), node.args, node.kwargs) for node in graph.nodes
        ]

    def restore(self) -> None:
        """Give the graph back its nodes. One that was erased returns as a new one of its name."""
        graph = self._graph
        there = set(graph.nodes)
        for node in there:
            node.args, node.kwargs = (), {}
        back = {
            node: node if node in there else graph.create_node(fields["op"], fields["target"])
            for node, fields, _, _ in self._rows
        }
        for node in there - back.keys():
            graph.erase_node(node)
        last: fx.Node | None = None
        for old, fields, args, kwargs in self._rows:
            node = back[old]
            if last is None:
                if (first := next(iter(graph.nodes))) is not node:
                    first.prepend(node)
            else:
                last.append(node)
            for name, value in fields.items():
                setattr(node, name, value)
            node.args = fx.map_arg(args, lambda n: back[n])
            node.kwargs = fx.map_arg(kwargs, lambda n: back[n])
            last = node


def _fields(node: fx.Node) -> dict[str, Any]:
    return {
        "op": node.op,
        "target": node.target,
        "name": node.name,
        "type": node.type,
        "meta": copy.copy(node.meta),
    }
