"""Checkpoints under DeepSpeed's ZeRO stages, on two gloo processes and on one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="needs deepspeed: pip install 'hybrid_fx[deepspeed]'")
pytest.importorskip("peft", reason="needs peft: pip install 'hybrid_fx[peft]'")

import checkpoint_checks as checks
from two_ranks import Ranks

#: From stage, to stage, whether the module's weights alone: what DeepSpeed 0.19 loads.
LOADED = (
    (0, 1, True),
    (1, 0, True),
    (1, 2, False),
    (2, 1, False),
    (2, 1, True),
    (0, 2, True),
    (2, 0, True),
)
#: What it refuses: optimizer states that are not there, shards for whole weights.
REFUSED = ((0, 1, False), (1, 0, False), (2, 3, True), (3, 2, True))


def test_nothing_of_inference_is_saved_and_a_load_is_followed(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(
        partial(
            checks.nothing_of_inference_is_saved, stage=2, lora="chat", folder=tmp_path / "saved2"
        ),
        partial(
            checks.nothing_of_inference_is_saved, stage=3, lora=False, folder=tmp_path / "saved3"
        ),
        partial(checks.a_checkpoint_is_loaded_in_any_mode, stage=3, folder=tmp_path / "3"),
    )


@pytest.mark.deep
def test_checkpoints_go_to_other_stages_and_to_one_rank(ranks: Ranks, tmp_path: Path) -> None:
    written = [partial(checks.write, stage=stage, folder=tmp_path) for stage in (1, 2, 3)]
    loaded = partial(checks.it_is_loaded_elsewhere, folder=tmp_path)
    refused = partial(
        checks.a_load_that_deepspeed_refuses_leaves_an_engine_that_generates, folder=tmp_path
    )
    together = partial(checks.weights_put_together_from_shards_are_generated_from, folder=tmp_path)
    ranks.run(
        *written,
        partial(loaded, source=1, target=2),
        partial(loaded, source=2, target=1),
        partial(loaded, source=1, target=0, load_module_only=True),
        partial(refused, source=2, target=3, load_module_only=True),
        partial(refused, source=1, target=0),
        partial(together, source=3, target=3),
        partial(together, source=2, target=3),
        partial(together, source=3, target=2),
    )
    ranks.run(
        partial(loaded, source=2, target=2, load_module_only=True),
        partial(refused, source=2, target=2),
        partial(refused, source=3, target=3),
        partial(together, source=3, target=3),
        world=1,
    )


@pytest.mark.deep
def test_every_mode_of_every_stage(ranks: Ranks, tmp_path: Path) -> None:
    saved = checks.nothing_of_inference_is_saved
    loaded = checks.a_checkpoint_is_loaded_in_any_mode
    ranks.run(
        *(
            partial(saved, stage=stage, lora=lora, folder=tmp_path / f"{stage}{lora}")
            for stage in range(4)
            for lora in (False, True, "chat")
        ),
        *(
            partial(loaded, stage=stage, bf16=bf16, folder=tmp_path / f"load{stage}{bf16}")
            for stage in range(4)
            for bf16 in (False, True)
        ),
    )


@pytest.mark.deep
@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_every_pair_of_stages(ranks: Ranks, tmp_path: Path, before: int, after: int) -> None:
    ranks.run(*(partial(checks.write, stage=s, folder=tmp_path) for s in range(4)), world=before)
    loaded = partial(checks.it_is_loaded_elsewhere, folder=tmp_path)
    refused = partial(
        checks.a_load_that_deepspeed_refuses_leaves_an_engine_that_generates, folder=tmp_path
    )
    ranks.run(
        *(
            partial(
                loaded if alone or before == after else refused,
                source=source,
                target=target,
                load_module_only=alone,
            )
            for source, target, alone in LOADED
        ),
        *(
            partial(refused, source=source, target=target, load_module_only=alone)
            for source, target, alone in REFUSED
        ),
        world=after,
    )
