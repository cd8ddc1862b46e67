"""From the host to a device that may compute while the host goes on: nobody waits for its work."""

from __future__ import annotations

import torch
from torch import Tensor

#: Where work is queued: a forward may be on its way before it is known that somebody needs it.
ASYNCHRONOUS = frozenset({"cuda"})


def is_asynchronous(device: torch.device) -> bool:
    """Whether the host runs ahead of this device."""
    return device.type in ASYNCHRONOUS


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; where it comes from the host to an asynchronous one, nobody waits."""
    if tensor.device.type != "cpu" or not is_asynchronous(device):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
