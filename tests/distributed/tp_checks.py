"""Claims about ranks that generate together, checked on every rank; the stage is given."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engines import call, ds_config, hf_tokens, make, plain, start, train, weights
from tiny_models import PAD, adapted, prompt, tiny
from torch import Tensor

from hybrid_fx.capture import plain_linear
from hybrid_fx.errors import EngineClosedError, InputError, RankError


def team_config(stage: int, **block: Any) -> dict[str, Any]:
    """A config in which two ranks generate together; ``block`` are further fields of its block."""
    config = ds_config(stage)
    config["hybrid_engine"] |= {"inference_tp_size": 2, **block}
    return config


def started(stage: int, model: Any = None) -> Any:
    """An engine of two ranks that generate together, or as :func:`under` says."""
    block = json.loads(os.environ.get(_BLOCK, "{}"))
    return start(team_config(stage, **block), make(False) if model is None else model)


_BLOCK = "BLOCK_OF_THESE_CHECKS"


def under(rank: int, check: Callable[[int], None], **block: Any) -> None:
    """``check`` with these fields of the ``hybrid_engine`` block."""
    os.environ[_BLOCK] = json.dumps(block)
    try:
        check(rank)
    finally:
        del os.environ[_BLOCK]


def same(engine: Any, given: dict[str, Any], reference: Any = None) -> Tensor:
    """Tokens are those of transformers for these rows alone; returns them."""
    reference = plain(weights(engine), False) if reference is None else reference
    with plain_linear():
        expected = reference.generate(**given)
    found = engine.generate(**given)
    assert torch.equal(found, expected), (found, expected)
    return found


def any_prompts_generate_as_their_rows_alone(rank: int, stage: int) -> None:
    """Widths, rows, lengths and padding differ from rank to rank, in either direction."""
    engine = started(stage)
    reference = plain(weights(engine), False)
    cases = [
        (([5, 3], 6), ([5, 3], 6)),
        (([7, 2, 4], 6), ([3], 6)),
        (([4], 9), ([4, 4], 2)),
        (([1], 1), ([6, 1, 2], 8)),
        (([2, 2], 3), ([1], 3)),
    ]
    for turn, case in enumerate([*cases, *[pair[::-1] for pair in cases]]):
        lengths, count = case[rank % 2]
        given = {**prompt(lengths, seed=turn + 10 * rank), "max_new_tokens": count}
        same(engine, {**given, "do_sample": False}, reference)
    assert not engine.stats.fallbacks
    assert engine.stats.counters["prepares"] == 1


def rows_end_when_they_end(rank: int, stage: int) -> None:
    """Ends of sequence at other steps on each rank; also with all settings that steer lengths."""
    engine = started(stage)
    reference = plain(weights(engine), False)
    free = reference.generate(**call(rank, max_new_tokens=12))
    width = call(rank)["input_ids"].shape[1]
    ends = {"pad_token_id": PAD, "eos_token_id": [int(free[0, width + 4]), int(free[1, width + 1])]}
    # Both ranks are given the same ends; where they occur differs.
    shared = torch.tensor(ends["eos_token_id"]) * (rank == 0)
    torch.distributed.all_reduce(shared)
    ends["eos_token_id"] = shared.tolist()
    ended = same(engine, call(rank, max_new_tokens=12, **ends), reference)
    if rank == 0:
        assert ended.shape[1] < free.shape[1]
    same(
        engine, call(rank, max_new_tokens=4 + 3 * rank, min_new_tokens=3 + rank, **ends), reference
    )
    given = call(rank, max_length=10 + rank)
    del given["max_new_tokens"]
    same(engine, given, reference)


def a_rank_without_rows_takes_part(rank: int, stage: int) -> None:
    engine = started(stage)
    nothing = {"input_ids": torch.zeros(0, 4, dtype=torch.int64), "max_new_tokens": 6}
    for idle in (0, 1):
        if rank % 2 != idle:
            same(engine, call(rank))
            continue
        weights(engine)
        found = engine.generate(**nothing, do_sample=False)
        assert (found.shape, found.dtype) == ((0, 4), torch.int64)
    result = engine.generate(
        **nothing, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    assert (result.sequences.shape, result.scores) == ((0, 4), ())
    beams = engine.generate(**nothing, num_beams=2, return_dict_in_generate=True)
    assert beams.sequences.shape == (0, 4)
    wrong = {**nothing, "input_ids": torch.zeros(0, 0, dtype=torch.int64)}
    with pytest.raises(InputError, match="empty"):
        engine.generate(**wrong)


def samples_are_those_of_each_ranks_generator(rank: int, stage: int) -> None:
    engine = started(stage)
    reference = plain(weights(engine), False)
    torch.manual_seed(100 + rank)
    for changes in ({}, {"top_k": 5, "temperature": 0.7}, {"num_return_sequences": 3}):
        state = torch.get_rng_state()
        given = call(rank, do_sample=True, max_new_tokens=5 + 2 * rank, **changes)
        with plain_linear():
            expected = reference.generate(**given)
        left = torch.get_rng_state()
        torch.set_rng_state(state)
        assert torch.equal(engine.generate(**given), expected)
        assert torch.equal(torch.get_rng_state(), left)


def other_loops_run_over_joint_forwards(rank: int, stage: int) -> None:
    """Beams, drafts and a prompt in pieces, of other lengths on each rank."""
    engine = started(stage)
    reference = plain(weights(engine), False)
    one = {**prompt([4], seed=rank), "do_sample": False, "max_new_tokens": 6 + rank}
    for given in (
        call(rank, num_beams=3, max_new_tokens=5 + 2 * rank),
        call(rank, num_beams=4, num_return_sequences=2, early_stopping=True),
        {**one, "prompt_lookup_num_tokens": 2},
        call(rank, prefill_chunk_size=2),
        call(rank, repetition_penalty=1.3, no_repeat_ngram_size=2),
    ):
        same(engine, given, reference)
    found = set(engine.stats.fallbacks)
    assert all(reason.startswith("HF loop") for reason in found)
    assert len(found) == 2


def results_have_the_shape_that_transformers_gives(rank: int, stage: int) -> None:
    engine = started(stage)
    reference = plain(weights(engine), False)
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    for changes in ({"max_new_tokens": 4 + rank}, {"num_beams": 2, "max_new_tokens": 5 - rank}):
        given = call(rank, **changes, **asked)
        with plain_linear():
            expected = reference.generate(**given)
        found = engine.generate(**given)
        assert type(found) is type(expected)
        assert torch.equal(found.sequences, expected.sequences)
        for name in ("scores", "logits"):
            mine, theirs = getattr(found, name), getattr(expected, name)
            assert len(mine) == len(theirs)
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def other_options_in_a_team_are_refused_by_name(rank: int, stage: int) -> None:
    engine = started(stage)
    first = call(rank)
    same(engine, first)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"do_sample": bool(rank)}, "do_sample is False on rank 0 and True on rank 1"),
        ({"repetition_penalty": 1.0 + rank}, "repetition_penalty"),
        ({"num_beams": 1 + rank}, "num_beams"),
        ({"logits_processor": [_Odd()] * rank}, "logits_processor is  on rank 0 and _Odd"),
    ]
    for changes, said in cases:
        with pytest.raises(InputError, match=said):
            engine.generate(**call(rank, **changes))
    same(engine, first)


class _Odd:
    """A processor that fails after some steps."""

    def __init__(self, steps: int = 0) -> None:
        self.steps = steps

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.steps -= 1
        if self.steps < 0:
            raise LookupError("a processor fails")
        return scores


class _Quiet(_Odd):
    """One that does not fail."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores


def an_error_on_one_rank_is_one_of_its_team(rank: int, stage: int) -> None:
    """In the arguments, in a processor, and while weights are prepared."""
    engine = started(stage)
    same(engine, call(rank))
    bad = call(rank)
    if rank:
        bad["input_ids"] = bad["input_ids"] + 1000
    with pytest.raises(InputError if rank else RankError, match="" if rank else "rank 1"):
        engine.generate(**bad)
    same(engine, call(rank))
    _Quiet.__qualname__ = _Odd.__qualname__
    for steps in (0, 3):
        given = call(rank, logits_processor=[_Odd(steps) if rank else _Quiet()])
        with pytest.raises(LookupError if rank else RankError, match="fails" if rank else "rank 1"):
            engine.generate(**given)
        same(engine, call(rank))
    train(engine, rank)
    prepared = engine._graphs.runner.prepared
    store = prepared.store

    def full(index: int, value: Tensor) -> None:
        if index == 7:
            raise MemoryError("no room")
        store(index, value)

    if rank:
        prepared.store = full
    with pytest.raises(MemoryError if rank else RankError, match="room" if rank else "rank 1"):
        engine.generate(**call(rank))
    if rank:
        del prepared.store
    same(engine, call(rank))


def ways_may_differ(rank: int, stage: int) -> None:
    """One rank runs the module itself, the other one the graphs; both are right."""
    engine = started(stage)
    reference = plain(weights(engine), False)
    for odd in (0, 1):
        given = call(rank)
        if rank == odd:
            given |= {name: given[name].flip(1) for name in ("input_ids", "attention_mask")}
        same(engine, given, reference)
    assert len(engine.stats.fallbacks) == 1
    assert "right-padded" in str(engine.stats.fallbacks)


def what_ranks_cannot_share_runs_the_module(rank: int, stage: int) -> None:
    """Embeddings and a prefix in a cache; under ZeRO-3 they are refused in words."""
    from transformers import DynamicCache

    engine = started(stage)
    held = weights(engine)
    reference = plain(held, False)
    given = call(rank)
    table = held["model.embed_tokens.weight"]
    embedded = {**given, "inputs_embeds": table[given.pop("input_ids")]}
    del embedded["input_ids"]
    cached = {**call(rank), "past_key_values": DynamicCache()}
    for case, said in ((embedded, "inputs_embeds"), (cached, "past_key_values")):
        fresh = {k: DynamicCache() if k == "past_key_values" else v for k, v in case.items()}
        with plain_linear():
            expected = reference.generate(**fresh)
        if stage == 3:
            with pytest.raises(Exception, match="left the rewritten graphs"):
                engine.generate(**case)
            continue
        assert torch.equal(engine.generate(**case), expected)
        assert said in str(engine.stats.fallbacks)
    same(engine, call(rank), reference)


def a_generate_inside_another_is_refused(rank: int, stage: int) -> None:
    engine = started(stage)
    given = call(rank)

    def nested(ids: Tensor, scores: Tensor) -> Tensor:
        engine.generate(**given)
        return scores

    with pytest.raises((EngineClosedError, RankError), match=r"another generate|rank \d raised"):
        engine.generate(**given, logits_processor=[nested])
    same(engine, given)


def kinds_of_models_generate_together(rank: int, stage: int) -> None:
    """Learned positions, ties, one head of keys for both ranks, windows, an uneven MLP."""
    for kind, changes in (
        ("gpt2", {}),
        ("opt", {}),
        ("qwen2", {}),
        ("mistral", {}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"intermediate_size": 45}),
    ):
        engine = started(stage, tiny(kind, **changes))
        held = weights(engine)
        reference = tiny(kind, **changes)
        reference.load_state_dict(held, strict=False)
        given = {**prompt([5 + rank, 3]), "max_new_tokens": 6 + rank, "do_sample": False}
        same(engine, given, reference)
        assert engine.explain().matched == 2
        assert "2 ranks generate together" in str(engine.explain().notes)


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
    addresses = [t.data_ptr() for t in runner.prepared.tensors]
    train(engine, rank)
    engine.generate(**call(rank))
    assert runner.prepared.nbytes == before
    assert [t.data_ptr() for t in runner.prepared.tensors] == addresses
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


def a_rank_that_fails_within_a_forward_is_noticed(rank: int) -> None:
    """Nobody waits for it longer than a minute."""
    import time

    engine = started(0)
    engine.generate(**call(rank))
    reduce, calls = engine._source.group.all_reduce, []

    def failing(x: Tensor) -> Tensor:
        calls.append(x)
        if rank and len(calls) == 6:
            raise MemoryError("no room")
        found: Tensor = reduce(x)
        return found

    engine._source.group.all_reduce = failing
    begun = time.monotonic()
    with pytest.raises(MemoryError if rank else RankError, match="room" if rank else "gone"):
        engine.generate(**call(rank))
    assert time.monotonic() - begun < 60


def an_error_in_one_team(rank: int, stage: int) -> None:
    """Whole weights: the other team goes on. Sharded ones are everybody's: all ranks stop."""
    engine = started(stage)
    reference = plain(weights(engine), False)
    same(engine, call(rank), reference)
    given = call(rank)
    if rank == 1:
        given["input_ids"] = given["input_ids"] + 1000
    if rank < 2 or stage == 3:
        kind = InputError if rank == 1 else RankError
        with pytest.raises(kind, match="vocabulary" if rank == 1 else "rank 1 raised"):
            engine.generate(**given)
    else:
        same(engine, given, reference)
    changes = {"temperature": 0.5 + 0.1 * rank, "do_sample": True} if rank < 2 else {}
    if rank < 2:
        with pytest.raises(InputError, match=r"temperature is 0\.5 on rank 0 and 0\.6"):
            engine.generate(**call(rank, **changes))
    elif stage == 3:
        with pytest.raises(RankError, match="raised"):
            engine.generate(**call(rank))
    else:
        same(engine, call(rank), reference)
    same(engine, call(rank), reference)


def different_models_are_refused(rank: int, stage: int) -> None:
    engine = started(stage, make(True))
    if rank:
        engine.module.base_model.disable_adapter_layers()
    with pytest.raises(RankError, match="models differ"):
        engine.generate(**call(rank))


def what_is_not_captured_generates_all_the_same(rank: int, stage: int) -> None:
    engine = started(stage)

    def odd(module: Any, args: Any, output: Any) -> Any:
        return output * (1.0 if float(output.sum()) == float(output.sum()) else 2.0)

    engine.module.model.layers[0].mlp.register_forward_hook(odd)
    same(engine, call(rank))
    assert "not captured" in str(engine.stats.fallbacks)


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
