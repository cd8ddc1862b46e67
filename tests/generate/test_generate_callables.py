"""What callers plug into the fast loop, what it returns, and what it warns of and refuses."""

from __future__ import annotations

import functools
import logging
import warnings
from typing import Any

import pytest
import torch
from generate.same_as_hf import VOCAB, is_fast, new_model, prompt, run, same_as_hf, shared_model
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from upstream_names import CACHE

ROWS = prompt((3, 9, 1, 6))


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
    assert getattr(ran.result, CACHE) is None


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
