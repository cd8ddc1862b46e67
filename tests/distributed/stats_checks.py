"""Claims about the statistics of several ranks, checked on every rank."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import Any

import torch
from engines import call, ds_config, make, start, train


class _Lines(logging.Handler):
    """The lines of this process that tell of an iteration."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("iteration"):
            self.found.append(record.getMessage())


def _said(run: Callable[[], Any]) -> list[str]:
    """The lines that are logged while ``run`` runs."""
    lines, logger = _Lines(), logging.getLogger("hybrid_fx")
    level = logger.level
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    try:
        run()
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)
    return lines.found


def one_line_tells_of_all_ranks(rank: int, stage: int) -> None:
    engine = start(ds_config(stage), make(False))
    times = 1 if stage == 3 else 1 + rank  # under ZeRO-3 all generate equally often

    def run() -> None:
        for seed in range(2):
            engine.eval()
            for _ in range(times):
                time.sleep(0.05 * rank)
                engine.generate(**call(rank))
            train(engine, rank, seed)
        engine.eval()
        torch.distributed.barrier()
        engine.generate(**call(rank))

    lines = _said(run)
    assert [one.index for one in engine.stats.iterations] == [0, 1], "each rank has its own"
    assert [one.samples for one in engine.stats.iterations] == [2 * times, 2 * times]
    assert len(lines) == (0 if rank else 2), lines
    for index, line in enumerate(lines):
        assert line.startswith(f"iteration {index} | 2 of 2 ranks |")
        assert f"| {6 if stage < 3 else 4} samples," in line
        (share,) = re.findall(r"gather share of generating ([\d.]+) %", line)
        assert (float(share) > 0) == (stage == 3)


def a_rank_that_evaluates_alone_waits_for_none(rank: int) -> None:
    engine = start(ds_config(2), make(False))

    def run() -> None:
        for seed in range(3):
            train(engine, rank, seed)
            if rank == 0:
                engine.eval()
                engine.generate(**call(rank))
        torch.distributed.barrier()
        engine.close()

    lines = _said(run)
    assert len(lines) == (0 if rank else 3), lines
    assert all("| 1 of 2 ranks |" in line for line in lines)


def two_engines_keep_their_lines_apart(rank: int) -> None:
    engines = [start(ds_config(0), make(False)) for _ in range(2)]

    def run() -> None:
        for _ in range(2):
            for number, engine in enumerate(engines):
                engine.eval()
                for _ in range(1 + number):
                    engine.generate(**call(rank))
        torch.distributed.barrier()
        for engine in engines:
            engine._look_at_board()

    lines = _said(run)  # a line comes when its last rank is there, whichever engine that is
    samples = sorted(re.findall(r"(\d+) samples", line)[0] for line in lines)
    assert samples == ([] if rank else ["4", "8"])
