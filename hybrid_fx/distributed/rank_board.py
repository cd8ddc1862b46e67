"""The latencies of all ranks in one line of rank 0.

Each rank leaves the record of an iteration in the key-value store that the process group was made
with, and rank 0 reads those that are there. Nothing of it is collective and nothing waits for
another rank: ``eval()``, where an iteration ends, may be called by one rank alone, and outside of
ZeRO-3 so may ``generate``; a collective in either would hang such a script.
"""

from __future__ import annotations

import datetime
import json
import logging
import weakref
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Protocol

import torch.distributed as dist
from torch.distributed import distributed_c10d

from ..engine.iteration import Iteration
from ..engine.stats import log_record
from .ranks_iteration import RanksIteration

logger = logging.getLogger("hybrid_fx")

#: How long the last line of a run waits for the records of other ranks, at ``close()`` or exit.
LAST_WAIT = datetime.timedelta(seconds=2)

_FIELDS = tuple(field.name for field in fields(Iteration))


class Store(Protocol):
    """The part of ``torch.distributed.Store`` that is used."""

    def set(self, key: str, value: str) -> Any: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def wait(self, keys: list[str], timeout: datetime.timedelta) -> None: ...
    def delete_key(self, key: str) -> bool: ...


class RankBoard:
    """Where the ranks of one engine leave their records.

    Records belong together that are the same in number since the same step of the optimizer: a
    rank that generates more often than others has records of its own, and they have a line too.
    Rank 0 logs a line when all ranks have left theirs, which it looks for in ``eval()``,
    ``generate()`` and ``step()``; at the latest at its next ``eval()``, ``close()`` or exit, with
    those that are there.

    Args:
        store: Shared by all ranks.
        rank, ranks: This rank, of how many.
        name: Of the engine, the same on all ranks and no other engine's.
        steps: How many steps were taken: the same on all ranks at the same point of a script.
        log: Takes the line of rank 0.
    """

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        ranks: int,
        name: str,
        steps: Callable[[], int],
        log: Callable[[object], object] = log_record,
    ) -> None:
        self._store, self._rank, self._ranks = store, rank, ranks
        self._name, self._steps, self._log = name, steps, log
        self._place = (-1, 0)
        self._open: tuple[list[str], Iteration] | None = None
        self._late: list[str] = []

    def close(self, record: Iteration) -> None:
        """An iteration of this rank has ended."""
        step, (last, count) = self._steps(), self._place
        self._place = (step, count + 1 if step == last else 0)
        keys = [f"{self._name}/{step}/{self._place[1]}/{rank}" for rank in range(self._ranks)]
        if self._rank:
            self._try(lambda: self._store.set(keys[self._rank], json.dumps(_plain(record))))
            return
        self._finish(whole=False)
        self._open = (keys[1:], record)
        self.look()

    def look(self) -> None:
        """Log the line of the last iteration, if all of its records are there by now."""
        self._finish(whole=True)

    def flush(self) -> None:
        """Log the line of the last iteration, after a short wait for the records of others."""
        if self._open is not None:
            keys = self._open[0]
            self._try(lambda: self._store.wait(keys, LAST_WAIT))
            self._finish(whole=False)

    def _finish(self, *, whole: bool) -> None:
        if self._open is None:
            return
        keys, record = self._open
        complete = self._try(lambda: self._store.check(keys))
        if whole and not complete:
            return
        self._open = None
        records = [record]
        for key in keys:
            found = self._try(lambda key=key: self._take(key))  # type: ignore[misc]
            records += [found] if found else []
        for key in self._late:
            self._try(lambda key=key: self._store.delete_key(key))  # type: ignore[misc]
        self._late = [] if complete else keys
        self._log(RanksIteration(ranks=self._ranks, records=tuple(records)))

    def _take(self, key: str) -> Iteration | None:
        if not self._store.check([key]):  # asking for one that is not there would wait for it
            return None
        found = json.loads(self._store.get(key))
        self._store.delete_key(key)
        return Iteration(**found)

    def _try(self, action: Callable[[], Any]) -> Any:
        """The result; None where the store is gone, or waited long enough: no run ends of it."""
        try:
            return action()
        except RuntimeError as error:  # torch's DistError and all of its kinds
            logger.debug("the statistics of other ranks cannot be read: %s", error)
            return None


def _plain(record: Iteration) -> dict[str, Any]:
    found = record.as_dict()
    return {name: found[name] for name in _FIELDS}


def open_board(steps: Callable[[], int]) -> RankBoard | None:
    """The board of one engine more; None where there is one rank, or no store. On every rank.

    The line that is open when the process ends is logged then.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    # Not public, and there since torch 1.x. Tried on torch 2.13. MPI's group has none.
    store: Any = distributed_c10d._get_default_store()
    if store is None:
        return None
    rank = dist.get_rank()
    try:
        number = store.add(f"hybrid_fx/engines/{rank}", 1)
    except RuntimeError as error:
        logger.debug("each rank logs its own statistics: %s", error)
        return None
    board = RankBoard(
        store,
        rank=rank,
        ranks=dist.get_world_size(),
        name=f"hybrid_fx/{number}",
        steps=steps,
    )
    weakref.finalize(board, at_exit, weakref.ref(board))
    return board


def at_exit(held: weakref.ref[RankBoard]) -> None:
    """Log the line that is open; a board that was dropped before has none."""
    if (board := held()) is not None:
        board.flush()
