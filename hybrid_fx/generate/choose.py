"""Which token comes next: the one with the largest score, or a draw.

Legend: B rows of the call, N rows that still run, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..runtime.moving import is_asynchronous
from .largest import first_largest

NO_DISTRIBUTION = "probability tensor contains either `inf`, `nan` or element < 0"


class Choose(Protocol):
    """Chooses the tokens of one step; called once a step."""

    def __call__(self, scores: Tensor, rows: Sequence[int]) -> Tensor:
        """One token for each row.

        Args:
            scores: ``[N, V]``, processed; not written.
            rows: Which rows of the call they belong to, N distinct numbers below B.

        Returns:
            int64 ``[N]``.

        Raises:
            RuntimeError: where a row's scores are no distribution, in torch's words.
        """


def largest(scores: Tensor, rows: Sequence[int]) -> Tensor:
    """The first token of the largest score in each row: greedy search."""
    return first_largest(scores)


class Memory:
    """Numbers that every step of a call writes anew.

    Fresh memory of ``[B, V]`` costs more than what is computed in it.
    """

    def __init__(self) -> None:
        self._held: Tensor | None = None

    def take(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """``[rows, width]`` of unknown content."""
        held = self._held
        if held is None or len(held) < rows or held.shape[1] != width or held.dtype != dtype:
            held = self._held = torch.empty(rows, width, dtype=dtype, device=device)
        return held[:rows]

    def like(self, given: Tensor) -> Tensor:
        """As much as ``given`` ``[N, V]``."""
        rows, width = given.shape
        return self.take(rows, width, given.dtype, given.device)


def probabilities(scores: Tensor, memory: Memory) -> Tensor:
    """Softmax of ``scores`` ``[N, V]``, in ``memory``.

    Raises:
        RuntimeError: for NaN, +inf, or a row without a finite score; what multinomial says then.
            On a GPU its work says so, later.
    """
    found = torch.softmax(scores, -1, out=memory.like(scores))
    broken = found[:, :1].isnan().any()  # one such score makes its whole row NaN
    if is_asynchronous(found.device):
        torch._assert_async(~broken, NO_DISTRIBUTION)  # as multinomial does: nobody waits for it
    elif bool(broken):
        raise RuntimeError(NO_DISTRIBUTION)
    return found
