"""The fast loop gives the tokens, scores, warnings and random state of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generate.same_as_hf import (
    EOS,
    FAMILIES,
    PAD,
    VOCAB,
    is_fast,
    new_model,
    prompt,
    run,
    same_as_hf,
    shared_model,
)
from transformers import (
    GenerationConfig,
    WatermarkingConfig,
)

from hybrid_fx.generate.prompt import prompt_columns

SAMPLING: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8, "top_k": 0},
    "min_p": {"min_p": 0.1},
    "typical_p": {"typical_p": 0.7},
    "epsilon": {"epsilon_cutoff": 0.02},
    "eta": {"eta_cutoff": 0.02},
    "repetition": {"repetition_penalty": 1.7},
    "combined": {"temperature": 1.3, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.2},
    "returns": {"num_return_sequences": 3},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=3.0)},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "several eos": {"eos_token_id": [EOS, 5, 9, 11, 17, 23]},
    "pad is eos": {"pad_token_id": EOS},
    "no eos": {"eos_token_id": None},
    "default length": {"max_new_tokens": None},
    "max_length": {"max_new_tokens": None, "max_length": 17},
    "min_new_tokens": {"min_new_tokens": 8, "eos_token_id": list(range(30))},
    "min_length": {"min_length": 20, "eos_token_id": list(range(30))},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[7], [8, 9], [40]]},
    "suppress": {"suppress_tokens": list(range(20, 40))},
    "sequence bias": {"sequence_bias": [[[10], 4.0], [[11, 12], 2.0]]},
    "forced eos": {"forced_eos_token_id": EOS},
    "exponential decay": {"exponential_decay_length_penalty": (4, 1.5)},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "dynamic cache": {"cache_implementation": "dynamic"},
    "max_time": {"max_time": 1000.0},
    "synced": {"synced_gpus": False},
    "remove invalid": {"remove_invalid_values": True, "renormalize_logits": True},
    "guidance off": {"guidance_scale": 1.0},
}
ROWS = prompt((3, 9, 1, 6))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", [*FAMILIES, "mistral", "phi3"])
def test_greedy_tokens_are_those_of_hf_for_left_padded_rows(family: str, seed: int) -> None:
    model = shared_model(family, seed)
    assert is_fast(same_as_hf(model, **prompt((3, 9, 1, 6), seed), max_new_tokens=40))


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_tokens_and_random_state_are_those_of_hf(family: str) -> None:
    for seed in range(3):
        ran = same_as_hf(shared_model(family), **ROWS, do_sample=True, max_new_tokens=15, seed=seed)
        assert is_fast(ran)


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_settings_draw_what_hf_draws(name: str) -> None:
    settings = {"do_sample": True, "max_new_tokens": 12, "eos_token_id": [2, 3, 4, 5, 6]}
    assert is_fast(same_as_hf(shared_model(), **ROWS, **settings | SAMPLING[name], seed=3))


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_mean_what_they_mean_to_hf(name: str, sample: bool) -> None:
    settings = {"max_new_tokens": 12, "do_sample": sample, "repetition_penalty": 1.1}
    ran = same_as_hf(shared_model(), **ROWS, **settings | SETTINGS[name])
    assert is_fast(ran)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 1), (8, 5)])
def test_batch_one_and_prompts_of_one_token_are_fast(shape: tuple[int, int]) -> None:
    ids = torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(1))
    ran = same_as_hf(shared_model("gpt2"), ids, max_new_tokens=10)
    assert is_fast(ran)
    assert ran.runner.calls[0] == (*shape, 1)
    assert all(call == (shape[0], 1, 1) for call in ran.runner.calls[1:])


def test_the_last_token_is_never_fed() -> None:
    ran = same_as_hf(shared_model(), **prompt((4,)), max_new_tokens=6, eos_token_id=None)
    assert len(ran.runner.calls) == 6
    assert ran.runner.sessions[0].capacity == ran.runner.sessions[0].length == 9


def test_generation_ends_with_the_last_row() -> None:
    ids = torch.tensor([[5, 6, 7]])
    free = shared_model().generate(ids, max_new_tokens=8, eos_token_id=None)
    ran = same_as_hf(shared_model(), ids, max_new_tokens=8, eos_token_id=int(free[0, 4]))
    assert len(ran.runner.calls) <= 2


@pytest.mark.parametrize("pad_in_prompt", [False, True])
def test_a_mask_is_inferred_from_pad_tokens_as_by_hf(pad_in_prompt: bool) -> None:
    ids = prompt((3, 6) if pad_in_prompt else (6, 6))["input_ids"]
    ran = same_as_hf(shared_model(), ids, max_new_tokens=8)
    assert is_fast(ran)
    assert ran.runner.sessions[0].padded is pad_in_prompt


def test_no_mask_is_inferred_where_the_pad_token_ends_a_sequence() -> None:
    ids = prompt((6, 3), side="right")["input_ids"]
    ran = same_as_hf(shared_model(), ids, max_new_tokens=8, eos_token_id=[PAD, 9])
    assert is_fast(ran)
    assert not ran.runner.sessions[0].padded


def test_boolean_masks_and_int32_ids_are_taken() -> None:
    ids, mask = ROWS["input_ids"].int(), ROWS["attention_mask"].bool()
    assert is_fast(same_as_hf(shared_model(), ids, attention_mask=mask, max_new_tokens=5))


def test_given_positions_are_used() -> None:
    ids = prompt((5, 5))["input_ids"]
    positions = torch.arange(5).expand(2, 5) + 3
    far = same_as_hf(shared_model("gpt2"), ids, position_ids=positions, max_new_tokens=9)
    near = same_as_hf(shared_model("gpt2"), ids, max_new_tokens=9)
    assert is_fast(far)
    assert far.result.tolist() != near.result.tolist()


def test_the_prompt_may_come_by_any_name_or_not_at_all() -> None:
    ids = ROWS["input_ids"][1:2]
    assert is_fast(same_as_hf(shared_model(), ids, max_new_tokens=3))
    assert is_fast(same_as_hf(shared_model(), inputs=ids, max_new_tokens=3))
    assert is_fast(same_as_hf(shared_model(), input_ids=ids, max_new_tokens=3))
    assert is_fast(same_as_hf(shared_model(), max_new_tokens=3))


def test_a_generation_config_counts_and_is_not_written() -> None:
    given = GenerationConfig(
        do_sample=True, top_p=0.8, max_new_tokens=9, cache_implementation="static", pad_token_id=PAD
    )
    before = given.to_dict()
    ran = same_as_hf(shared_model(), **ROWS, generation_config=given)
    assert is_fast(ran)
    assert given.to_dict() == before
    assert ran.result.shape == (4, 18)


@pytest.mark.parametrize("where", ["kwargs", "config", "both", "model"])
@pytest.mark.parametrize("beams", [1, 2])
def test_no_cache_of_hfs_is_allocated(where: str, beams: int) -> None:
    model = new_model()
    static = {"cache_implementation": "static"}
    kwargs = static if where in ("kwargs", "both") else {}
    if where == "model":
        model.generation_config.update(**static)
    if where != "kwargs":
        given = static if where == "config" else {}
        kwargs = kwargs | {"generation_config": GenerationConfig(max_length=12, **given)}
    model._prepare_static_cache = lambda *_, **__: pytest.fail("a static cache was made")
    ran = run(model, **ROWS, **kwargs, num_beams=beams)
    assert len(ran.runner.sessions) == 1


def test_positions_of_a_prompt_are_hfs_where_the_model_takes_none() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    padded = prompt_columns(mask + 5, mask, None)
    assert padded.positions.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert padded.valid.tolist() == mask.bool().tolist()
    full = prompt_columns(mask + 5, None, None)
    assert full.positions.tolist() == [[0, 1, 2, 3]] * 2
    assert full.valid is None


def test_the_models_generation_config_counts_and_is_not_written() -> None:
    model = new_model()
    model.generation_config.update(max_length=14, cache_implementation="static", top_k=3)
    before = model.generation_config.to_dict()
    assert is_fast(same_as_hf(model, **ROWS, do_sample=True))
    assert is_fast(same_as_hf(model, **ROWS, generation_config=GenerationConfig(num_beams=1)))
    assert model.generation_config.to_dict() == before
