"""Where a forward enters code of a user's."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any

from torch import nn

from ..ours import is_ours
from .helpers import functions_in
from .tree import View, global_hooks, is_code, own_attributes, own_hooks, walk
from .users import is_users

#: A user's callable, or a module of a user's class whose ``forward`` runs.
Root = Any


def own_roots(model: nn.Module, view: View | None = None) -> list[Root]:
    """Where a forward of ``model`` enters code of a user's, in an order that two processes share.

    Hooks, what can be called in a module's own ``__dict__``, forwards of own classes, and what a
    user put into the classes of libraries, their files, and ``torch.nn.functional``.
    """
    view = view or View()
    modules = [module for _, module in walk(model)]
    called = [hook for kind, hook in global_hooks() if "forward" in kind]
    for module in modules:
        hooks = (hook for kind, hook in own_hooks(module) if "forward" in kind)
        called += [hook for hook in hooks if not view.foreign_hook(hook)]
        own = own_attributes(module)
        called += [v for name, v in own if is_code(v) and not view.foreign_attribute(name)]
    return roots_among(modules, called)


def roots_among(modules: Iterable[nn.Module], called: Iterable[Any]) -> list[Root]:
    """See :func:`own_roots`.

    Args:
        called: Hooks and what can be called in a module's own ``__dict__``.
    """
    own: dict[type, bool] = {}
    roots: list[Root] = []
    for module in modules:
        kind = type(module)
        if kind not in own:
            own[kind] = is_own_kind(kind)
        if own[kind]:
            roots.append(module)
    roots += [value for value in called if _is_own(value)]
    return roots + list(_patched(own))


def is_own_kind(kind: type) -> bool:
    """Whether a class, or one that it is made from, is a user's."""
    return any(is_users(base.__module__) for base in kind.__mro__)


def _is_own(value: Any) -> bool:
    return not is_ours(value) and any(is_users(home_of(f)) for f in functions_in(value))


def home_of(function: FunctionType) -> str:
    """The Python module whose globals a function reads."""
    return str(function.__globals__.get("__name__", ""))


def _patched(kinds: Iterable[type]) -> Iterator[FunctionType]:
    """Functions of a user's in the classes of libraries, and in the files that these stand in."""
    kinds = [kind for kind in kinds if not is_users(kind.__module__)]
    bases = dict.fromkeys(base for kind in kinds for base in kind.__mro__ if base is not object)
    places: list[tuple[str, Mapping[str, Any]]] = [
        (base.__module__, vars(base)) for base in bases if not is_users(base.__module__)
    ]
    files = dict.fromkeys((*(kind.__module__ for kind in kinds), "torch.nn.functional"))
    places += [(name, vars(sys.modules[name])) for name in files if name in sys.modules]
    for name, there in places:
        home = vars(sys.modules[name]) if name in sys.modules else {}
        for value in list(there.values()):
            if type(value) is FunctionType:
                if value.__globals__ is not home or value.__closure__:
                    yield from (f for f in functions_in(value) if _is_own(f))
            elif isinstance(value, property | classmethod | staticmethod):
                yield from (f for f in functions_in(value) if _is_own(f))
