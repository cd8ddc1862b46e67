"""Claims about what each rank of a team holds, checked on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from engines import call, hf_tokens, make, start, train, weights
from memory_ledger import address
from teams import same, started, team_config
from tiny_models import adapted, tiny


def heads_that_the_ranks_cannot_share_stay_whole(rank: int, stage: int) -> None:
    fields = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3}
    engine = started(stage, tiny("llama", **fields))
    held = weights(engine)
    reference = tiny("llama", **fields)
    reference.load_state_dict(held, strict=False)
    same(engine, call(rank), reference)
    said = "attention is whole on each of them in model.layers.0, model.layers.1"
    assert said in str(engine.explain().notes)


def adapters_run_on_every_side(rank: int, stage: int, lora: str = "auto") -> None:
    config = {**team_config(stage), "hybrid_fx": {"lora": lora}}
    model = make(True)
    with torch.no_grad():  # auto folds most places, and keeps these on the side: they are tiny
        for name, parameter in model.named_parameters():
            if "lora_B" in name and "o_proj" in name:
                parameter.mul_(1e-7)
    engine = start(config, model)
    for seed in range(2):
        expected = hf_tokens(weights(engine), True, call(rank))
        assert torch.equal(engine.generate(**call(rank)), expected)
        choices = {decision.choice for decision in engine.explain().lora}
        if lora == "auto" and not seed:
            assert choices == {"fold", "side"}
        train(engine, rank, seed)
    assert not engine.stats.fallbacks


def a_rank_keeps_its_share_alone(rank: int, stage: int) -> None:
    """Beside whole weights it keeps what was stacked; of sharded ones, its share of each layer."""
    engine = started(stage)
    engine.generate(**call(rank))
    runner = engine._graphs.runner
    of_layers = [p for p in runner.plan.manifest.prepared if ".layers." in p.name]
    total = sum(torch.Size(p.shape).numel() for p in of_layers if len(p.shape) == 2)
    matrices = sum(
        t.numel() for n, t in make(False).named_parameters() if ".layers." in n and t.dim() == 2
    )
    assert total * 2 == matrices
    before = runner.prepared.nbytes
    addresses = [address(t) for t in runner.prepared.tensors]
    train(engine, rank)
    engine.generate(**call(rank))
    assert runner.prepared.nbytes == before
    assert [address(t) for t in runner.prepared.tensors] == addresses
    assert runner.workspace.keys[0].shape[1] == 1


def no_rank_ever_holds_the_whole_model(rank: int) -> None:
    """The proof at first use, LoRA's choice and each prepare gather a few layers at a time."""
    from torch.multiprocessing.reductions import StorageWeakRef

    from hybrid_fx.distributed import shards

    model = adapted(tiny("llama", layers=5))
    layer = sum(p.numel() for n, p in model.named_parameters() if "layers.0." in n) * 4
    rest = sum(p.numel() for n, p in model.named_parameters() if "layers" not in n) * 4
    engine = start(team_config(3, tp_gather_partition_size=1), model)
    plain_gather, live, peaks = shards.gather, [], []

    def noted(*given: Any) -> Any:
        made = plain_gather(*given)
        live.extend(
            (StorageWeakRef(t.untyped_storage()), t.untyped_storage().nbytes()) for t in made
        )
        live[:] = [entry for entry in live if not entry[0].expired()]
        peaks.append(sum(size for _, size in live))
        return made

    shards.gather = noted
    try:
        for seed in range(2):
            engine.generate(**call(rank))
            peak = max(peaks)
            # A layer and what stands outside of all, with what is kept of it from before.
            assert peak <= 1.1 * (layer + 2 * rest), (peak, layer, rest)
            assert peak < 0.5 * (5 * layer + rest)
            held = sum(size for ref, size in live if not ref.expired())
            assert held <= 1.1 * rest, (held, rest)
            train(engine, rank, seed)
    finally:
        shards.gather = plain_gather
    assert len(peaks) > 8


class Unit:
    """A model-parallel unit over groups of two."""

    def __init__(self, size: int, groups: Callable[[list[int]], Any]) -> None:
        self.size, world = size, torch.distributed.get_world_size()
        blocks = [list(range(first, first + size)) for first in range(0, world, size)]
        columns = [list(range(first, world, size)) for first in range(size)]
        mine = torch.distributed.get_rank()
        self.model = [groups(ranks) for ranks in blocks][mine // size]
        self.data = [groups(ranks) for ranks in columns][mine % size]

    def get_model_parallel_group(self) -> Any:
        return self.model

    def get_model_parallel_world_size(self) -> int:
        return self.size

    def get_model_parallel_rank(self) -> int:
        return torch.distributed.get_rank(self.model)

    def get_data_parallel_group(self) -> Any:
        return self.data

    def get_data_parallel_world_size(self) -> int:
        return torch.distributed.get_world_size(self.data)

    def get_data_parallel_rank(self) -> int:
        return torch.distributed.get_rank(self.data)


def a_units_groups_are_used_as_given(rank: int, stage: int) -> None:
    from deepspeed.utils import groups

    unit = Unit(2, torch.distributed.new_group)
    try:
        engine = start(team_config(stage), make(False), mpu=unit)
        assert engine._source._rounds.group is unit.model
        same(engine, call(rank))
        train(engine, 0)
        same(engine, call(rank))
    finally:
        groups.mpu = None  # DeepSpeed keeps it for the process
