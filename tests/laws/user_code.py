"""A model with code of a user's in its forward, and the call that it is tried with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tiny_models import prompt, tiny

import hybrid_fx

CALL = prompt([7, 4, 6]) | {"max_new_tokens": 8, "do_sample": False}


def hybridized(kind: str = "llama") -> Any:
    """An engine on a tiny model."""
    return hybrid_fx.hybridize(tiny(kind, 3), disk_cache=False)


def hook(engine: Any, function: Callable[..., Any]) -> None:
    """Put a forward hook on its first layer."""
    engine.module.model.layers[0].register_forward_hook(function)
