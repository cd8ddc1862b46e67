"""``graph="cudagraphs"``: recorded decode steps give the tokens of transformers.

On a CPU the recorder is a tape, see tests/tape.py: it repeats operators on the memory of then, with
the numbers of then, and refuses what a GPU could not record.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws.against_hf import hf_generate, near_ties, same_tokens
from laws.recorded_engines import ENDS, GREEDY, engine_of, family, sizes_of, steps_of
from tape import TapeRecorder, taped
from tiny_models import VOCAB, prompt, tiny
from transformers import DynamicCache
from upstream_names import CACHE

import hybrid_fx
from hybrid_fx.generate import loop
from hybrid_fx.runtime import attend_at as attention
from hybrid_fx.runtime import recorded
from hybrid_fx.runtime.recording import Watch


def step_elsewhere(engine: Any) -> None:
    """A step on a device without numbers: it must not read or make tensors on another one."""
    nowhere = torch.device("meta")
    manifest = engine._graphs.runner.plan.manifest
    inputs = recorded.Inputs(3, 256, nowhere)
    prepared = [
        torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device=nowhere)
        for entry in manifest.prepared
    ]
    memory = [
        [torch.empty(3, layer.kv_heads, 256, size(layer), device=nowhere) for layer in manifest.kv]
        for size in (lambda layer: layer.head_size, lambda layer: layer.value_head_size)
    ]
    windows = {layer.window or 0 for layer in manifest.kv}
    with Watch(nowhere), torch.no_grad():
        masks = attention.masks_at(inputs.valid, inputs.at, windows, torch.float32)
        fixed = (inputs.ids, inputs.positions, inputs.at, masks, 256, 1)
        logits = steps_of(engine)._decode(*fixed, prepared, *memory)
    assert (logits.shape, logits.device) == ((3, 1, VOCAB), nowhere)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt350", "mistral", "gemma2"])
def test_the_tokens_are_those_of_transformers_in_each_family(
    tapes: type[TapeRecorder], kind: str
) -> None:
    with engine_of(family(kind)) as engine:
        for lengths in ((5, 3, 1, 7), (1,), (4, 4), (2, 6)):
            same_tokens(engine, **prompt(lengths), **GREEDY)
        assert [rows for rows, _ in sizes_of(engine)] == [4, 1, 2]
        assert [tape.replays for tape in tapes.tapes] == [6, 6, 12], "the first is the proof"
        assert not engine.stats.fallbacks
        step_elsewhere(engine)


@given(
    heads=st.sampled_from([(4, 4), (6, 3), (5, 1), (3, 3), (8, 2)]),
    size=st.sampled_from([4, 10]),
    kind=st.sampled_from(["llama", "qwen2", "mistral"]),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    new=st.integers(2, 9),
    ends=st.booleans(),
)
@settings(max_examples=5)
def test_random_shapes_and_prompts_give_the_tokens_of_transformers(
    heads: tuple[int, int], size: int, kind: str, lengths: list[int], new: int, ends: bool
) -> None:
    shape = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    model = tiny(kind, **shape, hidden_size=heads[0] * size)
    asked = prompt(lengths, seed=new) | {"max_new_tokens": new, "do_sample": False}
    asked["eos_token_id"] = ENDS if ends else None
    with taped(), engine_of(model) as engine:
        got = engine.generate(**asked)
        near_ties(model, asked, got, hf_generate(model, **asked))
        assert not steps_of(engine).failure


@pytest.mark.parametrize(
    ("ahead", "sampling"), [(False, "hf"), (True, "hf"), (True, "per_sequence")]
)
def test_draws_are_those_without_recordings_also_where_forwards_are_queued(
    monkeypatch: pytest.MonkeyPatch, tapes: type[TapeRecorder], sampling: Any, ahead: bool
) -> None:
    monkeypatch.setattr(loop, "is_asynchronous", lambda device: ahead)
    asked = prompt((3, 9, 1, 6)) | {"max_new_tokens": 24, "do_sample": True, "eos_token_id": ENDS}
    model = tiny("llama")
    found = []
    for graph in ("eager", "cudagraphs"):
        options: dict[str, Any] = {"graph": graph, "sampling": sampling}
        with hybrid_fx.hybridize(model, **options) as engine:
            torch.manual_seed(3)
            found.append((engine.generate(**asked).tolist(), torch.get_rng_state().tolist()))
    assert found[0] == found[1]
    assert len(tapes.tapes) > 1


def test_logits_that_were_handed_out_outlive_the_next_step(tapes: type[TapeRecorder]) -> None:
    with engine_of(tiny("llama")) as engine:
        session = engine._graphs.ready().session(batch=2, capacity=9)
        ids = torch.randint(VOCAB, (2, 6))
        session.forward(ids[:, :2], torch.arange(2).expand(2, 2))
        found = [session.forward(ids[:, at : at + 1], torch.full((2, 1), at)) for at in (2, 3, 4)]
        copies = [logits.clone() for logits in found]
        session.forward(ids[:, 5:], torch.full((2, 1), 5))
        session.close()
        assert all(map(torch.equal, found, copies))
        assert not torch.equal(found[1], found[2])


@pytest.mark.parametrize(
    "asked",
    [
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True, "top_k": 9},
        {"prompt_lookup_num_tokens": 3},
        {"num_return_sequences": 3, "do_sample": True},
        {"use_cache": False},
        {"return_dict_in_generate": True, "output_logits": True},
    ],
    ids=lambda asked: "-".join(asked),
)
def test_other_ways_to_decode_give_what_transformers_gives(
    tapes: type[TapeRecorder], asked: dict[str, Any]
) -> None:
    lengths = (6,) if "prompt_lookup_num_tokens" in asked else (5, 3)
    call_ = prompt(lengths) | {"max_new_tokens": 12, "do_sample": False} | asked
    model = tiny("llama", seed=1)
    torch.manual_seed(5)
    want = hf_generate(model, **call_)
    with engine_of(model) as engine:
        for _ in range(2):
            torch.manual_seed(5)
            got = engine.generate(**call_)
            assert torch.equal(getattr(got, "sequences", got), getattr(want, "sequences", want))
        assert not steps_of(engine).failure
    assert tapes.tapes


def test_a_prefix_in_a_cache_is_gone_on_from(tapes: type[TapeRecorder]) -> None:
    model = tiny("llama")
    given_ = prompt((9, 6))
    caches, found = [DynamicCache(config=model.config) for _ in range(2)], []
    with engine_of(model) as engine:
        for one, cache in zip((engine, None), caches, strict=True):
            asked = {**given_, **GREEDY, CACHE: cache}
            ids = one.generate(**asked) if one else hf_generate(model, **asked)
            mask = torch.cat((given_["attention_mask"], torch.ones(2, 7, dtype=torch.int64)), 1)
            asked |= {"input_ids": ids, "attention_mask": mask}
            found.append((one.generate(**asked) if one else hf_generate(model, **asked)).tolist())
    assert found[0] == found[1]
    assert caches[0].get_seq_length() == caches[1].get_seq_length()
    assert tapes.tapes
