"""What of a model's functions and hooks this package put there."""

from __future__ import annotations

import functools


def is_ours(value: object) -> bool:
    """Whether ``value`` is a function that this package put on a module (generate, train ...)."""
    while isinstance(value, functools.partial):
        value = value.func
    name = getattr(value, "__module__", None)
    return isinstance(name, str) and name.partition(".")[0] == "hybrid_fx"
