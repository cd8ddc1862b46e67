"""``release_inference_cache`` under DeepSpeed's ZeRO stages, on two gloo processes."""

from __future__ import annotations

import itertools
from functools import partial

import pytest

pytest.importorskip("deepspeed", reason="needs deepspeed: pip install 'hybrid_fx[deepspeed]'")
pytest.importorskip("peft", reason="needs peft: pip install 'hybrid_fx[peft]'")

import memory_checks as memory
from two_ranks import Ranks


@pytest.mark.deep
def test_nothing_of_inference_remains_under_any_stage(ranks: Ranks) -> None:
    cells = itertools.product((0, 1, 2, 3), (False, True, "chat"))
    ranks.run(
        *(partial(memory.nothing_of_inference_remains, stage=s, lora=lora) for s, lora in cells),
        partial(memory.kept_memory_is_seen, stage=0),
        partial(memory.kept_memory_is_seen, stage=3),
    )


@pytest.mark.deep
def test_stacks_that_share_the_weights_memory_change_nothing_under_any_stage(ranks: Ranks) -> None:
    cells = itertools.product((0, 1, 2, 3), (False, True))
    ranks.run(*(partial(memory.shared_stacks_change_nothing, stage=s, bf16=b) for s, b in cells))
