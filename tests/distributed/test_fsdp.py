"""Models that torch's FSDP shards generate as transformers does, on two gloo processes."""

from __future__ import annotations

import itertools
from functools import partial

import pytest

pytest.importorskip("deepspeed", reason="needs deepspeed: pip install 'hybrid_fx[deepspeed]'")

import fsdp_checks as fsdp
from two_ranks import Ranks


def test_a_fully_sharded_model_generates_as_transformers_does(ranks: Ranks) -> None:
    ranks.run(
        partial(fsdp.fully_shard_generates_as_before, layers=True, verify="off"),
        partial(fsdp.fully_shard_generates_as_before, layers=False, verify="checksum"),
        fsdp.fully_shard_after_hybridize_leaves_the_graphs,
    )


def test_a_model_of_flat_parameters_generates_where_transformers_does(ranks: Ranks) -> None:
    cells = itertools.product((False, True), (False, True))
    ranks.run(
        *(
            partial(fsdp.flat_parameters_generate_while_summoned, layers=a, original=b)
            for a, b in cells
        )
    )


def test_wrappers_over_ranks_name_the_model_to_pass(ranks: Ranks) -> None:
    ranks.run(fsdp.wrappers_name_what_they_hold, fsdp.a_model_under_ddp_generates_from_graphs)
