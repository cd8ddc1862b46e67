"""What a capture takes from the process and not from the model: checked when a plan is loaded."""

from __future__ import annotations

import hashlib

import torch
import torch._dynamo
import torch.overrides


def assumptions() -> dict[str, str | bool]:
    """Settings of torch that a traced graph has built in, as plain values.

    New tensors take the default dtype and device; operators change under deterministic mode.
    """
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }


def options_of_dynamo() -> str:
    """Digest of Dynamo's flags and limits, on which it depends what it can trace."""
    options = torch._dynamo.config.get_config_copy()
    kept = {name: value for name, value in options.items() if isinstance(value, bool | int)}
    return hashlib.sha256(repr(sorted(kept.items())).encode()).hexdigest()


def function_modes() -> int:
    """How many ``TorchFunctionMode`` a caller has put around what is traced now."""
    return len(torch.overrides._get_current_function_mode_stack())
