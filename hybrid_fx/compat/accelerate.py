"""What is assumed of accelerate: the hook it leaves on a module, as ``_hf_hook``.

A hook's ``forward`` brings weights from elsewhere before the module's own, or moves its inputs.
Several hooks of one module are put into one with ``hooks``. Nothing of accelerate is imported.
Tried on accelerate 1.15.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_MOVES_WEIGHTS = ("CpuOffload", "LayerwiseCastingHook")
_MOVES_INPUTS = ("AlignDevicesHook",)


def offloading(module: nn.Module) -> str | None:
    """What keeps the weights of ``module`` elsewhere between its forwards, or None."""
    for hook in _hooks(module):
        offloads = getattr(hook, "offload", False) or getattr(hook, "offload_buffers", False)
        if offloads or type(hook).__name__ in _MOVES_WEIGHTS:
            return "is offloaded (accelerate loads its weights at each call)"
    return None


def placing(module: nn.Module) -> str | None:
    """What moves the inputs of ``module`` to the device of its weights, or None."""
    if any(type(hook).__name__ in _MOVES_INPUTS for hook in _hooks(module)):
        return "is placed by a device map (accelerate moves its inputs at each call)"
    return None


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate has ``module`` compute; None where it does not say."""
    for hook in _hooks(module):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    hook = vars(module).get("_hf_hook")
    return () if hook is None else (hook, *getattr(hook, "hooks", ()))
