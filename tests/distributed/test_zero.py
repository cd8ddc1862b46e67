"""hybrid_fx.initialize under DeepSpeed's ZeRO stages, on two gloo processes."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="needs deepspeed: pip install 'hybrid_fx[deepspeed]'")
pytest.importorskip("peft", reason="needs peft: pip install 'hybrid_fx[peft]'")

import streamed_checks as streamed
import zero3_checks as sharded
import zero_checks as any_stage
from streamed_checks import UNPINNED
from two_ranks import Ranks
from zero_checks import cell


def test_whole_weights_generate_as_transformers_and_train_as_deepspeed(
    ranks: Ranks, tmp_path: Path
) -> None:
    ranks.run(
        functools.partial(any_stage.it_is_an_engine_of_both_kinds, stage=1),
        functools.partial(any_stage.an_engine_is_taken_over_and_given_back, stage=2),
        any_stage.without_the_block_it_is_deepspeed,
        functools.partial(any_stage.what_is_set_on_an_engine_is_the_models_or_deepspeeds, stage=2),
        functools.partial(any_stage.a_step_that_changes_nothing_prepares_nothing, stage=2),
        functools.partial(any_stage.a_skipped_step_prepares_nothing, stage=2),
        functools.partial(
            any_stage.a_loaded_checkpoint_is_generated_from, stage=2, folder=str(tmp_path)
        ),
    )


def test_sharded_weights_generate_as_transformers_and_train_as_deepspeed(
    ranks: Ranks, tmp_path: Path
) -> None:
    ranks.run(
        cell(3),
        cell(3, lora=True, bf16=True),
        functools.partial(any_stage.it_is_an_engine_of_both_kinds, stage=3),
        functools.partial(any_stage.an_engine_is_taken_over_and_given_back, stage=3),
        functools.partial(any_stage.a_step_that_changes_nothing_prepares_nothing, stage=3),
        functools.partial(any_stage.a_skipped_step_prepares_nothing, stage=3),
        functools.partial(
            any_stage.a_loaded_checkpoint_is_generated_from, stage=3, folder=str(tmp_path)
        ),
    )


def test_sharded_weights_are_gathered_beside_deepspeed(ranks: Ranks) -> None:
    ranks.run(
        sharded.it_really_shards_and_gathers_in_few_collectives,
        sharded.a_generate_leaves_deepspeed_as_it_was,
        sharded.eval_frees_what_stays_gathered,
        sharded.edits_of_gathered_parameters_are_followed,
        sharded.an_edit_that_one_rank_sees_is_followed_by_all,
        sharded.prepared_memory_is_used_again,
        sharded.recorded_steps_serve_each_weight_version,
        sharded.memory_is_given_back,
        sharded.tied_weights_are_gathered_once,
        sharded.lengths_may_differ,
        sharded.ranks_may_take_different_ways,
        sharded.a_call_that_one_rank_refuses_raises_on_all,
        sharded.an_error_on_one_rank_stops_all,
        sharded.a_model_built_in_shards_generates,
        sharded.different_models_are_refused,
        sharded.what_is_not_captured_generates_all_the_same,
    )


def test_layers_gather_their_own_weights(ranks: Ranks) -> None:
    ranks.run(
        cell(3, lora=True, **UNPINNED),
        streamed.gathers_are_under_way_while_layers_compute,
        streamed.ranks_may_do_different_amounts,
        streamed.an_error_between_two_steps_stops_all,
        streamed.an_error_inside_a_layer_stops_all,
        streamed.no_more_is_gathered_than_two_layers_and_what_stands_outside,
    )


@pytest.mark.deep
def test_layers_that_gather_do_what_pinned_ones_do(ranks: Ranks, tmp_path: Path) -> None:
    checks = (
        sharded.a_generate_leaves_deepspeed_as_it_was,
        sharded.ranks_may_take_different_ways,
        sharded.an_edit_that_one_rank_sees_is_followed_by_all,
        sharded.edits_of_gathered_parameters_are_followed,
        sharded.a_call_that_one_rank_refuses_raises_on_all,
        sharded.different_models_are_refused,
        sharded.what_is_not_captured_generates_all_the_same,
        sharded.a_model_built_in_shards_generates,
        sharded.lengths_may_differ,
    )
    ranks.run(
        functools.partial(
            streamed.other_families_generate_as_transformers, kinds=("qwen2", "gpt2", "opt")
        ),
        functools.partial(
            streamed.both_kinds_of_plan_are_kept_apart_and_proven_when_stored, folder=str(tmp_path)
        ),
        streamed.memory_is_given_back,
        streamed.a_wrong_plan_is_found_out,
        *(functools.partial(check, **UNPINNED) for check in checks),
    )


@pytest.mark.deep
def test_resident_memory_grows_by_two_layers(ranks: Ranks) -> None:
    ranks.stop()  # memory that other tests left free would hide what is taken
    ranks.run(streamed.resident_memory_grows_by_two_layers)


@pytest.mark.deep
def test_offloading_defaults_and_accumulation(ranks: Ranks) -> None:
    cpu = {"device": "cpu"}
    ranks.run(
        cell(3, zero={}),
        cell(3, lora=True, zero={}),
        cell(3, zero_force_ds_cpu_optimizer=False, zero={"offload_optimizer": cpu}),
        cell(
            3,
            zero_force_ds_cpu_optimizer=False,
            zero={"offload_optimizer": cpu, "offload_param": cpu},
        ),
        cell(3, lora=True, zero={}, **UNPINNED),
        cell(
            3,
            zero_force_ds_cpu_optimizer=False,
            zero={"offload_optimizer": cpu, "offload_param": cpu},
            **UNPINNED,
        ),
        cell(2, zero_force_ds_cpu_optimizer=False, zero={"offload_optimizer": cpu}),
    )
