"""Ranks that generate together (``inference_tp_size``), on two and four gloo processes."""

from __future__ import annotations

import functools
import itertools

import pytest

pytest.importorskip("deepspeed", reason="needs deepspeed: pip install 'hybrid_fx[deepspeed]'")
pytest.importorskip("peft", reason="needs peft: pip install 'hybrid_fx[peft]'")

import team_error_checks as errors
import team_row_checks as rows
import team_share_checks as shares
from teams import under
from two_ranks import Check, Ranks
from zero_checks import cell

#: Of two ranks that generate together.
TWO = {"enabled": True, "inference_tp_size": 2, "max_out_tokens": 32}


def at(check: Check, stage: int, **given: str) -> Check:
    """A check at a stage of ZeRO."""
    return functools.partial(check, stage=stage, **given)


def streamed(check: Check) -> Check:
    """A check of ranks whose layers gather their own weights."""
    return functools.partial(under, check=at(check, 3), pin_parameters=False)


def test_whole_weights_are_generated_from_together(ranks: Ranks) -> None:
    ranks.run(
        at(rows.any_prompts_generate_as_their_rows_alone, 0),
        at(rows.rows_end_when_they_end, 0),
        at(rows.samples_of_a_prompt_share_its_prefill_and_end_apart, 0),
        at(rows.samples_are_those_of_each_ranks_generator, 1),
        at(errors.other_options_in_a_team_are_refused_by_name, 0),
        at(errors.an_error_on_one_rank_is_one_of_its_team, 0),
        at(rows.ways_may_differ, 0),
        at(shares.a_rank_keeps_its_share_alone, 0),
        at(shares.a_units_groups_are_used_as_given, 0),
    )


def test_sharded_weights_are_generated_from_together(ranks: Ranks) -> None:
    ranks.run(
        cell(3, hybrid_engine=TWO),
        at(shares.adapters_run_on_every_side, 3),
        at(rows.a_rank_without_rows_takes_part, 3),
        at(errors.an_error_on_one_rank_is_one_of_its_team, 3),
        at(shares.a_rank_keeps_its_share_alone, 3),
        shares.no_rank_ever_holds_the_whole_model,
        streamed(rows.any_prompts_generate_as_their_rows_alone),
    )


@pytest.mark.deep
def test_the_rest_holds_in_teams_too(ranks: Ranks) -> None:
    ranks.run(
        at(rows.other_loops_run_over_joint_forwards, 0),
        at(rows.results_have_the_shape_that_transformers_gives, 2),
        at(rows.what_ranks_cannot_share_runs_the_module, 0),
        at(shares.heads_that_the_ranks_cannot_share_stay_whole, 0),
        at(errors.different_models_are_refused, 0),
        at(rows.any_prompts_generate_as_their_rows_alone, 3),
        at(rows.samples_are_those_of_each_ranks_generator, 3),
        at(errors.other_options_in_a_team_are_refused_by_name, 3),
        at(rows.ways_may_differ, 3),
        at(rows.what_ranks_cannot_share_runs_the_module, 3),
        at(rows.a_generate_inside_another_is_refused, 3),
        at(errors.what_is_not_captured_generates_all_the_same, 3),
        at(shares.a_units_groups_are_used_as_given, 3),
    )


@pytest.mark.deep
def test_every_kind_of_model_is_generated_from_together(ranks: Ranks) -> None:
    ranks.run(
        at(rows.kinds_of_models_generate_together, 0),
        at(rows.kinds_of_models_generate_together, 3),
        *(
            at(shares.adapters_run_on_every_side, stage, lora=lora)
            for stage, lora in itertools.product((0, 3), ("fold", "side", "auto"))
        ),
    )


@pytest.mark.deep
@pytest.mark.parametrize("size", [2, 4])
def test_four_ranks_in_one_team_or_two(ranks: Ranks, size: int) -> None:
    block = {**TWO, "inference_tp_size": size}
    checks = [
        at(rows.any_prompts_generate_as_their_rows_alone, 0),
        at(rows.a_rank_without_rows_takes_part, 3),
        at(rows.other_loops_run_over_joint_forwards, 3),
        at(rows.samples_are_those_of_each_ranks_generator, 2),
    ]
    sized = [functools.partial(under, check=c, inference_tp_size=size) for c in checks]
    ranks.run(*(cell(s, hybrid_engine=block) for s in (1, 3)), *sized, world=4)


@pytest.mark.deep
def test_one_team_does_not_wait_for_the_other(ranks: Ranks) -> None:
    ranks.run(
        at(errors.an_error_in_one_team, 0),
        at(errors.an_error_in_one_team, 3),
        streamed(errors.an_error_in_one_team),
        world=4,
    )


@pytest.mark.deep
def test_teams_gather_layer_by_layer_for_one_another(ranks: Ranks) -> None:
    checks = (
        rows.any_prompts_generate_as_their_rows_alone,
        rows.a_rank_without_rows_takes_part,
        rows.other_loops_run_over_joint_forwards,
        rows.rows_end_when_they_end,
        rows.ways_may_differ,
    )
    ranks.run(*map(streamed, checks), world=4)


@pytest.mark.deep
def test_a_rank_that_fails_within_a_forward_is_noticed(ranks: Ranks) -> None:
    ranks.run(errors.a_rank_that_fails_within_a_forward_is_noticed)
