"""The seam to PEFT for the time of one capture. Tried on peft 0.21.

DoRA asks for the type of a weight, to find quantized ones, and wraps a transposed weight in a new
Parameter; Dynamo can trace neither. For plain floating-point parameters the answer is known and
the wrapping without effect, so both are replaced by what they come to. It also empties a cache at
each call that does not use it: a write that is no part of what the call computes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from torch import Tensor, nn


def _plain_weight(module: nn.Module) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight


def _turned(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    return weight.T if fan_in_fan_out else weight


def _left_as_it_is(_: nn.Module) -> None:
    return None


@contextlib.contextmanager
def traceable_adapters(model: nn.Module) -> Iterator[None]:
    """Let adapters that PEFT put into ``model`` be traced inside the ``with`` block."""
    dora = sys.modules.get("peft.tuners.lora.dora")
    plain = all(p.is_floating_point() and type(p) is nn.Parameter for p in model.parameters())
    if dora is None or not plain:
        yield
        return
    stand_ins = {"dequantize_module_weight": _plain_weight, "transpose": _turned}
    before = {name: getattr(dora, name) for name in stand_ins}
    kind = dora.DoraLinearLayer
    empties = kind._cache_clear
    vars(dora).update(stand_ins)
    kind._cache_clear = _left_as_it_is
    try:
        yield
    finally:
        kind._cache_clear = empties
        vars(dora).update(before)
