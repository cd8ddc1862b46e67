"""From a device that computes while the host goes on, to the host: nobody waits for all of it.

On such a device a step's flags are copied behind the step; the host queues the next forward and
then waits for that copy alone. Legend: B rows of the call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..runtime.moving import is_asynchronous


class ToHost:
    """Tokens and flags of one step, on their way to the host.

    Args:
        batch: B.
        device: Where they come from.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        queued = is_asynchronous(device)
        self._host = torch.empty(2, batch, dtype=torch.int64, device="cpu", pin_memory=queued)
        self._device = device
        event: Any = torch.cuda.Event  # untyped in torch
        self._copied = event() if queued else None

    def send(self, tokens: Tensor, flags: Tensor) -> None:
        """Begin to copy tokens and flags, int64 ``[B]`` each, of the step that was queued last."""
        self._host.copy_(torch.stack([tokens, flags]), non_blocking=self._copied is not None)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))

    def read(self) -> tuple[Tensor, list[int]]:
        """Tokens, int64 ``[B]`` on the host, and flags; waits for that copy alone."""
        if self._copied is not None:
            self._copied.synchronize()
        flags: list[int] = self._host[1].tolist()
        return self._host[0].clone(), flags
