"""Scopes without gradients become detached values, so that what switches autograd may go.

Under ``torch.no_grad()`` nothing is recorded. A call in such a scope that reads detached values
records nothing either: where a value that may carry a gradient enters a scope, ``detach`` is put in
its way. Without autograd there is nothing to keep, and canonicalization just drops the switches.
"""

from __future__ import annotations

import torch
from torch import fx

from .graph import after, call, path_of, value_of


def is_switch(node: fx.Node) -> bool:
    """Whether a call switches the recording of gradients on or off."""
    return getattr(node.target, "__name__", "") == "_set_grad_enabled"


def detach_scopes(graph: fx.Graph) -> int:
    """Cut gradients where scopes without them begin; returns how many values were detached."""
    recording, count = True, 0
    carrying: set[fx.Node] = set()  # what may have a gradient; of weights, parameters alone
    for node in list(graph.nodes):
        if node.op == "placeholder":
            if node.meta.get("parameter") or "weight" not in node.meta:
                carrying.add(node)
        elif is_switch(node):
            recording = bool(node.args[0])
        elif any(source in carrying for source in node.all_input_nodes):
            if recording or node.op == "output":
                carrying.add(node)
            else:
                count += _cut(graph, node, carrying)
    return count


def _cut(graph: fx.Graph, node: fx.Node, carrying: set[fx.Node]) -> int:
    """Let one call of a scope read, and give, values without gradients."""
    count = 0
    for source in node.all_input_nodes:
        if source in carrying and _is_float(source):
            with graph.inserting_before(node):
                cut = call(graph, "detach", source, path=path_of(node))
            node.replace_input_with(source, cut)
            count += 1
    given = [one for one in node.args if isinstance(one, fx.Node)]  # slices have no hash
    if any(s in carrying and value_of(s) is not None and not _is_tensor(s) for s in given):
        carrying.add(node)  # a piece of several values, such as a split: it is cut when it is one
        if _is_float(node):
            with after(graph, node):
                piece = call(graph, "detach", node, path=path_of(node))
            node.replace_all_uses_with(piece, delete_user_cb=lambda user: user is not piece)
            count += 1
    return count


def _is_tensor(node: object) -> bool:
    return isinstance(value_of(node), torch.Tensor)


def _is_float(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
