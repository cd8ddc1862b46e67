"""What a capture takes from the process and not from the model: checked when a plan is loaded."""

from __future__ import annotations

import torch


def assumptions() -> dict[str, str | bool]:
    """Settings of torch that a traced graph has built in, as plain values.

    New tensors take the default dtype and device; operators change under deterministic mode.
    """
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }
