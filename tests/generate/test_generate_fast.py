"""The fast loop gives the tokens, scores, warnings and random state of transformers."""

from __future__ import annotations

import functools
import logging
import warnings
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
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer

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


def test_the_models_generation_config_counts_and_is_not_written() -> None:
    model = new_model()
    model.generation_config.update(max_length=14, cache_implementation="static", top_k=3)
    before = model.generation_config.to_dict()
    assert is_fast(same_as_hf(model, **ROWS, do_sample=True))
    assert is_fast(same_as_hf(model, **ROWS, generation_config=GenerationConfig(num_beams=1)))
    assert model.generation_config.to_dict() == before


class _Shift(LogitsProcessor):
    """Prefers a token after the one before it; keeps what it saw."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids.view(-1).tolist())
        return scores + torch.nn.functional.one_hot((input_ids[:, -1] + 1) % VOCAB, VOCAB) * 5


class _After(StoppingCriteria):
    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        rows = torch.arange(len(input_ids))
        return input_ids.shape[1] >= self.count + rows


def test_custom_processors_and_criteria_run_on_the_fast_path() -> None:
    def make() -> dict[str, Any]:
        return {
            "logits_processor": LogitsProcessorList([_Shift()]),
            "stopping_criteria": StoppingCriteriaList([_After(13)]),
        }

    ran = same_as_hf(shared_model(), **ROWS, max_new_tokens=20, do_sample=True, make=make)
    assert is_fast(ran)
    assert ran.result.shape == (4, 16)


def test_allowed_tokens_by_prefix_are_kept() -> None:
    def even(row: int, ids: torch.Tensor) -> list[int]:
        return list(range(row % 2, VOCAB, 2))

    ran = same_as_hf(
        shared_model(), **ROWS, max_new_tokens=6, eos_token_id=None, prefix_allowed_tokens_fn=even
    )
    assert is_fast(ran)
    assert (ran.result[1, 9:] % 2 == 1).all()


class _Log(BaseStreamer):
    def __init__(self) -> None:
        self.events: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.events.append(value.tolist())

    def end(self) -> None:
        self.events.append("end")


def test_a_streamer_hears_what_it_hears_from_hf() -> None:
    by_hf, by_us = _Log(), _Log()
    streamers = iter([by_hf, by_us])
    ran = same_as_hf(
        shared_model(), **prompt((4,)), max_new_tokens=7, make=lambda: {"streamer": next(streamers)}
    )
    assert is_fast(ran)
    assert by_us.events == by_hf.events
    assert by_us.events[-1] == "end"


@pytest.mark.parametrize("sample", [False, True])
def test_the_output_object_holds_scores_and_logits(sample: bool) -> None:
    ran = same_as_hf(
        shared_model("qwen2"),
        **ROWS,
        do_sample=sample,
        top_k=4,
        max_new_tokens=5,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert is_fast(ran)
    assert len(ran.result.scores) == len(ran.result.logits) == ran.result.sequences.shape[1] - 9


def test_without_a_cache_the_output_object_has_none() -> None:
    ran = same_as_hf(
        shared_model(), **ROWS, max_new_tokens=3, return_dict_in_generate=True, use_cache=False
    )
    assert ran.result.past_key_values is None


def test_a_long_prompt_is_fed_in_the_chunks_asked_for() -> None:
    ran = same_as_hf(shared_model(), **ROWS, max_new_tokens=4, prefill_chunk_size=4)
    assert is_fast(ran)
    assert ran.runner.calls[:3] == [(4, 4, 1), (4, 4, 1), (4, 1, 1)]


def test_arguments_hf_refuses_are_refused_in_its_words() -> None:
    refused: list[dict[str, Any]] = [
        {"max_new_token": 5},
        {"temperature": -1.0, "do_sample": True},
        {"num_return_sequences": 3},
        {"max_length": 4},
        {"stopping_criteria": 7},
        {"cache_implementation": "statik"},
        {"inputs": ROWS["input_ids"]},
    ]
    for kwargs in refused:
        with pytest.raises(Exception) as by_hf:
            shared_model().generate(**ROWS, **kwargs)
        with pytest.raises(type(by_hf.value)) as by_us:
            run(shared_model(), **ROWS, **kwargs)
        assert str(by_us.value) == str(by_hf.value)


def test_the_warnings_are_hfs() -> None:
    model, told = new_model(), []
    model.generation_config.pad_token_id = None
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    ids = prompt((4, 4))["input_ids"]
    try:
        for kwargs in ({"temperature": 0.5}, {"max_new_tokens": 3, "max_length": 9}, {"top_k": 3}):
            heard = []
            for call in (model.generate, functools.partial(run, model)):
                told.clear()
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    call(ids, **kwargs)
                heard.append((list(told), [str(warning.message) for warning in caught]))
            # What HF says once in a process it said in its own call.
            assert set(heard[1][0]) <= set(heard[0][0])
            assert heard[1][1] == heard[0][1]
            assert len(heard[1][0]) == len(set(heard[1][0])) > 0
    finally:
        logger.removeHandler(handler)
