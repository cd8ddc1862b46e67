"""Ranks in step: before anything collective, each says whether it takes part.

A generate is a sequence of rounds. In each, every rank of the group says what it is about to do;
then all do it. A rank that has nothing left to do answers the rounds of the others until all have
finished, and one that raised says so, so that none waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import RankError
from .torch_collectives import all_gather_single

#: What one rank says in a round, beside its state.
Words = tuple[int, ...]

_WIDTH = 8
_WORKS, _DONE, _FAILED = range(3)


class Lockstep:
    """The rounds of one group of ranks.

    Args:
        group: The process group; ``None`` is that of all ranks.
        device: Where its collectives run.
    """

    def __init__(self, group: Any, device: Callable[[], torch.device]) -> None:
        self.group = group
        self._device = device
        self._failed = False

    def begin(self) -> None:
        """A generate begins."""
        self._failed = False

    def step(self, *words: int) -> list[Words | None]:
        """Take part in the next round. Collective.

        Args:
            words: What this rank says, up to 7 numbers of 64 bits.

        Returns:
            What each rank said, in order; ``None`` for one that has finished.

        Raises:
            RankError: where another rank raised, or is gone.
        """
        return self._round(_WORKS, words)

    def same(self, *words: int, finished: bool = False) -> None:
        """:meth:`step`, where every rank must say the same.

        Args:
            finished: Whether ranks may have finished; those :meth:`finish` serves.

        Raises:
            RankError: as :meth:`step`; or where one says something else, or has finished.
        """
        rows = [
            pair for pair in enumerate(self.step(*words)) if pair[1] is not None or not finished
        ]
        first, wanted = rows[0]
        if odd := [rank for rank, other in rows if other != wanted]:
            self._failed = True
            names = [self.name(rank) for rank in (odd[0], first)]
            raise RankError(
                f"rank {names[0]} would not do what rank {names[1]} does: something went wrong "
                f"with its graphs that did not on rank {names[1]}; see the log of both"
            )

    def share(self, mine: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """What each rank holds: 1-D, of ``counts`` elements, which all ranks know. Collective.

        Raises:
            RankError: where another rank is gone.
        """
        widest = max(counts)
        if not widest:
            return [mine.new_empty(0) for _ in counts]
        padded = mine.new_zeros(widest)
        padded[: mine.numel()] = mine
        rows = mine.new_empty(len(counts) * widest)
        self._all_gather(rows, padded)
        return [row[:n] for row, n in zip(rows.view(-1, widest), counts, strict=True)]

    def name(self, rank: int) -> int:
        """What a rank of the group is called in the whole job."""
        return rank if self.group is None else int(dist.get_global_rank(self.group, rank))

    def finish(self, serve: Callable[[list[Words | None]], None]) -> None:
        """Nothing is left to do here: answer until that holds for all ranks. Collective.

        Args:
            serve: Does this rank's part of a round, given what the others said.

        Raises:
            RankError: where another rank raised, or is gone.
        """
        said = self._round(_DONE, ())
        while any(words is not None for words in said):
            serve(said)
            said = self._round(_DONE, ())

    def fail(self) -> None:
        """Say in the next round, and last, that this rank raises an error. Collective."""
        if not self._failed:
            self._failed = True
            try:
                self._exchange(_FAILED, ())
            except RankError:
                return  # nobody is left to be told; this rank's own error counts

    def lost(self, error: RuntimeError) -> RankError:
        """What to raise where a collective of this generate failed."""
        self._failed = True
        return gone(error)

    def _round(self, state: int, words: Words) -> list[Words | None]:
        rows = self._exchange(state, words)
        failed = [rank for rank, row in enumerate(rows) if row[0] == _FAILED]
        if failed:
            self._failed = True
            raise RankError(
                f"rank {self.name(failed[0])} raised an error in its generate; this rank stops "
                "with it"
            )
        return [tuple(row[1:]) if row[0] == _WORKS else None for row in rows]

    def _exchange(self, state: int, words: Words) -> list[list[int]]:
        row = [state, *words]
        row += [0] * (_WIDTH - len(row))
        mine = torch.tensor(row, dtype=torch.int64, device=self._device())
        rows = mine.new_empty(dist.get_world_size(self.group) * _WIDTH)
        self._all_gather(rows, mine)
        found: list[list[int]] = rows.view(-1, _WIDTH).tolist()
        return found

    def _all_gather(self, rows: Tensor, mine: Tensor) -> None:
        try:
            all_gather_single(rows, mine, group=self.group)
        except RuntimeError as error:
            raise self.lost(error) from error


def gone(error: RuntimeError) -> RankError:
    """What to raise where a collective failed with ``error``."""
    return RankError(
        "another rank of this generate is gone, or silent for longer than the process group "
        f"waits: {error}"
    )
