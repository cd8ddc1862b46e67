"""In-place operations become plain ones where nothing else can see the memory they write.

``x += y`` on a fresh intermediate is ``x + y`` with every later use renamed. Where the target may
share memory with something that is used later (a view, an input, a buffer), the operation stays,
in its in-place spelling, and later passes keep it where it stands.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from .effects import shares_memory
from .graph import fake_values, name_of, order, same_shape, value_of
from .operators import OPERATORS

#: In-place spelling -> (functional operator, in-place operator of the table).
_TWINS: dict[Any, tuple[str, str]] = {
    operator.iadd: ("add", "add_"),
    operator.isub: ("sub", "sub_"),
    operator.imul: ("mul", "mul_"),
    operator.itruediv: ("truediv", "div_"),
    "add_": ("add", "add_"),
    "sub_": ("sub", "sub_"),
    "mul_": ("mul", "mul_"),
    "div_": ("truediv", "div_"),
    "clamp_": ("clamp", "clamp_"),
    "masked_fill_": ("masked_fill", "masked_fill_"),
    "relu_": ("relu", "relu_"),
    "tanh_": ("tanh", "tanh_"),
    "sigmoid_": ("sigmoid", "sigmoid_"),
    "index_put_": ("index_put", "index_put_"),
}

#: The plain twin where the in-place one has keywords: ``x.add_(y, alpha=2)``.
_WITH_KEYWORDS = {"add": "scaled_add", "sub": "scaled_sub", "truediv": "div"}


def _seen_later(node: fx.Node, place: dict[fx.Node, int], at: int) -> bool:
    """Whether a view of ``node`` taken before position ``at`` is used there or later."""
    return any(
        shares_memory(user)
        and place[user] < at
        and (any(place[u] >= at for u in user.users) or _seen_later(user, place, at))
        for user in node.users
    )


def _aliased(node: fx.Node, place: dict[fx.Node, int], at: int) -> bool:
    """Whether ``node``'s memory may be seen under another name after position ``at``."""
    if node.op != "call_function" or name_of(node) is None or shares_memory(node):
        return True
    return _seen_later(node, place, at)


def _same_kind(node: fx.Node, plain: str) -> bool:
    """Whether the plain operator gives the dtype and shape that writing in place keeps."""
    written = value_of(node.args[0])
    values = [value_of(arg) for arg in (*node.args, *node.kwargs.values())]
    if not isinstance(written, FakeTensor) or any(value is None for value in values[1:]):
        return False
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    with fake_values(written.fake_mode):
        result = OPERATORS[plain](*args, **kwargs)
    return result.dtype == written.dtype and same_shape(result.shape, written.shape)


def functionalize(graph: fx.Graph) -> int:
    """Replace in-place calls by plain ones where that is sound; returns how many changed."""
    count = 0
    for node in list(graph.nodes):
        before = node.target, node.kwargs
        target = name_of(node) if name_of(node) in _TWINS else node.target
        if node.kwargs.get("inplace") is True and name_of(node) is not None:
            _free_activation(graph, node)
        elif target in _TWINS and node.args:
            _free_twin(graph, node, *_TWINS[target])
        count += (node.target, node.kwargs) != before
    return count


def _rename(graph: fx.Graph, node: fx.Node) -> bool:
    """Give later uses of the written value the new name, where no other name sees the write."""
    place = order(graph)
    written = node.args[0]
    if not isinstance(written, fx.Node) or _aliased(written, place, place[node]):
        return False
    written.replace_all_uses_with(node, delete_user_cb=lambda user: place[user] > place[node])
    return True


def _free_activation(graph: fx.Graph, node: fx.Node) -> None:
    """``relu(x, inplace=True)``; where it must write, ``relu_`` does, and others stay refused."""
    plain = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    if _rename(graph, node):
        node.kwargs = plain
    elif name_of(node) == "relu":
        node.target, node.kwargs = OPERATORS["relu_"], plain


def _free_twin(graph: fx.Graph, node: fx.Node, plain: str, in_place: str) -> None:
    if node.kwargs:
        plain = _WITH_KEYWORDS.get(plain, plain)
    if not isinstance(node.args[0], fx.Node) or not _is_tensor(node.args[0]):
        node.target = OPERATORS[plain]  # symbolic sizes: plain arithmetic
        return
    sound = _same_kind(node, plain) and _rename(graph, node)
    node.op, node.target = "call_function", OPERATORS[plain if sound else in_place]


def _is_tensor(node: fx.Node) -> bool:
    return not isinstance(value_of(node), int | float | torch.SymInt | torch.SymFloat)
