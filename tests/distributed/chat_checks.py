"""Claims about LoRA layers that hold their factors themselves, checked on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from chat_lora import chat_layers
from engines import call, ds_config, make, plain, start, train, weights
from torch import Tensor

from hybrid_fx.capture import plain_linear


def _tokens(held: Mapping[str, Tensor], model: Any, given: Mapping[str, Any]) -> Tensor:
    """What transformers generates on the weights ``held``, with the state of ``model``'s layers."""
    reference = plain(held, "chat")
    states = chat_layers(model)
    for path, layer in chat_layers(reference).items():
        layer.lora_scaling, layer.fuse_lora = states[path].lora_scaling, states[path].fuse_lora
    with plain_linear():
        found: Tensor = reference.generate(**given)
    return found


def both_factors_are_trained_and_folded(rank: int, stage: int) -> None:
    engine = start(ds_config(stage), make("chat"))
    before = weights(engine)
    assert torch.equal(engine.generate(**call(rank)), _tokens(before, engine.module, call(rank)))
    for seed in range(2):
        train(engine, rank, seed)
    after = weights(engine)
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in after if "lora_" in name}
    assert torch.equal(engine.generate(**call(rank)), _tokens(after, engine.module, call(rank)))
    report = engine.explain()
    assert {decision.choice for decision in report.lora} == {"fold"}
    assert len(report.lora) == 7
    assert engine.stats.counters["prepares"] == 2
    assert not engine.stats.fallbacks


def _whole(engine: Any) -> AbstractContextManager[None]:
    """All parameters whole and to be edited, by DeepSpeed's own means."""
    import deepspeed

    parameters = list(engine.module.parameters())
    found: Any = deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
    return found


def every_state_of_the_layers_is_followed(rank: int, stage: int) -> None:
    engine = start(ds_config(stage), make("chat"))
    seen = [engine.generate(**call(rank))]
    layers = chat_layers(engine.module).values()

    def follows() -> None:
        expected = _tokens(weights(engine), engine.module, call(rank))
        seen.append(engine.generate(**call(rank)))
        assert torch.equal(seen[-1], expected)
        assert engine.stats.counters["prepares"] == len(seen)

    for layer in layers:
        layer.lora_scaling = 20.0
    follows()
    assert not torch.equal(seen[0], seen[1])
    engine.fuse_lora_weight()  # does nothing: the layers are not fused, and nothing is prepared
    assert torch.equal(engine.generate(**call(rank)), seen[1])
    assert not any(layer.fuse_lora for layer in layers)
    with torch.no_grad(), _whole(engine):
        for layer in layers:
            layer.fuse_lora_weight()
    follows()
    assert engine.explain().lora == ()
    with torch.no_grad(), _whole(engine):
        for layer in layers:
            layer.unfuse_lora_weight()
    follows()
    train(engine, rank)
    follows()


def a_state_that_one_rank_alone_changed_is_refused(rank: int) -> None:
    import pytest

    from hybrid_fx.errors import RankError

    engine = start(ds_config(3), make("chat"))
    if rank:
        next(iter(chat_layers(engine.module).values())).lora_scaling = 0.5
    with pytest.raises(RankError, match="models differ"):
        engine.generate(**call(rank))
