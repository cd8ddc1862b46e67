"""Ranks as threads of one process: a group whose collectives meet at a barrier."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class Meeting:
    """What the ranks share: a place for each, and a barrier."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.held: list[Any] = [None] * size
        self.barrier = threading.Barrier(size)


class Rank:
    """One rank's side of a group; counts its collectives."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank = meeting, rank
        self.calls: list[str] = []

    def _exchange(self, x: Any) -> list[Any]:
        self.meeting.held[self.rank] = x
        self.meeting.barrier.wait(60)
        held = list(self.meeting.held)
        self.meeting.barrier.wait(60)
        return held

    def step(self, *words: int) -> list[tuple[int, ...] | None]:
        """One round, as of a lockstep."""
        self.calls.append("step")
        return self._exchange(words)

    def share(self, mine: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """What each rank holds."""
        held = self._exchange(mine)
        assert [part.numel() for part in held] == list(counts)
        return held

    def finish(self, serve: Callable[[Any], None]) -> None:
        """Answer rounds until all ranks have finished."""
        said = self._exchange(None)
        while any(words is not None for words in said):
            serve(said)
            said = self._exchange(None)

    def all_reduce(self, x: Tensor) -> Tensor:
        self.calls.append("all_reduce")
        first, *others = self._exchange(x)
        return sum(others, start=first)

    def all_gather(self, x: Tensor) -> Sequence[Tensor]:
        self.calls.append("all_gather")
        return self._exchange(x)


def on_ranks(size: int, work: Callable[[Rank], Any]) -> list[Any]:
    """What ``work`` returns on each rank; the first error of any is raised."""
    meeting = Meeting(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(Rank(meeting, rank))
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    real = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
    if errors:
        raise (real or errors)[0]
    return results
