"""Whose random numbers ranks draw: ``sync_rng``."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from tiny_models import tiny

import hybrid_fx
from hybrid_fx.distributed.random_states import CHOICES, ranks_alike
from hybrid_fx.errors import ConfigError

pytest.importorskip("deepspeed", reason="needs deepspeed: pip install 'hybrid_fx[deepspeed]'")

import random_checks as checks
from two_ranks import Ranks


def test_data_parallel_ranks_sample_apart_unless_a_shared_state_is_asked_for(ranks: Ranks) -> None:
    ranks.run(
        functools.partial(checks.data_parallel_ranks_keep_their_states, stage=0),
        functools.partial(checks.all_ranks_share_a_state_where_it_is_asked_for, stage=0),
        functools.partial(checks.ranks_of_a_team_share_a_state_or_keep_their_own, stage=0),
        checks.another_choice_needs_another_engine,
    )


@pytest.mark.deep
def test_the_same_holds_where_weights_are_sharded(ranks: Ranks) -> None:
    ranks.run(
        functools.partial(checks.data_parallel_ranks_keep_their_states, stage=3),
        functools.partial(checks.all_ranks_share_a_state_where_it_is_asked_for, stage=3),
        functools.partial(checks.ranks_of_a_team_share_a_state_or_keep_their_own, stage=3),
    )


@pytest.mark.deep
def test_teams_keep_apart_from_one_another(ranks: Ranks) -> None:
    ranks.run(checks.a_team_shares_no_state_with_another, world=4)


@pytest.mark.parametrize("value", ["rank", True, None])
def test_another_choice_is_refused_with_the_known_ones(value: Any) -> None:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "hybrid_engine": {"enabled": True},
        "hybrid_fx": {"sync_rng": value},
    }
    with pytest.raises(ConfigError, match=r"sync_rng=.*all, group, none"):
        hybrid_fx.initialize(model=tiny("llama"), config=config)


@pytest.mark.parametrize("given", [{"sync_rng": "all"}, {"config": {"sync_rng": "none"}}])
def test_a_model_in_one_process_refuses_the_choice_by_name(given: Any) -> None:
    model = tiny("llama")
    with pytest.raises(ConfigError, match="sync_rng is an option of DeepSpeed engines"):
        hybrid_fx.hybridize(model, **given)
    assert "generate" not in vars(model)


def test_ranks_of_one_job_are_alike_by_team_or_all_of_them_or_none() -> None:
    found = {
        (choice, world, team): ranks_alike(choice, world, team)
        for choice in CHOICES
        for world, team in ((1, 1), (4, 1), (4, 2))
    }
    shared = {case for case, who in found.items() if who}
    assert shared == {("all", 4, 1), ("all", 4, 2), ("group", 4, 2)}
    assert "the 2 ranks of each team" in found["group", 4, 2]
