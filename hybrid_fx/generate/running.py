"""The rows that a session computes: which of the call they are, and what comes next of each.

Legend: B rows of the call, N rows in the session, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.moving import to_device
from .protocol import Session


class Running:
    """At first all rows of the call.

    Args:
        session: Of B rows.
        logits: ``[B, 1, V]`` of the last column.
        last: The positions of that column, int64 ``[B, 1]``.
        device: Of the tokens; the session's may be another.
        limit: The model's positions, None where nothing bounds them. A row that has finished and
            stays may have come to the last one, and waits there.

    Attributes:
        rows: Which rows of the call the session holds, in its order; N of them.
        index: The same, int64 ``[N]``; None where these are all rows in order.
    """

    def __init__(
        self,
        session: Session,
        logits: Tensor,
        last: Tensor,
        device: torch.device,
        limit: int | None = None,
    ) -> None:
        self.rows = list(range(len(last)))
        self.index: Tensor | None = None
        self._session = session
        self._logits: Tensor | None = logits
        self._last = last
        self._device = device
        self._end = torch.iinfo(last.dtype).max if limit is None else limit - 1

    def take(self) -> Tensor:
        """The logits ``[N, V]`` of the last column; given away, as a step needs them once."""
        assert self._logits is not None
        logits, self._logits = self._logits, None
        return logits[:, -1]

    def of(self, whole: Tensor) -> Tensor:
        """What belongs to these rows: ``[N, ...]`` of ``[B, ...]``."""
        return whole if self.index is None else whole[self.index]

    def feed(self, tokens: Tensor) -> None:
        """Append the tokens of these rows, out of ``[B]``."""
        self._last = (self._last + 1).clamp_max(self._end)
        fed = self.of(tokens)[:, None].to(self._last.device)
        self._logits = self._session.forward(fed, self._last)

    def keep(self, runs: Sequence[object]) -> bool:
        """Let the rows leave whose entry (N of them) is false; whether there were any."""
        stay = closed_up(runs)
        if len(stay) == len(self.rows):
            return False
        on_host = torch.tensor(stay, device="cpu")
        self._session.reorder(on_host)
        places = to_device(on_host, self._last.device)
        self._last = self._last[places]
        if self._logits is not None:
            self._logits = self._logits[places]
        self.rows = [self.rows[place] for place in stay]
        self.index = to_device(torch.tensor(self.rows, device="cpu"), self._device)
        return True


def closed_up(running: Sequence[object]) -> list[int]:
    """The rows that run, in such an order that few move: the last ones fill what others leave."""
    count = sum(map(bool, running))
    movers = iter([row for row in range(count, len(running)) if running[row]])
    return [row if running[row] else next(movers) for row in range(count)]
