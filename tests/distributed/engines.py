"""Engines of tiny models for the checks, references for them, and what they are compared by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from chat_lora import chat_adapted
from tiny_models import adapted, prompt, tiny
from torch import Tensor

import hybrid_fx
from hybrid_fx.capture import plain_linear

#: Without these a tiny model stays whole on every rank: ZeRO-3 shards nothing.
REALLY_SHARDS = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


def ds_config(
    stage: int, *, bf16: bool = False, hybrid: bool = True, zero: Any = None, **changes: Any
) -> dict[str, Any]:
    """A DeepSpeed config of this stage; ``zero`` are further fields of ``zero_optimization``."""
    sharding = REALLY_SHARDS if stage == 3 and zero is None else {}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, **sharding, **(zero or {})},
        "bf16": {"enabled": bf16},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "hybrid_engine": {"enabled": hybrid, "max_out_tokens": 32},
        **changes,
    }


def make(lora: bool | str, dtype: torch.dtype = torch.float32, kind: str = "llama") -> Any:
    """A tiny model; the same weights at each call, on each rank. ``lora``: PEFT's, or "chat"."""
    model = tiny(kind, dtype=dtype)
    if lora == "chat":
        return chat_adapted(model, dropout=0.0)
    return adapted(model, autocast_adapter_dtype=False, lora_dropout=0.0) if lora else model


def start(config: Mapping[str, Any], model: Any, **arguments: Any) -> Any:
    """The engine of ``hybrid_fx.initialize``."""
    return hybrid_fx.initialize(model=model, config=dict(config), **arguments)[0]


def call(rank: int, **changes: Any) -> dict[str, Any]:
    """Arguments of a greedy generate; prompts differ from rank to rank."""
    return {**prompt([5, 3], seed=rank), "max_new_tokens": 6, "do_sample": False, **changes}


def train(engine: Any, rank: int, seed: int = 0) -> Tensor:
    """One forward, backward and step; the loss."""
    engine.train()
    ids = prompt([8, 8], seed=10 * seed + rank)["input_ids"]
    loss: Tensor = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    return loss.detach()


def weights(engine: Any) -> dict[str, Tensor]:
    """Copies of all parameters, made whole by DeepSpeed's own means; buffers too."""
    import deepspeed

    model = engine.module
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        found = dict(model.named_parameters()) | dict(model.named_buffers())
        return {name: tensor.detach().clone() for name, tensor in found.items()}


def plain(held: Mapping[str, Tensor], lora: bool | str, kind: str = "llama") -> Any:
    """A model of transformers alone, in the precision of the weights ``held``, on these."""
    dtype = next(iter(held.values())).dtype
    model = make(lora, dtype, kind)
    missing, unexpected = model.load_state_dict(held, strict=False)
    assert not [name for name in missing if "lm_head" not in name]
    assert not [name for name in unexpected if "inv_freq" not in name]
    return model.eval()


def hf_tokens(held: Mapping[str, Tensor], lora: bool | str, given: Mapping[str, Any]) -> Tensor:
    """What transformers generates on the weights ``held``."""
    with plain_linear():
        found: Tensor = plain(held, lora).generate(**given)
    return found


@contextmanager
def no_room(engine: Any) -> Iterator[None]:
    """Memory runs out in the middle of a prepare."""
    prepared = engine._graphs.runner.prepared
    store, store_packed = prepared.store, prepared.store_packed

    def full(index: int, *values: Tensor) -> None:
        if index == 7:
            raise MemoryError("no room")
        (store if len(values) == 1 and not wanted[index].packed else store_packed)(index, *values)

    wanted = engine._graphs.runner.plan.manifest.prepared
    prepared.store = prepared.store_packed = full
    try:
        yield
    finally:
        del prepared.store, prepared.store_packed
