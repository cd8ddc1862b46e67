"""Claims about the rows of ranks that generate together, checked on every rank."""

from __future__ import annotations

import pytest
import torch
from engines import call, plain, weights
from teams import same, started
from tiny_models import PAD, prompt, tiny
from torch import Tensor
from upstream_names import CACHE

from hybrid_fx.capture import plain_linear
from hybrid_fx.errors import EngineBusyError, InputError, RankError


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
    # A length for each row, of which one rank knows two and the other one.
    alone = call(rank, eos_token_id=None, pad_token_id=PAD)
    lengths = [9, 2] if rank % 2 else [5] * len(alone["input_ids"])
    with plain_linear():
        whole = reference.generate(**{**alone, "max_new_tokens": max(lengths)})
    found = engine.generate(**{**alone, "max_new_tokens": lengths})
    for row, length in enumerate(lengths):
        assert torch.equal(found[row, : width + length], whole[row, : width + length])
        assert (found[row, width + length :] == PAD).all()
    assert not engine.stats.fallbacks


def samples_of_a_prompt_share_its_prefill_and_end_apart(rank: int, stage: int) -> None:
    """Rows are repeated behind the prefill, and leave at other steps on each rank."""
    engine = started(stage)
    reference = plain(weights(engine), False)
    ends = {"eos_token_id": list(range(3, 40)), "pad_token_id": PAD}
    given = call(rank, max_new_tokens=8, do_sample=True, num_return_sequences=3, top_k=0, **ends)
    before = engine.stats.tokens["prefill"], engine.stats.tokens["decode"]
    torch.manual_seed(rank)
    with plain_linear():
        expected = reference.generate(**given)
    torch.manual_seed(rank)
    found = engine.generate(**given)
    assert torch.equal(found, expected)
    width = given["input_ids"].shape[1]
    ended = (found[:, width:, None] == torch.tensor(ends["eos_token_id"])).any(-1).cumsum(1) > 0
    assert engine.stats.tokens["prefill"] - before[0] == given["attention_mask"].sum()
    assert engine.stats.tokens["decode"] - before[1] == (~ended[:, :-1]).sum()


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


def ways_may_differ(rank: int, stage: int) -> None:
    """One rank of a team runs the module itself, the other one the graphs; both are right."""
    engine = started(stage)
    reference = plain(weights(engine), False)
    for odd in (0, 1):
        given = call(rank)
        if rank % 2 == odd:
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
    cached = {**call(rank), CACHE: DynamicCache()}
    for case, said in ((embedded, "inputs_embeds"), (cached, CACHE)):
        fresh = {k: DynamicCache() if k == CACHE else v for k, v in case.items()}
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

    with pytest.raises((EngineBusyError, RankError), match=r"another generate|rank \d raised"):
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
