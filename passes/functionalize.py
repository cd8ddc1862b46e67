"""In-place operations become plain ones where nothing else can see the memory they write.

``x += y`` on a fresh intermediate is ``x + y`` with every later use renamed. Where the target may
share memory with something that is used later (a view, an input, a buffer), the operation stays,
in its in-place spelling, and later passes keep it where it stands.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from .graph import name_of, order
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
}

#: Operators whose result may share memory with an argument.
VIEWS: frozenset[str] = frozenset(
    "view reshape transpose t permute unsqueeze squeeze expand expand_as getitem split chunk "
    "unbind unflatten flatten select narrow movedim swapaxes view_as contiguous to detach "
    "unfold type_as".split()
)


def _seen_later(node: fx.Node, place: dict[fx.Node, int], at: int) -> bool:
    """Whether a view of ``node``, or a view of a view, is used at position ``at`` or later."""
    return any(
        name_of(user) in VIEWS
        and (any(place[u] >= at for u in (user, *user.users)) or _seen_later(user, place, at))
        for user in node.users
    )


def _aliased(node: fx.Node, place: dict[fx.Node, int], at: int) -> bool:
    """Whether ``node``'s memory may be seen under another name after position ``at``."""
    if node.op != "call_function" or name_of(node) in VIEWS or name_of(node) is None:
        return True
    return _seen_later(node, place, at)


def functionalize(graph: fx.Graph) -> int:
    """Replace in-place calls by plain ones where that is sound; returns how many changed."""
    count = 0
    for node in list(graph.nodes):
        target = node.target
        inplace_flag = name_of(node) in ("relu", "silu") and node.kwargs.get("inplace") is True
        if name_of(node) in _TWINS:
            target = name_of(node)
        if target not in _TWINS and not inplace_flag:
            continue
        place = order(graph)
        written = node.args[0]
        if not isinstance(written, fx.Node):  # symbolic sizes: plain arithmetic
            node.target = OPERATORS[_TWINS[target][0]]
            count += 1
            continue
        sound = not _aliased(written, place, place[node])
        if inplace_flag:
            if not sound:
                continue
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
        else:
            plain, in_place = _TWINS[target]
            node.target = OPERATORS[plain if sound else in_place]
        if sound:
            written.replace_all_uses_with(
                node, delete_user_cb=lambda user: place[user] > place[node]  # noqa: B023
            )
        count += 1
    return count
