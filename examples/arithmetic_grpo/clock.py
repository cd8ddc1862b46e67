"""Wall time that waits for the device."""

from __future__ import annotations

import time

import torch


def now(device: torch.device) -> float:
    """Return seconds on the wall clock, once all work given to ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
