"""The seam to Dynamo: trace one call of a function and hand over its graph.

Tried on torch 2.11 and 2.13. Dynamo lifts parameters and buffers to placeholders; which tensor
each one stands for is read from the arguments of the first call, not from its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import fx
from torch._dynamo import exc
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

from ..errors import CaptureError
from .assumed import conditions, writes
from .linear_seam import plain_linear
from .watch import Stopped, Watch

#: For the time of one trace. Without the first, Dynamo remembers the values an earlier trace of
#: this function saw (another model's eps, its scaling) and makes inputs of what differs.
_SETTINGS = {
    "automatic_dynamic_shapes": False,
    "assume_static_by_default": True,
    "specialize_float": True,
    "suppress_errors": False,
}


#: What Dynamo raises of the code that it traces.
_OF_THE_CODE = (exc.Unsupported, exc.UserError, exc.TorchRuntimeError, ConstraintViolationError)
_NO_MEMORY = (MemoryError, torch.OutOfMemoryError)


class _Stop(Exception):
    """Ends the first run of the compiled function: its arguments are all that was wanted."""


@dataclass(frozen=True)
class Trace:
    """A graph and the values its placeholders stood for, in order.

    Attributes:
        conditions: What must hold of the inputs' sizes, where the code asked.
        writes: The Python objects that the code changes, which the graph does not.
    """

    module: fx.GraphModule
    arguments: tuple[Any, ...]
    conditions: tuple[str, ...]
    writes: tuple[str, ...]


def _own_code(function: FunctionType) -> FunctionType:
    """A copy with a code object of its own: Dynamo caches and counts by code object."""
    code: CodeType = function.__code__.replace(co_name=function.__name__)
    copy = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _reason(error: Exception) -> str:
    """What Dynamo says in short: the exception that the traced code raised, else its first line."""
    words = str(error).strip()
    context = re.search(r"Developer debug context: (.+)", words)
    raised = context and re.match(r"raised exception \w+\((['\"])(.*)\1\)", context[1])
    if raised:
        return raised[2]
    first = words.splitlines()[0] if words else type(error).__name__
    return f"{first}: {context[1][:200]}" if context else first


def _lasts(error: BaseException) -> bool:
    """Whether Dynamo says something of the traced code: not where memory ran out, or it fails."""
    causes: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in causes:
        causes.append(link)
        link = link.__cause__ or link.__context__
    return isinstance(error, _OF_THE_CODE) and not any(isinstance(c, _NO_MEMORY) for c in causes)


def trace(function: Callable[..., Any], *args: Any, watch: Watch | None = None) -> Trace:
    """Trace ``function(*args)`` without running it.

    Tensors whose sizes are to stay symbolic must be marked by the caller.

    Args:
        watch: May end the trace early, and says how it goes.

    Raises:
        CaptureError: where Dynamo breaks the graph, specialises a marked size, or fails; or what
            the watch says.
    """
    traces: list[Trace] = []
    assert isinstance(function, FunctionType)
    watch = watch or Watch(function.__name__, None)

    def backend(module: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        asked, written = conditions(), writes()

        def first_run(*arguments: Any) -> Any:
            traces.append(Trace(module, arguments, asked, written))
            raise _Stop

        return first_run

    try:
        with plain_linear(), torch._dynamo.config.patch(_SETTINGS), watch.watching():
            torch.compile(_own_code(function), backend=backend, fullgraph=True)(*args)
    except _Stop:
        return traces[0]
    except Stopped:
        assert watch.error is not None
        raise watch.error from None
    except Exception as error:
        failed = CaptureError(f"the forward could not be traced as one graph: {_reason(error)}")
        failed.lasting = _lasts(error)
        raise failed from error
    raise CaptureError("the forward runs no tensor operation; nothing was traced")
