"""Twins of module trees, and how weights are put into collectives: one process, no DeepSpeed."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from profiles import deep
from tiny_models import adapted, prompt, tiny
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from hybrid_fx.cache.key import StructureKey
from hybrid_fx.cache.tree import View
from hybrid_fx.capture import capture
from hybrid_fx.config import HybridConfig
from hybrid_fx.distributed.shards import Shard, ShardGather, Staging, buckets
from hybrid_fx.distributed.twin import outline, twin
from hybrid_fx.plan.build import build_plan, normalize


class Marked(View):
    """Leaves out what this test put on the modules."""

    def foreign_attribute(self, name: str) -> bool:
        return name.startswith("mark_")

    def foreign_hook(self, hook: Any) -> bool:
        return getattr(hook, "__name__", "") == "foreign"


def same(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter itself."""
    return parameter


def drawn(parameter: nn.Parameter) -> nn.Parameter:
    """An outline of the parameter."""
    return outline(parameter.shape, parameter)


@pytest.mark.parametrize("lora", [False, True])
def test_a_twin_computes_what_the_model_does(lora: bool) -> None:
    model = adapted(tiny("gpt2")) if lora else tiny("gpt2")
    copy = twin(model, View(), same)
    given = prompt([5, 3])
    with torch.no_grad():
        assert torch.equal(copy(**given).logits, model(**given).logits)
    generated = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(copy.generate(**given, **generated), model.generate(**given, **generated))


def test_flags_of_a_twin_are_its_own() -> None:
    model = tiny("llama")
    copy = twin(model, View(), same)
    copy.train()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("kind", ["gpt2", *deep("llama", "opt350")])
def test_an_outline_has_the_key_and_the_plan_of_the_model(kind: str) -> None:
    model = adapted(tiny(kind))
    copy = twin(model, View(), drawn)
    assert all(p.untyped_storage().nbytes() == 0 for p in copy.parameters())
    config = HybridConfig()
    assert StructureKey.of(copy, config).differs(StructureKey.of(model, config)) == ()
    plans = [
        build_plan(normalize(capture(m).graph), model="m", vocab_size=64) for m in (model, copy)
    ]
    assert plans[0] == plans[1]


def test_ties_stay_ties() -> None:
    copy: Any = twin(tiny("qwen2"), View(), drawn)
    assert copy.lm_head.weight is copy.model.embed_tokens.weight


def test_foreign_hooks_and_attributes_have_no_twin() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2))
    calls: list[str] = []

    def foreign(*_: Any) -> None:
        calls.append("foreign")

    def own(module: nn.Module, *_: Any, **__: Any) -> None:
        calls.append("own")

    model[0].register_forward_pre_hook(foreign)
    model[0].register_forward_pre_hook(own, with_kwargs=True)
    model[0].mark_count = 3
    model[0].width = 2
    copy: Any = twin(model, Marked(), same)
    copy(torch.ones(1, 2))
    assert calls == ["own"]
    assert copy[0].width == 2
    assert not hasattr(copy[0], "mark_count")
    copy[0].register_forward_pre_hook(own)
    assert len(model[0]._forward_pre_hooks) == 2


def test_an_empty_container_has_a_twin_of_its_own() -> None:
    model: Any = nn.Module()
    model.empty = nn.ParameterDict()
    model.empty.mark_count = 3
    model.missing = None
    copy: Any = twin(model, Marked(), same)
    assert copy.empty is not model.empty
    assert not hasattr(copy.empty, "mark_count")
    assert copy.missing is None


def test_what_refers_to_a_module_refers_to_its_twin() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model.bound = model[0].forward
    model.pieces = [model[0], 1]
    model.by_name = {"first": model[0]}
    model.part = functools.partial(nn.Module.train, model[1])
    copy: Any = twin(model, View(), same)
    assert copy.bound.__self__ is copy[0]
    assert copy.pieces[0] is copy.by_name["first"] is copy[0]
    assert copy.part.args == (copy[1],)
    assert model.pieces[0] is model[0]


def shard(count: int, dtype: torch.dtype = torch.float32) -> Shard:
    """A shard of a whole vector of ``count`` elements."""
    part = torch.zeros(count, dtype=dtype)
    return Shard(part=part, shape=torch.Size([count]), device=part.device, group=None)


def test_buckets_keep_the_order_and_the_limit() -> None:
    shards = [shard(size) for size in (10, 20, 30, 100, 1, 2)]
    cut = [[s.shape[0] for s in bucket] for bucket in buckets(shards, limit=240)]
    assert cut == [[10, 20, 30], [100], [1, 2]]


def test_a_bucket_holds_one_dtype() -> None:
    shards = [shard(1), shard(2, torch.bfloat16), shard(3)]
    cut = [[s.shape[0] for s in bucket] for bucket in buckets(shards)]
    assert cut == [[1, 3], [2]]


def test_a_bucket_reaches_over_few_layers_and_not_outside_of_them() -> None:
    layers = ("", "0", "0", "1", "2", "2", "")
    shards = [replace(shard(size), layer=layer) for size, layer in enumerate(layers, 1)]
    cut = [[s.shape[0] for s in bucket] for bucket in buckets(shards, layers=2)]
    assert cut == [[1, 7], [2, 3, 4], [5, 6]]
    assert [len(bucket) for bucket in buckets(shards, layers=1)] == [2, 2, 1, 2]
    assert [len(bucket) for bucket in buckets(shards)] == [7]


def test_memory_that_grows_never_stands_beside_what_it_replaces() -> None:
    class Grows(Staging):
        def __init__(self) -> None:
            super().__init__()
            self.ended: list[bool] = []
            self.last: StorageWeakRef | None = None

        def fresh(self, use: str, count: int, like: Shard) -> Tensor:  # type: ignore[override]
            self.ended.append(self.last is None or self.last.expired())
            made = Staging.fresh(use, count, like)
            self.last = StorageWeakRef(made.untyped_storage())
            return made

    staging = Grows()
    for count in (4, 2, 8, 8):
        assert staging.take("rows", count, shard(1)).shape == (count,)
    assert staging.ended == [True, True]


def test_what_is_whole_is_handed_through() -> None:
    held = torch.ones(3)
    gather = ShardGather(dict, lambda: frozenset((held.untyped_storage()._cdata,)))
    gather.begin([held], pytest.fail)  # a timer: nothing is gathered
    assert gather(held) is held
    assert gather.lent(held[1:])
    assert not gather.lent(held.clone())
    gather.end()
    assert gather.collectives == 0
