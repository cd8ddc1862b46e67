"""An object that stands for a model: whose a name is that is read, set or deleted on it.

A name that the class of the object defines, or its constructor set, is its own: a private one is
written there, a public one is refused. Any other is the model's, and is set where reading finds
it: on a wrapper such as a PeftModel, or on the model in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from torch import nn

from ..generate import causal_lm

#: Methods of a module that return it, as in ``engine = engine.to("cuda")``.
_CHAINED = frozenset("to cpu cuda float half bfloat16 double requires_grad_".split())


class StandIn:
    """See the head of this file. A constructor ends with :meth:`_stand`."""

    module: nn.Module

    def _stand(self) -> None:
        """From now on other names are the model's."""
        vars(self)["_stands"] = True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "module" not in vars(self):
            raise AttributeError(name)
        found = getattr(self.module, name)
        return functools.partial(self._chained, found) if name in _CHAINED else found

    def _chained(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a method of the model's returns; the engine in place of its model."""
        result = method(*args, **kwargs)
        return self if result is self.module else result

    def __setattr__(self, name: str, value: Any) -> None:
        if self._keeps(name):
            object.__setattr__(self, name, value)
        else:
            setattr(holder(self.module, name), name, value)

    def __delattr__(self, name: str) -> None:
        if self._keeps(name):
            object.__delattr__(self, name)
        else:
            delattr(holder(self.module, name), name)

    def _keeps(self, name: str) -> bool:
        """Whether ``name`` is written here.

        Raises:
            AttributeError: where it is public.
        """
        if "_stands" not in vars(self):
            return True
        own = name in vars(self) or hasattr(type(self), name)
        if own and not name.startswith("_"):
            refuse(name)
        return own

    def __dir__(self) -> Iterable[str]:
        return sorted({*object.__dir__(self), *dir(self.module)})

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an engine cannot be pickled, nor copied without its model; pickle or deep-copy "
            "engine.module and hybridize the result"
        )


def refuse(name: str) -> NoReturn:
    """Refuse to set or delete what is an engine's own.

    Raises:
        AttributeError: always.
    """
    raise AttributeError(
        f"engine.{name} is the engine's own, and is neither set nor deleted; where the model's is "
        f"meant, set engine.module.{name}; for an engine of another make call hybridize again"
    )


def holder(model: nn.Module, name: str) -> nn.Module:
    """What ``name`` is set on: the wrapped model where that alone has it, else ``model``."""
    inner: nn.Module = causal_lm(model)
    return inner if has(inner, name) and not has(model, name) else model


def has(module: nn.Module, name: str) -> bool:
    """Whether a module has ``name`` itself, and not by asking another."""
    held = (vars(module), module._parameters, module._buffers, module._modules)
    return any(name in names for names in held) or hasattr(type(module), name)
