"""Binding time: which values of a graph depend on weights only."""

from __future__ import annotations

import torch
from torch import fx

from .effects import written_memory
from .graph import is_pure, value_of


def weight_only(graph: fx.Graph) -> dict[fx.Node, None]:
    """Nodes whose value depends on weights and constants alone, in order, placeholders included.

    A weight that the graph writes (a buffer updated in place) counts, what reads it does not.
    """
    touched = written_memory(graph)
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            if "weight" in node.meta:
                found[node] = None
        elif node.op == "call_function" and is_pure(node) and node not in touched:
            fixed = all(s in found and s not in touched for s in node.all_input_nodes)
            if fixed:
                found[node] = None
    return found


def tensors_cross(found: dict[fx.Node, None]) -> dict[fx.Node, None]:
    """``found`` without calls that are read outside of it and give no tensor, or a constant."""
    while True:
        kept = {
            node: None
            for node in found
            if node.op == "placeholder"
            or (node.all_input_nodes and isinstance(value_of(node), torch.Tensor))
            or all(user in found for user in node.users)
        }
        kept = {
            node: None
            for node in kept
            if node.op == "placeholder" or all(s in kept for s in node.all_input_nodes)
        }
        if len(kept) == len(found):
            return kept
        found = kept


def weights_first(graph: fx.Graph) -> None:
    """Let every weight-only call stand before all others, in the order they have."""
    movable = [node for node in weight_only(graph) if node.op != "placeholder"]
    moving = set(movable)
    first = next((n for n in graph.nodes if n.op != "placeholder" and n not in moving), None)
    for node in movable:
        if first is not None:
            first.prepend(node)
