"""What stands as ``generate`` on a hybridized model's instance."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from .engine import HybridEngine


class GenerateSwitch:
    """Sends ``model.generate`` through the engine.

    A deep copy or a pickle of the model must not carry the engine along: there, the switch turns
    into the plain method of the copy.

    Attributes:
        engine: Where the calls go.
        shadowed: What stood there on the instance before, or None.
    """

    def __init__(self, engine: HybridEngine, model: nn.Module) -> None:
        self.engine = engine
        self.shadowed = vars(model).get("generate")
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine.generate(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        copy = memo.get(id(self._model), self._model)
        return MethodType(type(copy).generate, copy)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._model, "generate")  # found on the class: the plain method


def engine_of(model: nn.Module) -> HybridEngine | None:
    """The engine that serves ``model``, if it is hybridized."""
    switch = vars(model).get("generate")
    return switch.engine if isinstance(switch, GenerateSwitch) else None
