"""Context managers that put a module in a state for one call and give it back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_ABSENT = object()


@contextmanager
def inference_mode_of(model: nn.Module) -> Iterator[None]:
    """Every submodule in eval and without gradient checkpointing; each flag restored after.

    The flags are written one by one and not through ``model.eval()``: a module whose ``train()``
    does more than set the flag keeps its state, and a submodule that stood in eval within a
    training model stands there again afterwards, also after an exception or KeyboardInterrupt.
    """
    training = [module for module in model.modules() if module.training]
    checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    try:
        for module in training:
            module.training = False
        for module in checkpointed:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for module in training:
            module.training = True
        for module in checkpointed:
            module.gradient_checkpointing = True  # type: ignore[assignment]


@contextmanager
def instance_attribute(owner: object, name: str, value: Any) -> Iterator[None]:
    """``owner.__dict__[name]`` is ``value`` inside the block; afterwards as it was, or absent."""
    before = owner.__dict__.get(name, _ABSENT)
    owner.__dict__[name] = value
    try:
        yield
    finally:
        if before is _ABSENT:
            owner.__dict__.pop(name, None)
        else:
            owner.__dict__[name] = before
