"""The state of the random numbers that a computation draws: those of its device and the host."""

from __future__ import annotations

import torch
from torch import Tensor


def random_state(device: torch.device) -> Tensor:
    """Of the default generators of the host and of the device, as one tensor of bytes."""
    own = torch.get_rng_state()
    if device.type == "cpu":
        return own
    return torch.cat((own, torch.get_device_module(device).get_rng_state(device)))


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Go on from a state of :func:`random_state`."""
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size].clone())
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[size:].clone(), device)
