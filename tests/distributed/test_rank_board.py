"""The line over ranks, on boards of several ranks in one process."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import Any

import pytest
from torch.distributed import HashStore

from hybrid_fx.distributed.rank_board import RankBoard, at_exit
from hybrid_fx.distributed.ranks_iteration import RanksIteration
from hybrid_fx.engine.iteration import Iteration


def record(index: int = 0, *, seconds: float = 10.0, **changes: Any) -> Iteration:
    spent = {"gather": 1.0, "prepare": 1.0, "generate": 0.0, "prefill": 1.0, "decode": 2.0}
    given = {
        "e2e_seconds": seconds,
        "seconds": {**spent, "train": 2.0},
        "tokens": {"prefill": 20, "decode": 40},
        "samples": 4,
        "average_samples_per_second": 0.5,
        "kv_bytes": 2048,
    }
    return Iteration(index=index, **{**given, **changes})


class NeverWaits:
    """A store that refuses to be asked for what is not there: that would wait."""

    def __init__(self) -> None:
        self._held = HashStore()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._held, name)

    def get(self, key: str) -> bytes:
        assert self._held.check([key]), f"{key} would be waited for"
        found: bytes = self._held.get(key)
        return found


class Ranks:
    """Boards of two ranks, and the lines that each of them logged."""

    def __init__(self, store: Any = None) -> None:
        self.steps = 0
        self.lines: tuple[list[Any], list[Any]] = ([], [])
        self.store = store or NeverWaits()
        self.boards = [
            RankBoard(
                self.store,
                rank=rank,
                ranks=2,
                name="engine",
                steps=lambda: self.steps,
                log=self.lines[rank].append,
            )
            for rank in (0, 1)
        ]

    def ends(self, rank: int, **changes: Any) -> None:
        self.boards[rank].close(record(**changes))

    @property
    def counts(self) -> list[list[int]]:
        """The samples of each record in each line of rank 0; rank 1 must have logged none."""
        assert not self.lines[1]
        return [[one.samples for one in line.records] for line in self.lines[0]]


@pytest.mark.parametrize("first", [0, 1])
def test_rank_0_logs_one_line_when_all_have_ended(first: int) -> None:
    ranks = Ranks()
    ranks.ends(first, samples=3 + first)
    ranks.boards[first].look()
    assert ranks.counts == []
    ranks.ends(1 - first, samples=4 - first)
    for board in ranks.boards:
        board.look()
        board.look()
    assert ranks.counts == [[3, 4]]


def test_a_rank_that_never_ends_an_iteration_is_left_out_and_waited_for_by_none() -> None:
    ranks = Ranks()
    for step in range(3):
        ranks.steps = step
        ranks.ends(0, index=step)
    assert ranks.counts == [[4], [4]]
    assert "1 of 2 ranks" in str(ranks.lines[0][0])
    ranks.boards[0].flush()
    assert [line.records[0].index for line in ranks.lines[0]] == [0, 1, 2]


def test_an_iteration_that_one_rank_alone_has_moves_no_other() -> None:
    ranks = Ranks()
    for step in range(3):
        ranks.steps = step
        ranks.ends(0, index=2 * step, samples=3)
        ranks.ends(1, index=step, samples=5)
        ranks.ends(0, index=2 * step + 1, samples=1)  # rank 0 generates some samples to look at
    ranks.boards[0].flush()
    assert ranks.counts == [[3, 5], [1]] * 3


def test_a_record_that_comes_too_late_is_dropped() -> None:
    ranks = Ranks()
    ranks.ends(0, samples=1)
    ranks.steps = 1
    ranks.ends(0, samples=2)
    ranks.boards[1]._steps = lambda: 0
    ranks.ends(1, samples=7)
    ranks.boards[1]._steps = lambda: 1
    ranks.ends(1, samples=8)
    ranks.boards[0].look()
    assert ranks.counts == [[1], [2, 8]]
    assert not ranks.store.check(["engine/0/0/1"])
    assert not ranks.store.check(["engine/1/0/1"])


def test_a_store_that_is_gone_leaves_the_line_of_rank_0() -> None:
    class Gone:
        def __getattr__(self, name: str) -> Any:
            def fail(*args: Any) -> Any:
                raise RuntimeError("Broken pipe")

            return fail

    ranks = Ranks(Gone())
    ranks.ends(1)
    ranks.ends(0)
    ranks.boards[0].flush()
    assert ranks.counts == [[4]]


def test_a_board_without_a_line_has_nothing_to_flush() -> None:
    ranks = Ranks()
    for board in ranks.boards:
        board.look()
        board.flush()
    assert ranks.counts == []


def test_the_line_has_means_maxima_sums_and_the_share_of_gathering() -> None:
    spent = {"gather": 3.0, "prepare": 1.0, "prefill": 1.0, "decode": 4.0, "train": 4.0}
    odd = {"kv_bytes": 4096, "fallbacks": {"num_beams=4": 1}}
    slow = record(seconds=14.0, samples=2, **odd)
    slow = dataclasses.replace(slow, seconds=spent)
    line = RanksIteration(ranks=2, records=(record(), slow))
    assert line.samples == 6
    assert line.gather_share == 4 / 14
    assert line.seconds["train"] == (3.0, 4.0)
    assert line.tokens("decode") == (80, 20.0)
    assert str(line) == (
        "iteration 0 | 2 of 2 ranks | E2E 12.000 s (most 14.000 s) | "
        "gather 2.000 s (16.7 %, most 3.000 s) | prepare 1.000 s (8.3 %, most 1.000 s) | "
        "generate 4.000 s (33.3 %, most 5.000 s) | train 3.000 s (25.0 %, most 4.000 s) | "
        "others 2.000 s (16.7 %, most 3.000 s) | gather share of generating 28.6 % | "
        "6 samples, 0.43/s (average 1.00/s) | prefill 40 tokens, 40.0/s | "
        "decode 80 tokens, 20.0/s | KV 4.0 KiB | fallbacks: num_beams=4 x1"
    )


def test_the_open_line_is_logged_at_exit_unless_the_board_is_gone() -> None:
    ranks = Ranks()
    ranks.ends(0)
    held = weakref.ref(ranks.boards[0])
    at_exit(held)
    assert ranks.counts == [[4]]
    ranks.boards.clear()
    gc.collect()
    assert held() is None
    at_exit(held)
