"""Claims about sharded weights, checked on every rank."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from engines import call, ds_config, hf_tokens, make, no_room, plain, start, train, weights
from memory_ledger import address
from tape import taped
from tiny_models import prompt

from hybrid_fx.capture import plain_linear
from hybrid_fx.errors import InputError, RankError
from hybrid_fx.passes.packing import most_bytes


def _status(engine: Any) -> list[Any]:
    """What DeepSpeed keeps of each parameter and module."""
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    of_parameters = [
        (p.ds_status, p.shape, p.ds_tensor.data_ptr(), sorted(p.ds_active_sub_modules))
        for p in engine.module.parameters()
    ]
    of_modules = [
        (list(m._forward_hooks), list(m._forward_pre_hooks), m._parameters._in_forward)
        for m in engine.module.modules()
    ]
    trace = (coordinator.is_complete_trace(), coordinator.is_record_trace())
    return [of_parameters, of_modules, trace]


def it_really_shards_and_gathers_in_few_collectives(rank: int) -> None:
    engine = start(ds_config(3), make(False))
    for parameter in engine.module.parameters():
        assert parameter.shape == (0,)
        assert parameter.ds_tensor.numel() == -(-parameter.ds_numel // 2)
    engine.generate(**call(rank))
    train(engine, rank)
    gather = engine._source.gather
    before = gather.collectives
    engine.generate(**call(rank))
    assert gather.collectives == before + 1  # 20 parameters
    gather._limit = 1 << 14
    train(engine, rank)
    expected = hf_tokens(weights(engine), False, call(rank))
    before = gather.collectives
    assert torch.equal(engine.generate(**call(rank)), expected)
    assert 2 < gather.collectives - before < 12
    assert engine.stats.seconds["gather"] > 0


def a_generate_leaves_deepspeed_as_it_was(rank: int, **changes: Any) -> None:
    for zero in (None, {}):  # really sharded; as a tiny model is by default
        engine = start(ds_config(3, zero=zero, **changes), make(False))
        train(engine, rank)
        before = _status(engine)
        for options in ({}, {"num_beams": 2}):
            engine.generate(**call(rank, **options))
            assert _status(engine) == before
        engine.module.generate(**_right_padded(rank))
        assert _status(engine) == before
        assert set(engine.module_state_dict()) == set(make(False).state_dict())


def eval_frees_what_stays_gathered(rank: int) -> None:
    engine = start(ds_config(3, zero={}), make(False))
    train(engine, rank)
    assert any(parameter.shape != (0,) for parameter in engine.module.parameters())
    engine.eval()
    assert all(parameter.shape == (0,) for parameter in engine.module.parameters())


def edits_of_gathered_parameters_are_followed(rank: int, **changes: Any) -> None:
    import deepspeed

    engine = start(ds_config(3, **changes), make(False))
    first = engine.generate(**call(rank))
    version = engine.weight_version
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        pass
    engine.generate(**call(rank))
    assert engine.weight_version == version
    head = engine.module.lm_head.weight
    with deepspeed.zero.GatheredParameters(head, modifier_rank=0):
        if rank == 0:
            head.data.neg_()
    expected = hf_tokens(weights(engine), False, call(rank))
    assert not torch.equal(expected, first)
    assert torch.equal(engine.generate(**call(rank)), expected)
    assert engine.stats.counters["prepares"] == 2


def an_edit_that_one_rank_sees_is_followed_by_all(rank: int, **changes: Any) -> None:
    engine = start(ds_config(3, **changes), make(False))
    engine.generate(**call(rank))
    if rank == 1:
        engine.module.lm_head.weight.ds_tensor.mul_(-1)
    expected = hf_tokens(weights(engine), False, call(rank))
    assert torch.equal(engine.generate(**call(rank)), expected)
    assert engine.stats.counters["prepares"] == 2


def _right_padded(rank: int) -> dict[str, Any]:
    given = call(rank)
    flipped = {name: given[name].flip(1) for name in ("input_ids", "attention_mask")}
    return {**given, **flipped}


def ranks_may_take_different_ways(rank: int, **changes: Any) -> None:
    engine = start(ds_config(3, **changes), make(False))
    held = weights(engine)
    ways = [call(0), _right_padded(1), call(0, num_beams=3), call(0, max_new_tokens=2)]
    for first, second in ((0, 1), (2, 0), (3, 1), (1, 1)):
        given = ways[second if rank else first]
        assert torch.equal(engine.generate(**given), hf_tokens(held, False, given))
    assert engine.stats.counters["prepares"] == 1


def a_call_that_one_rank_refuses_raises_on_all(rank: int, **changes: Any) -> None:
    engine = start(ds_config(3, **changes), make(False))
    good = call(rank)
    bad = {**good, "input_ids": good["input_ids"] + 1000}
    with pytest.raises(InputError if rank else RankError, match="" if rank else "rank 1"):
        engine.generate(**(bad if rank else good))
    assert torch.equal(engine.generate(**good), hf_tokens(weights(engine), False, good))


def an_error_on_one_rank_stops_all(rank: int) -> None:
    """While weights are gathered, and later, where nothing is collective."""
    engine = start(ds_config(3), make(False))
    engine.generate(**call(rank))
    engine._source.gather._limit = 1 << 12

    def odd(ids: Any, scores: Any) -> Any:
        raise LookupError("a processor fails")

    train(engine, rank)
    told = pytest.raises(MemoryError if rank else RankError, match="room" if rank else "rank 1")
    with no_room(engine) if rank else nullcontext(), told:
        engine.generate(**call(rank))
    expected = hf_tokens(weights(engine), False, call(rank))
    assert torch.equal(engine.generate(**call(rank)), expected)
    given = call(rank, **({"logits_processor": [odd]} if rank else {}))
    with pytest.raises(LookupError if rank else RankError, match="fails" if rank else "rank 1"):
        engine.generate(**given)
    assert torch.equal(engine.generate(**call(rank)), expected)


def different_models_are_refused(rank: int, **changes: Any) -> None:
    engine = start(ds_config(3, **changes), make(True))
    if rank:
        engine.module.base_model.disable_adapter_layers()
    with pytest.raises(RankError, match="models differ"):
        engine.generate(**call(rank))


def what_is_not_captured_generates_all_the_same(rank: int, **changes: Any) -> None:
    engine = start(ds_config(3, **changes), make(False))

    def odd(module: Any, args: Any, output: Any) -> Any:
        return output * (1.0 if float(output.sum()) == float(output.sum()) else 2.0)

    def by_size(module: Any, args: Any, output: Any) -> Any:
        return output * (1.0 if output.shape[1] > 1 else float(module.training) + 1.0)

    expected = hf_tokens(weights(engine), False, call(rank))
    for hook, why in ((odd, "not captured"), (by_size, "asks for sizes")):
        with engine.module.model.layers[0].mlp.register_forward_hook(hook):
            forwards = engine.stats.counters["hf_forwards"]
            assert torch.equal(engine.generate(**call(rank)), expected)
            assert engine.stats.counters["hf_forwards"] > forwards
            assert why in str(engine.stats.fallbacks)


def a_model_built_in_shards_generates(rank: int, **changes: Any) -> None:
    import transformers
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    config = ds_config(3, **changes)
    shape = make(False).config
    alive = HfDeepSpeedConfig(config)  # transformers builds under deepspeed.zero.Init now
    try:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(shape)
        assert alive.is_zero3()
        assert all(parameter.shape == (0,) for parameter in model.parameters())
        engine = start(config, model)
        _is_hf_over_steps(engine, rank)
    finally:
        unset_hf_deepspeed_config()


def _is_hf_over_steps(engine: Any, rank: int) -> None:
    for seed in range(2):
        expected = hf_tokens(weights(engine), False, call(rank))
        assert torch.equal(engine.generate(**call(rank)), expected)
        train(engine, rank, seed)


def tied_weights_are_gathered_once(rank: int, **changes: Any) -> None:
    engine = start(ds_config(3, **changes), make(False, kind="qwen2"))
    for seed in range(2):
        with plain_linear():
            expected = plain(weights(engine), False, "qwen2").generate(**call(rank))
        assert torch.equal(engine.generate(**call(rank)), expected)
        train(engine, rank, seed)
    names = [weight.name for weight in engine._graphs.runner.plan.manifest.weights]
    assert "lm_head.weight" not in names


def memory_is_given_back(rank: int) -> None:
    config = ds_config(3)
    config["hybrid_engine"]["release_inference_cache"] = True
    engine = start(config, make(False))
    expected = hf_tokens(weights(engine), False, call(rank))
    for _ in range(2):
        assert torch.equal(engine.generate(**call(rank)), expected)
        runner = engine._graphs.runner
        assert runner.prepared.nbytes == runner.workspace.nbytes == 0
        assert engine._graphs.weights == engine._source.gather.staging._held == {}


def prepared_memory_is_used_again(rank: int) -> None:
    engine = start(ds_config(3), make(False))
    engine.generate(**call(rank))
    addresses = [address(t) for t in engine._graphs.runner.prepared.tensors]
    train(engine, rank)
    engine.generate(**call(rank))
    assert [address(t) for t in engine._graphs.runner.prepared.tensors] == addresses
    whole = sum(p.ds_numel for p in engine.module.parameters()) * 4
    packed = sum(most_bytes(p.ds_shape, torch.float32) for p in engine.module.parameters())
    assert whole <= engine._graphs.runner.prepared.nbytes < 1.3 * packed


def lengths_may_differ(rank: int, **changes: Any) -> None:
    engine = start(ds_config(3, **changes), make(False))
    held = weights(engine)
    for turn in range(2):
        rows = [[5, 3], [2]][(rank + turn) % 2]
        given = {**prompt(rows, seed=turn), "max_new_tokens": 3 + 5 * rank, "do_sample": False}
        assert torch.equal(engine.generate(**given), hf_tokens(held, False, given))


def recorded_steps_serve_each_weight_version(rank: int) -> None:
    """Ranks record for themselves: they step down with rows of their own, and stop apart."""
    with taped() as recorders:
        engine = start(ds_config(3, hybrid_fx={"graph": "cudagraphs"}), make(False))
        lengths = {"max_new_tokens": [9, 4 + rank]}
        seen = set()
        for seed in range(3):
            asked = call(rank, max_new_tokens=9)
            expected = hf_tokens(weights(engine), False, asked)
            got = engine.generate(**asked | lengths)
            assert torch.equal(got[0], expected[0])
            assert torch.equal(got[1, : 9 + rank], expected[1, : 9 + rank])
            seen.add(str(expected.tolist()))
            train(engine, rank, seed)
        assert len(seen) == 3
        assert engine.stats.counters["prepares"] == 3
        assert engine.stats.counters["recordings"] == len(recorders.tapes) == 2
        assert not engine.stats.fallbacks
