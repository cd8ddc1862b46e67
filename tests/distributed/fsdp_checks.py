"""What a rank does on a model that torch's FSDP or DDP holds, with an engine and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import prompt, tiny
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import hybrid_fx

CALL = prompt((4, 1, 7), 6) | {"max_new_tokens": 5}
SAMPLED = CALL | {"do_sample": True, "temperature": 1.5}
LABELED = {"input_ids": CALL["input_ids"], "labels": CALL["input_ids"]}


def _sharded(*, layers: bool) -> Any:
    model = tiny("llama")
    for layer in model.model.layers if layers else ():
        fully_shard(layer)
    return fully_shard(model)


def _flat(model: Any, *, layers: bool, original: bool) -> Any:
    policy = ModuleWrapPolicy({LlamaDecoderLayer}) if layers else None
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=policy,
        device_id=torch.device("cpu"),
        use_orig_params=original,
    )


def _summoned(rank: int, model: Any) -> list[Any]:
    # The layers gather their own at each forward.
    with FullyShardedDataParallel.summon_full_params(model, writeback=False, recurse=False):
        return _seeded(rank, model.generate)


def _step(model: Any, forward: Any) -> float:
    model.train()
    loss = forward(**LABELED).loss
    loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    return float(loss)


def _seeded(rank: int, generate: Any) -> list[Any]:
    torch.manual_seed(rank)
    found = [generate(**CALL).tolist(), generate(**SAMPLED).tolist()]
    return [*found, torch.get_rng_state().tolist()]


def fully_shard_generates_as_before(rank: int, *, layers: bool, verify: Any) -> None:
    """FSDP2 before hybridize: tokens, random state, training and weight version."""
    plain, model = _sharded(layers=layers), _sharded(layers=layers)
    with hybrid_fx.hybridize(model, verify_weights=verify) as engine:
        assert _seeded(rank, engine.generate) == _seeded(rank, plain.generate)
        (reason,) = engine.stats.fallbacks
        assert "the model is sharded by FSDP (fully_shard)" in reason
        assert any("sharded by FSDP" in note for note in engine.explain().notes)
        version = engine.weight_version
        assert _step(model, engine) == _step(plain, plain)
        assert engine.weight_version > version
        assert _seeded(rank, engine.generate) == _seeded(rank, plain.generate)
    assert model.generate(**CALL).tolist() == plain.generate(**CALL).tolist()


def fully_shard_after_hybridize_leaves_the_graphs(rank: int) -> None:
    """FSDP2 on a model that generated from graphs before."""
    model = tiny("llama")
    with hybrid_fx.hybridize(model) as engine:
        want = engine.generate(**CALL).tolist()
        assert not engine.stats.fallbacks
        fully_shard(model)
        for _ in range(2):  # the second call finds the root's parameters gathered
            assert engine.generate(**CALL).tolist() == want
        assert sum(engine.stats.fallbacks.values()) == 2


def flat_parameters_generate_while_summoned(rank: int, *, layers: bool, original: bool) -> None:
    """FSDP1 around a hybridized model: as transformers inside ``summon_full_params``."""
    plain = _flat(tiny("llama"), layers=layers, original=original)
    inner = tiny("llama")
    with hybrid_fx.hybridize(inner, verify_weights="checksum") as engine:
        model = _flat(inner, layers=layers, original=original)
        assert _summoned(rank, model) == _summoned(rank, plain)
        version = engine.weight_version
        assert _step(model, model) == _step(plain, plain)
        assert engine.weight_version > version
        assert _summoned(rank, model) == _summoned(rank, plain)
        (reason,) = engine.stats.fallbacks
        assert "is sharded by FullyShardedDataParallel, which generates in" in reason


def wrappers_name_what_they_hold(rank: int) -> None:
    """FSDP1 and DDP are refused by the object to pass."""
    for wrap in (
        lambda model: _flat(model, layers=False, original=True),
        DistributedDataParallel,
    ):
        model = wrap(tiny("llama"))
        with pytest.raises(hybrid_fx.InputError, match=r"pass what it holds, model\.module:"):
            hybrid_fx.hybridize(model)


def a_model_under_ddp_generates_from_graphs(rank: int) -> None:
    """``hybridize(ddp.module)``; training goes through the wrapper."""
    model = DistributedDataParallel(tiny("llama"))
    with hybrid_fx.hybridize(model.module) as engine:
        before = engine.generate(**CALL).tolist()
        version = engine.weight_version
        _step(model, model)
        assert engine.weight_version > version
        want = type(model.module).generate(model.module, **CALL).tolist()
        assert engine.generate(**CALL).tolist() == want != before
        assert not engine.stats.fallbacks
