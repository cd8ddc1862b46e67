"""A node and what stands around it, as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from .graph import name_of, path_of, value_of

_WIDTH = 96
_NEIGHBOURS = 8


def kind_of(value: object) -> str:
    """Dtype and shape of a fake value: ``float32[2, s0, 64]``; its type where it is no tensor."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(kind_of, value))})"
    return type(value).__name__


def line(node: fx.Node) -> str:
    """One node as a line: ``mul_2: float32[2, s0, 64] = mul(silu, up)  in model.layers.0.mlp``."""
    args = [_spelt(arg) for arg in node.args]
    args += [f"{key}={_spelt(value)}" for key, value in node.kwargs.items()]
    if node.op == "output":
        return _cut(f"output({', '.join(args)})")
    value = value_of(node)
    named = node.name if value is None else f"{node.name}: {kind_of(value)}"
    if node.op == "placeholder":
        return _cut(f"{named}  ({_stands_for(node)})")
    target = name_of(node) or getattr(node.target, "__name__", str(node.target))
    method = "." if node.op == "call_method" else ""
    place = f"  in {path_of(node)}" if path_of(node) else ""
    room = _WIDTH - len(place)
    return _cut(f"{named} = {method}{target}({', '.join(args)})", max(room, 40)) + place


def _spelt(value: object) -> str:
    if isinstance(value, tuple | list):
        inner = ", ".join(map(_spelt, value))
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    return value.name if isinstance(value, fx.Node) else repr(value)


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
