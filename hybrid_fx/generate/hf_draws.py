"""The draws of ``torch.multinomial`` over all rows of a call, computed for those that still run.

``multinomial(p, 1)`` is ``argmax(p / q)`` with exponential noise ``q`` ``[B, V]``. On a CPU that
noise is made element by element, each from one float64 uniform: ``q = -log1p(-u)``. So of a row
that has finished the random numbers are taken off the generator, and nothing is made of them.
Elsewhere noise depends on the shape of the launch, and all of it is drawn. Either way the
generator stands afterwards where multinomial over all rows leaves it.

Legend: B rows of the call, N rows that still run, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.moving import to_device
from .choose import Memory, probabilities
from .largest import first_largest

#: Elements to draw at a time: they stay in the processor's cache.
_CHUNK = 2**18


class HFDraws:
    """One draw a row and step; see :class:`~hybrid_fx.generate.choose.Choose`.

    Args:
        batch: B; noise is drawn for all of them.
    """

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._probabilities, self._noise = Memory(), Memory()
        self._in_order = noise_is_drawn_in_order()
        self._kept: tuple[list[int], Tensor] | None = None

    def __call__(self, scores: Tensor, rows: Sequence[int]) -> Tensor:
        p = probabilities(scores, self._probabilities)
        if p.device.type == "cpu" and p.dtype == torch.float32 and self._in_order:
            return self._row_by_row(p, rows)
        if list(rows) == list(range(self._batch)):
            return torch.multinomial(p, num_samples=1).squeeze(1)
        noise = self._noise.take(self._batch, p.shape[1], p.dtype, p.device).exponential_()
        return p.div_(noise[self._index(rows, p.device)]).argmax(-1)

    def _index(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """Rows on the device of the call, int64 ``[N]``; copied when they are other ones."""
        if self._kept is None or self._kept[0] != list(rows):
            on_host = torch.tensor(rows, device="cpu")
            self._kept = list(rows), to_device(on_host, device)
        return self._kept[1]

    def _row_by_row(self, p: Tensor, rows: Sequence[int]) -> Tensor:
        size = p.shape[1]
        step = max(1, _CHUNK // size)
        place = {row: at for at, row in enumerate(rows)}
        found = torch.empty(len(rows), dtype=torch.int64, device=p.device)
        for first in range(0, self._batch, step):
            count = min(step, self._batch - first)
            noise = self._noise.take(step, size, torch.float64, p.device)[:count]
            running = [row for row in range(first, first + count) if row in place]
            if not running:
                noise.view(torch.int64).random_()  # takes as many numbers, and makes less of them
                continue
            noise.uniform_().neg_()
            if len(running) < count:
                noise = noise[[row - first for row in running]]
            drawn = noise.log1p_().to(p.dtype).neg_()
            places = [place[row] for row in running]
            chosen = p[places[0] : places[0] + 1] if len(places) == 1 else p[places]
            found[places] = first_largest(torch.div(chosen, drawn, out=drawn))
        return found


def noise_is_drawn_in_order() -> bool:
    """Whether this torch makes float32 noise on a CPU as the head of this file says.

    Held against a few draws, of generators of their own.
    """
    whole, rows = (torch.Generator("cpu").manual_seed(0) for _ in range(2))
    noise = torch.empty(3, 21, device="cpu").exponential_(generator=whole)
    uniform = torch.empty(3, 21, dtype=torch.float64, device="cpu")
    uniform[0].uniform_(generator=rows)
    uniform[1].view(torch.int64).random_(generator=rows)
    uniform[2].uniform_(generator=rows)
    same = torch.equal((-torch.log1p(-uniform)).float()[::2], noise[::2])
    return same and torch.equal(whole.get_state(), rows.get_state())
