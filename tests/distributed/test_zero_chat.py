"""LoRA in the form of DeepSpeed-Chat under every ZeRO stage, on two gloo processes."""

from __future__ import annotations

import itertools
from functools import partial

import pytest

pytest.importorskip("deepspeed", reason="needs deepspeed: pip install 'hybrid_fx[deepspeed]'")
pytest.importorskip("peft", reason="needs peft: pip install 'hybrid_fx[peft]'")

import chat_checks as chat
from two_ranks import Ranks
from zero_checks import cell


def test_layers_that_hold_their_factors_train_and_generate(ranks: Ranks) -> None:
    ranks.run(
        partial(chat.both_factors_are_trained_and_folded, stage=3),
        chat.a_state_that_one_rank_alone_changed_is_refused,
    )


@pytest.mark.deep
def test_they_do_under_every_stage(ranks: Ranks) -> None:
    ranks.run(
        partial(chat.both_factors_are_trained_and_folded, stage=0),
        partial(chat.every_state_of_the_layers_is_followed, stage=3),
        partial(chat.both_factors_are_trained_and_folded, stage=1),
        partial(chat.both_factors_are_trained_and_folded, stage=2),
        partial(chat.every_state_of_the_layers_is_followed, stage=2),
    )


@pytest.mark.deep
@pytest.mark.parametrize("world", [1, 2])
def test_every_stage_and_precision_with_layers_that_hold_their_factors(
    ranks: Ranks, world: int
) -> None:
    cells = itertools.product((0, 1, 2, 3), (False, True))
    ranks.run(*(cell(stage, lora="chat", bf16=bf16) for stage, bf16 in cells), world=world)


@pytest.mark.deep
def test_they_do_in_teams_and_layer_by_layer(ranks: Ranks) -> None:
    block = {"enabled": True, "max_out_tokens": 32}
    ranks.run(
        cell(0, lora="chat", hybrid_engine={**block, "inference_tp_size": 2}),
        cell(3, lora="chat", hybrid_engine={**block, "inference_tp_size": 2}),
        cell(3, lora="chat", hybrid_engine={**block, "pin_parameters": False}),
    )
