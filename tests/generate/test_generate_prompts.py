"""Prompts that stand in several rows are computed once; each prompt may have its own length."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from generate.same_as_hf import (
    EOS,
    PAD,
    is_fast,
    new_model,
    prompt,
    run,
    same_as_hf,
    shared_model,
)
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from hybrid_fx.errors import InputError
from hybrid_fx.generate.lengths import take_lengths
from hybrid_fx.generate.prompt import distinct, prompt_columns

ROWS = prompt((3, 9, 1, 6))
ENDS = [EOS, *range(5, 20)]


def repeated(rows: dict[str, torch.Tensor], *order: int) -> dict[str, torch.Tensor]:
    """The rows in this order, as a trainer repeats them."""
    return {name: value[list(order)] for name, value in rows.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_rows_with_the_same_prompt_are_prefilled_once(family: str, chunk: int | None) -> None:
    rows = repeated(ROWS, 1, 0, 1, 3, 0, 1)
    asked = {"do_sample": True, "max_new_tokens": 14, "eos_token_id": ENDS, "top_k": 0}
    ran = same_as_hf(shared_model(family), **rows, **asked, prefill_chunk_size=chunk)
    assert is_fast(ran)
    prefills = [call for call in ran.runner.calls if call[1] > 1]
    assert {batch for batch, _, _ in prefills} == {3}


def test_samples_of_one_prompt_share_its_prefill() -> None:
    asked = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 9, "top_k": 0}
    ran = same_as_hf(shared_model("qwen2"), **ROWS, **asked)
    assert is_fast(ran)
    assert ran.runner.calls[0][:2] == (4, 9)
    assert ran.runner.calls[1][:2] == (12, 1)


def test_beams_share_the_prefill_of_their_prompt() -> None:
    ran = same_as_hf(shared_model(), **ROWS, num_beams=3, max_new_tokens=9)
    assert ran.fallbacks == ["HF loop: beam search"]
    assert ran.runner.calls[0][:2] == (4, 9)
    assert ran.runner.calls[1][:2] == (12, 1)


def test_rows_that_differ_in_padding_or_positions_are_not_alike() -> None:
    ids = torch.tensor([[PAD, 5, 6]]).repeat(4, 1)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 1, 1], [1, 1, 1]])
    assert distinct(prompt_columns(ids, mask, None)) == ([0, 1], [0, 1, 0, 1])
    positions = torch.tensor([[0, 1, 2], [0, 1, 2], [1, 2, 3], [0, 1, 2]])
    assert distinct(prompt_columns(ids, None, positions)) == ([0, 2], [0, 0, 1, 0])
    assert distinct(prompt_columns(ids, mask, torch.arange(3)[None])) == ([0, 1], [0, 1, 0, 1])
    ran = same_as_hf(shared_model(), ids, attention_mask=mask, max_new_tokens=5)
    assert ran.runner.calls[0] == (2, 3, 1)


def test_a_call_that_ends_with_its_first_token_repeats_no_rows() -> None:
    ran = same_as_hf(shared_model(), **repeated(ROWS, 1, 1, 1), max_new_tokens=1)
    assert ran.runner.calls == [(1, 9, 1)]


class _Until(StoppingCriteria):
    """Ends row i after ``lengths[i]`` new tokens, as a user of transformers would write it."""

    eos_token_id = None  # so that transformers pads

    def __init__(self, lengths: list[int], width: int) -> None:
        self.ends = torch.tensor(lengths) + width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.ends


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("returns", [1, 2])
@pytest.mark.parametrize("ends", [None, [EOS, 3, 4, 5, 6]])
def test_each_prompt_may_have_a_length(sample: bool, returns: int, ends: list[int] | None) -> None:
    if returns > 1 and not sample:
        return  # refused by transformers
    lengths = [4, 11, 1, 7]
    asked: dict[str, Any] = {"do_sample": sample, "num_return_sequences": returns, "top_k": 0}
    asked |= {"eos_token_id": ends, "pad_token_id": PAD}
    each = [length for length in lengths for _ in range(returns)]
    until = StoppingCriteriaList([_Until(each, 9)])
    torch.manual_seed(0)
    wanted = shared_model().generate(**ROWS, **asked, max_new_tokens=11, stopping_criteria=until)
    state = torch.get_rng_state()
    ran = run(shared_model(), **ROWS, **asked, max_new_tokens=lengths)
    assert is_fast(ran)
    assert torch.equal(ran.result, wanted)
    assert torch.equal(torch.get_rng_state(), state)
    fed = [batch for batch, width, _ in ran.runner.calls if width == 1]
    running = [sum(length > step for length in each) for step in range(1, len(fed) + 1)]
    assert (
        fed == running if ends is None else all(f <= r for f, r in zip(fed, running, strict=True))
    )


def test_lengths_may_be_numbers_and_arrays_of_numpy_and_torch() -> None:
    tensor = torch.tensor([3, 5])
    for given in ([3, 5], (3, 5), tensor, list(tensor), tensor.numpy(), list(tensor.numpy())):
        lengths, rest = take_lengths({"max_new_tokens": given})
        assert lengths == [3, 5]
        assert rest == {"max_new_tokens": 5}
    assert take_lengths({"max_new_tokens": 5}) == (None, {"max_new_tokens": 5})


def test_equal_lengths_are_one_length() -> None:
    asked = {"eos_token_id": None, "pad_token_id": None}
    model = new_model()
    model.generation_config.update(**asked)
    ran = run(model, **ROWS, max_new_tokens=(6, 6, 6, 6), **asked)
    assert torch.equal(ran.result, model.generate(**ROWS, max_new_tokens=6, **asked))


@pytest.mark.parametrize("beside", [{}, {"attention_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])}])
def test_lengths_hold_on_every_way(beside: dict[str, Any]) -> None:
    """Embeddings go by transformers' loop, a mask with holes by the module."""
    model, ids = shared_model(), prompt((3, 3))["input_ids"]
    given = {"input_ids": ids} if beside else {"inputs_embeds": model.get_input_embeddings()(ids)}
    ran = run(model, **given, **beside, max_new_tokens=[2, 5], eos_token_id=None, pad_token_id=PAD)
    assert len(ran.fallbacks) == 1
    width = 3 if beside else 0
    whole = model.generate(**given, **beside, max_new_tokens=5, eos_token_id=None)
    assert torch.equal(ran.result[0, : width + 2], whole[0, : width + 2])
    assert ran.result[0, width + 2 :].tolist() == [PAD] * 3
    assert torch.equal(ran.result[1], whole[1])


def test_lengths_that_do_not_fit_are_refused() -> None:
    plain = new_model()
    plain.generation_config.update(pad_token_id=None, eos_token_id=None)
    lengths = [1, 2, 3, 4]
    refused: list[tuple[dict[str, Any], str]] = [
        ({"max_new_tokens": [1, 2, 3]}, "3 lengths, the prompt has 4 rows"),
        ({"max_new_tokens": [1, 2, 0, 3]}, r"max_new_tokens\[2\] is 0"),
        ({"max_new_tokens": [1, 2.0, 1, 3]}, r"max_new_tokens\[1\] is 2.0"),
        ({"max_new_tokens": [True, 2, 1, 3]}, r"max_new_tokens\[0\] is True"),
        ({"max_new_tokens": lengths, "num_beams": 2}, "this call is beam search"),
        ({"max_new_tokens": lengths}, "pass pad_token_id"),
    ]
    for asked, words in refused:
        with pytest.raises(InputError, match=words):
            run(plain, **ROWS, **asked)
    with pytest.raises(InputError, match=r"max_new_tokens\[3\]=400 .*use max_new_tokens\[3\]<="):
        run(shared_model("gpt2"), **ROWS, max_new_tokens=[1, 2, 3, 400])


@pytest.mark.parametrize("where", ["argument", "config", "positional config", "model"])
def test_lengths_win_over_a_maximum_as_one_length_does(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, lengths = new_model(), [3, 12, 1, 5]
    config = GenerationConfig(max_length=11, pad_token_id=PAD, eos_token_id=None)
    mask = {"attention_mask": ROWS["attention_mask"]}
    args, beside = {
        "argument": ((ROWS["input_ids"],), {"max_length": 11, "eos_token_id": None}),
        "config": ((ROWS["input_ids"],), {"generation_config": config}),
        "positional config": ((ROWS["input_ids"], config), {}),
        "model": ((ROWS["input_ids"],), {"eos_token_id": None}),
    }[where]
    if where == "model":
        model.generation_config.max_length = 11
    plain = run(shared_model(), **ROWS, max_new_tokens=lengths, eos_token_id=None)
    transformers_logger = logging.getLogger("transformers.generation.utils")
    with caplog.at_level(logging.WARNING), _seen_by(caplog.handler, transformers_logger):
        ran = run(model, *args, **mask, **beside, max_new_tokens=lengths)
    assert torch.equal(ran.result, plain.result)
    assert any("`max_new_tokens` will take precedence" in line for line in caplog.messages)


#: The short prompt has the long length; together they would leave the 128 positions of the models.
UNEVEN = prompt((60, 2))
UNEVEN_LENGTHS = [4, 120]


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("stays", [False, True])
def test_a_short_prompt_may_take_the_positions_it_has(family: str, stays: bool) -> None:
    asked: dict[str, Any] = {"eos_token_id": None, "pad_token_id": PAD}
    kept = {"output_scores": True, "return_dict_in_generate": True} if stays else {}
    model = shared_model(family)
    ran = run(model, **UNEVEN, **asked, **kept, max_new_tokens=UNEVEN_LENGTHS)
    assert is_fast(ran)
    found = ran.result.sequences if stays else ran.result
    for row, (length, start) in enumerate(zip(UNEVEN_LENGTHS, (0, 58), strict=True)):
        alone = UNEVEN["input_ids"][row : row + 1, start:]
        wanted = model.generate(alone, **asked, max_new_tokens=length)
        assert torch.equal(found[row, start : 60 + length], wanted[0])


@pytest.mark.parametrize(
    "beside",
    [{"output_hidden_states": True}, {"stop_strings": ["x"]}, {"runner": None}],
    ids=["module", "loop", "not captured"],
)
def test_where_rows_that_ended_go_on_the_positions_of_all_count(beside: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="max_new_tokens=120 after a prompt of 60 tokens"):
        run(shared_model("gpt2"), **UNEVEN, **beside, max_new_tokens=UNEVEN_LENGTHS)


@contextmanager
def _seen_by(handler: logging.Handler, logger: logging.Logger) -> Iterator[None]:
    """Transformers' loggers do not hand on what they are told."""
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
