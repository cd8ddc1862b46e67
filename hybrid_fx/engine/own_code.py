"""Does a model's forward run code of a user's?"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..cache.helpers import functions_in
from ..cache.tree import View, global_hooks, own_hooks, walk
from ..cache.users import is_users


def runs_own_code(model: nn.Module, view: View) -> bool:
    """Whether a forward hook, a patched ``forward`` or a class that no library has takes part."""
    if any(_is_users(hook) for kind, hook in global_hooks() if "forward" in kind):
        return True
    return any(_is_own(module, view) for _, module in walk(model))


def _is_own(module: nn.Module, view: View) -> bool:
    if is_users(type(module).__module__) or _is_users(vars(module).get("forward")):
        return True
    return any(
        "forward" in kind and not view.foreign_hook(hook) and _is_users(hook)
        for kind, hook in own_hooks(module)
    )


def _is_users(value: Any) -> bool:
    functions = functions_in(value)
    return any(is_users(str(function.__globals__.get("__name__", ""))) for function in functions)
