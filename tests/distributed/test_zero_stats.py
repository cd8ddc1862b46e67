"""One line of statistics for all ranks, on two gloo processes."""

from __future__ import annotations

from functools import partial

import pytest

pytest.importorskip("deepspeed", reason="needs deepspeed: pip install 'hybrid_fx[deepspeed]'")
pytest.importorskip("peft", reason="needs peft: pip install 'hybrid_fx[peft]'")

import stats_checks as stats
from two_ranks import Ranks


def test_rank_0_logs_one_line_with_the_figures_of_all_ranks(ranks: Ranks) -> None:
    ranks.run(
        partial(stats.one_line_tells_of_all_ranks, stage=2),
        partial(stats.one_line_tells_of_all_ranks, stage=3),
        stats.a_rank_that_evaluates_alone_waits_for_none,
        stats.two_engines_keep_their_lines_apart,
    )
