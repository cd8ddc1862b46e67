"""Graphs as text for a terminal: a node with what stands around it, and what a pass changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import unified_diff

import torch
from torch import fx

from .graph import inside, name_of, path_of, tail_names, value_of, weight_name

_WIDTH = 110
_NEIGHBOURS = 8


def kind_of(value: object) -> str:
    """Dtype and shape of a fake value: ``float32[2, s0, 64]``; its type where it is no tensor."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(kind_of, value))})"
    return type(value).__name__


def line(node: fx.Node, within: str = "") -> str:
    """One node as a line: ``mul_2: float32[2, s0, 64] = mul(silu, up)  in model.layers.0.mlp``.

    Names of weights and modules are as seen from inside the module ``within``.
    """
    args = [_spelt(arg, within) for arg in node.args]
    args += [f"{key}={_spelt(value, within)}" for key, value in node.kwargs.items()]
    if node.op == "output":
        return _cut(f"output({', '.join(args)})")
    value = value_of(node)
    named = node.name if value is None else f"{node.name}: {kind_of(value)}"
    if node.op == "placeholder":
        return _cut(f"{named}  ({_stands_for(node)})")
    target = name_of(node) or getattr(node.target, "__name__", str(node.target))
    method = "." if node.op == "call_method" else ""
    path = tail_names(path_of(node), within)
    place = f"  in {path}" if path and path != within else ""
    room = _WIDTH - len(place)
    return _cut(f"{named} = {method}{target}({', '.join(args)})", max(room, 40)) + place


def _spelt(value: object, within: str) -> str:
    if isinstance(value, tuple | list):
        inner = ", ".join(_spelt(item, within) for item in value)
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    if not isinstance(value, fx.Node):
        return repr(value)
    return tail_names(weight_name(value) or value.name, within)


def _stands_for(node: fx.Node) -> str:
    kind = "parameter" if node.meta.get("parameter") else "weight"
    for key, what in (("weight", kind), ("input", "input"), ("prepared", "prepared tensor")):
        if key in node.meta:
            return f"{what} {node.meta[key]}"
    return "a placeholder that stands for nothing"


def _cut(text: str, width: int = _WIDTH) -> str:
    return text if len(text) <= width else f"{text[: width - 2]} …"


def neighbourhood(node: fx.Node, *, reach: int = 2) -> str:
    """A node in the order of its graph: with its inputs, its users and ``reach`` nodes around it.

    Inputs and users beyond eight of a kind are counted, not shown.
    """
    nodes = list(node.graph.nodes)
    at = nodes.index(node)
    inputs, users = list(node.all_input_nodes), list(node.users)
    label = dict.fromkeys(nodes[max(at - reach, 0) : at + reach + 1], "")
    label |= dict.fromkeys(inputs[:_NEIGHBOURS], "input")
    label |= dict.fromkeys(users[:_NEIGHBOURS], "user")
    label[node] = "->"
    text = list(_rows(nodes, label))
    for what, all_of_them in (("inputs", inputs), ("users", users)):
        if len(all_of_them) > _NEIGHBOURS:
            text.append(f"{'':>7}  and {len(all_of_them) - _NEIGHBOURS} more {what}")
    return "\n".join(text)


def listing(graph: fx.Graph, within: str = "") -> list[str]:
    """The nodes of a graph as lines, in order: those that stand in the module ``within``."""
    return [line(node, within) for node in graph.nodes if inside(node, within)]


def changes(before: Sequence[str], after: Sequence[str], *, around: int = 1) -> str:
    """What changed from one listing to another: ``-`` went, ``+`` came, ``...`` is a gap."""
    lines = list(unified_diff(before, after, lineterm="", n=around))[2:]
    return "\n".join(
        "  ..." if text.startswith("@@") else f"{text[0]} {text[1:]}" for text in lines
    )


def _rows(nodes: list[fx.Node], label: dict[fx.Node, str]) -> Iterable[str]:
    skipped = False
    for node in nodes:
        if node in label:
            if skipped:
                yield f"{'':>7}  ..."
            yield f"{label[node]:>7}  {line(node)}"
        skipped = node not in label
    # what another graph owns stands in no order
    yield from (f"{label[n]:>7}  {line(n)}" for n in label if n.graph is not nodes[0].graph)
