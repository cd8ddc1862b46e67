"""What one rank of a group wants of the next joint forward, and how it travels to the others.

Legend: B rows of this rank, T tokens in this call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_OPENS, _VALID, _ROWS = 1, 2, 4


@dataclass(frozen=True, kw_only=True)
class Turn:
    """New columns for the rows of one rank.

    Attributes:
        ids, positions: ``[B, T]`` int64.
        valid: ``[B, T]`` bool, False where nobody may look; ``None`` is all True.
        keep: For how many trailing columns logits are wanted.
        length: How many columns the rows hold before this.
        capacity: Columns to reserve.
        rows: ``[B]`` int64: which of its rows each one continues; ``None`` is each its own.
        opens: Whether the rows begin here.
    """

    ids: Tensor
    positions: Tensor
    valid: Tensor | None
    keep: int
    length: int
    capacity: int
    rows: Tensor | None
    opens: bool

    @property
    def words(self) -> tuple[int, ...]:
        """All that is no tensor, and the sizes of what is."""
        flags = _OPENS * self.opens
        flags += _VALID * (self.valid is not None) + _ROWS * (self.rows is not None)
        return (*self.ids.shape, self.keep, self.length, self.capacity, flags)

    def packed(self) -> Tensor:
        """The tensors in one, int64 ``[count_of(words)]``."""
        parts = [self.ids, self.positions, self.valid, self.rows]
        return torch.cat([part.reshape(-1).long() for part in parts if part is not None])

    @classmethod
    def unpacked(cls, words: Sequence[int], payload: Tensor) -> Turn:
        """The turn that said ``words`` and was packed into ``payload``."""
        batch, tokens, keep, length, capacity, flags = words[:6]
        size = batch * tokens
        sizes = [size, size, size * bool(flags & _VALID), batch * bool(flags & _ROWS)]
        ids, positions, valid, rows = torch.split(payload, sizes)
        return cls(
            ids=ids.view(batch, tokens),
            positions=positions.view(batch, tokens),
            valid=valid.view(batch, tokens).bool() if flags & _VALID else None,
            keep=keep,
            length=length,
            capacity=capacity,
            rows=rows if flags & _ROWS else None,
            opens=bool(flags & _OPENS),
        )


def count_of(words: Sequence[int] | None) -> int:
    """How many numbers the tensors of a turn are; none for a rank that takes none."""
    if words is None:
        return 0
    batch, tokens, flags = words[0], words[1], words[5]
    return batch * tokens * (2 + bool(flags & _VALID)) + batch * bool(flags & _ROWS)
