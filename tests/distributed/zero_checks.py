"""Claims about one engine, checked on every rank; the stage, precision and adapters are given."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from engines import call, ds_config, hf_tokens, make, plain, start, train, weights
from torch import Tensor
from two_ranks import Check

import hybrid_fx
from hybrid_fx.capture import plain_linear

CYCLES = 2


def _never_generated(
    config: dict[str, Any], rank: int, lora: bool | str
) -> tuple[list[Tensor], Any]:
    import deepspeed

    config = {**config, "hybrid_engine": {"enabled": False}}
    engine = deepspeed.initialize(model=make(lora), config=config)[0]
    losses = [train(engine, rank, seed) for seed in range(CYCLES)]
    return losses, weights(engine)


def is_hf(engine: Any, rank: int, lora: bool | str, bf16: bool) -> None:
    """What the engine generates is what transformers does; in bfloat16, its logits are as near."""
    given = call(rank)
    if not bf16:
        expected = hf_tokens(weights(engine), lora, given)
        assert torch.equal(engine.generate(**given), expected)
        assert torch.equal(engine.module.generate(**given), expected)
        return
    _close_in_bf16(engine, lora, given)


def _close_in_bf16(engine: Any, lora: bool | str, given: dict[str, Any]) -> None:
    """No further from float32 than 1.5 times what transformers in bf16 is."""
    options = {"return_dict_in_generate": True, "output_logits": True}
    out = engine.generate(**given, **options)
    got = torch.stack(out.logits, 1).float()
    held = weights(engine)
    ids = out.sequences[:, :-1]
    mask = torch.cat([given["attention_mask"], torch.ones_like(ids)], 1)[:, : ids.shape[1]]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad(), plain_linear():
        wide = plain({n: t.float() for n, t in held.items()}, lora)(**inputs).logits
        narrow = plain(held, lora)(**inputs).logits.float()
    wide, narrow = wide[:, -got.shape[1] :], narrow[:, -got.shape[1] :]
    assert (got - wide).norm() <= 1.5 * (narrow - wide).norm()


def cycles(rank: int, *, stage: int, lora: bool | str, bf16: bool, changes: Any = None) -> None:
    """Tokens are those of transformers in each cycle, and training that of DeepSpeed alone."""
    config = ds_config(stage, bf16=bf16, **(changes or {}))
    expected, trained = _never_generated(config, rank, lora)
    engine = start(config, make(lora))
    losses = []
    for seed in range(CYCLES):
        engine.eval()
        is_hf(engine, rank, lora, bf16)
        losses.append(train(engine, rank, seed))
    is_hf(engine, rank, lora, bf16)
    assert all(map(torch.equal, losses, expected))
    for name, tensor in weights(engine).items():
        assert torch.equal(tensor, trained[name]), name
    assert engine.stats.counters["prepares"] == CYCLES + 1
    assert not engine.stats.fallbacks
    told = engine.explain()
    assert told.matched == told.total == 2
    assert not any("hook" in note for note in told.notes)


def cell(stage: int, *, lora: bool | str = False, bf16: bool = False, **changes: Any) -> Check:
    """The check :func:`cycles` of one combination."""
    return functools.partial(cycles, stage=stage, lora=lora, bf16=bf16, changes=changes)


def it_is_an_engine_of_both_kinds(rank: int, stage: int) -> None:
    import deepspeed

    engine = start(ds_config(stage), make(False))
    assert isinstance(engine, deepspeed.DeepSpeedEngine)
    assert isinstance(engine, hybrid_fx.HybridEngine)
    assert engine._config.hybrid_engine.enabled
    assert engine.options.max_out_tokens == 32
    assert engine.fuse_lora_weight() is engine.unfuse_lora_weight() is None
    assert hybrid_fx.hybridize(engine) is engine
    given = call(rank, max_length=11, synced_gpus=True)
    del given["max_new_tokens"]
    assert torch.equal(engine.generate(**given), engine.generate(**call(rank)))


def an_engine_is_taken_over_and_given_back(rank: int, stage: int) -> None:
    import deepspeed

    engine = deepspeed.initialize(model=make(False), config=ds_config(stage, hybrid=False))[0]
    before = set(vars(engine))
    hybrid = hybrid_fx.hybridize(engine, strict=True)
    assert hybrid is engine
    expected = hf_tokens(weights(engine), False, call(rank))
    assert torch.equal(engine.generate(**call(rank)), expected)
    engine.close()
    assert type(engine) is deepspeed.DeepSpeedEngine
    assert set(vars(engine)) == before
    assert "generate" not in vars(engine.module)


def without_the_block_it_is_deepspeed(rank: int) -> None:
    import deepspeed

    model = make(False)
    given = ds_config(1, hybrid=False)
    data = [torch.zeros(1) for _ in range(8)]
    engine, optimizer, loader, scheduler = hybrid_fx.initialize(
        model=model, config=given, training_data=data
    )
    assert type(engine) is deepspeed.DeepSpeedEngine
    assert optimizer is engine.optimizer
    assert loader is engine.training_dataloader is not None
    assert scheduler is engine.lr_scheduler is None
    assert "generate" not in vars(model)


def a_step_that_changes_nothing_prepares_nothing(rank: int, stage: int) -> None:
    changes = {"gradient_accumulation_steps": 2}
    engine = start(ds_config(stage, **changes), make(False))
    engine.generate(**call(rank))
    version = engine.weight_version
    train(engine, rank)
    engine.generate(**call(rank))
    assert (engine.weight_version, engine.stats.counters["prepares"]) == (version, 1)
    train(engine, rank)
    expected = hf_tokens(weights(engine), False, call(rank))
    assert torch.equal(engine.generate(**call(rank)), expected)
    assert engine.weight_version == version + 1
    assert engine.stats.counters["prepares"] == 2


def a_skipped_step_prepares_nothing(rank: int, stage: int) -> None:
    config = ds_config(stage) | {"bf16": {"enabled": True, "check_grad_overflow": True}}
    engine = start(config, make(False))
    engine.generate(**call(rank))
    version = engine.weight_version
    engine.train()
    ids = call(rank)["input_ids"]
    engine.backward(engine(input_ids=ids, labels=ids).loss * float("inf"))
    engine.step()
    assert not engine.was_step_applied()
    engine.generate(**call(rank))
    assert (engine.weight_version, engine.stats.counters["prepares"]) == (version, 1)


def what_is_set_on_an_engine_is_the_models_or_deepspeeds(rank: int, stage: int) -> None:
    from transformers import GenerationConfig

    engine = start(ds_config(stage), make(False))
    given = call(rank)
    assert engine.generate(**given).shape[1] > 7
    del given["max_new_tokens"]
    engine.generation_config = GenerationConfig(max_new_tokens=2, eos_token_id=None)
    assert engine.module.generation_config is engine.generation_config
    assert engine.generate(**given).shape[1] == 7
    engine.is_mine = engine.config  # as on every DeepSpeedEngine
    assert "is_mine" in vars(engine)
    assert not hasattr(engine.module, "is_mine")
    del engine.is_mine
    engine.training_dataloader = None
    assert "training_dataloader" not in vars(engine.module)
    for name in ("generate", "stats", "options", "weight_version"):
        with pytest.raises(AttributeError, match=f"{name} is the engine's own"):
            setattr(engine, name, None)
    train(engine, rank)
    assert engine.generate(**given).shape[1] == 7
    engine.close()
    engine.generation_config = None  # DeepSpeed's way
    assert engine.module.generation_config.max_new_tokens == 2


def a_loaded_checkpoint_is_generated_from(rank: int, stage: int, folder: str) -> None:
    engine = start(ds_config(stage), make(False))
    first = engine.generate(**call(rank))
    engine.save_checkpoint(f"{folder}/{stage}")
    for seed in range(3):
        train(engine, rank, seed)
    assert not torch.equal(engine.generate(**call(rank)), first)
    engine.load_checkpoint(f"{folder}/{stage}")
    assert torch.equal(engine.generate(**call(rank)), first)
