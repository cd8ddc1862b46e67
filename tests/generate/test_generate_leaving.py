"""Rows that have finished leave the batch, and the tokens of the others stay those of HF."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generate.same_as_hf import (
    EOS,
    PAD,
    VOCAB,
    Ran,
    is_fast,
    new_model,
    prompt,
    run,
    same_as_hf,
    shared_model,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import (
    ExponentialDecayLengthPenalty,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    WatermarkingConfig,
)
from transformers.generation import logits_process

from hybrid_fx.generate.running import closed_up
from hybrid_fx.generate.staying import PROCESSORS, of_rows

ROWS = prompt((3, 9, 1, 6, 4, 7))
#: Tokens that end a row: a random model says one of them every few steps.
ENDS = [EOS, *range(5, 20)]
#: Settings that ban tokens, and whether a penalty of lengths leaves a ban as it is. That of
#: transformers 5.17 makes NaN of it, and generate draws from that.
BANS = {"min_new_tokens", "no_repeat_ngram_size", "bad_words_ids"}
_LONGER = ExponentialDecayLengthPenalty((2, 1.3), 0, 1)
BAN_HOLDS = not _LONGER(torch.zeros(1, 9), torch.tensor([[-torch.inf, 0.0]])).isnan().any()


def _penalty(factor: float, begins: torch.Tensor) -> LogitsProcessor:
    """A repetition penalty that leaves out as many tokens of each row, [B]."""
    try:
        return RepetitionPenaltyLogitsProcessor(factor, prompt_ignore_length=begins)
    except ValueError:
        pytest.skip("transformers 5.17 takes one prompt_ignore_length for all rows")


def rows_fed(ran: Ran) -> list[int]:
    """The rows of each decode step."""
    return [batch for batch, width, _ in ran.runner.calls if width == 1]


def rows_running(tokens: torch.Tensor, ends: list[int]) -> list[int]:
    """How many rows of new tokens ``[B, new]`` had not ended before each further step."""
    ended = torch.isin(tokens, torch.tensor(ends)).cumsum(1) > 0
    return (~ended).sum(0).tolist()[:-1]


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_a_row_that_has_ended_is_fed_no_more(family: str, sample: bool) -> None:
    asked = {"max_new_tokens": 24, "do_sample": sample, "eos_token_id": ENDS, "top_k": 0}
    ran = same_as_hf(shared_model(family), **ROWS, **asked)
    assert is_fast(ran)
    new = ran.result[:, 9:]
    wanted = rows_running(new, ENDS)
    assert rows_fed(ran) == wanted
    assert len(set(wanted)) > 1  # rows did end at different steps


@given(
    family=st.sampled_from(["llama", "qwen2", "mistral"]),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    returns=st.integers(1, 3),
    ends=st.lists(st.integers(0, VOCAB - 1), min_size=4, max_size=30, unique=True),
    settings=st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.sampled_from([0.7, 1.5]),
            "top_k": st.sampled_from([0, 5]),
            "top_p": st.sampled_from([0.5, 0.9]),
            "repetition_penalty": st.sampled_from([0.8, 1.3]),
            "no_repeat_ngram_size": st.just(2),
            "min_new_tokens": st.integers(1, 4),
            "bad_words_ids": st.just([[7], [8, 9]]),
            "exponential_decay_length_penalty": st.just((2, 1.3)),
        },
    ),
    seed=st.integers(0, 5),
)
def test_whatever_ends_rows_the_draws_are_hfs(
    family: str,
    lengths: list[int],
    returns: int,
    ends: list[int],
    settings: dict[str, Any],
    seed: int,
) -> None:
    assume(
        BAN_HOLDS or "exponential_decay_length_penalty" not in settings or not BANS & {*settings}
    )
    asked = {"do_sample": True, "max_new_tokens": 10, "eos_token_id": ends, "pad_token_id": PAD}
    ran = same_as_hf(
        shared_model(family),
        **prompt(tuple(lengths), seed),
        **asked,
        **settings,
        num_return_sequences=returns,
        seed=seed,
    )
    assert is_fast(ran)
    new = ran.result[:, max(lengths) :]
    fed = [batch for batch, _, _ in ran.runner.calls][1:]
    assert fed == rows_running(new, ends)


class _Same(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert len(input_ids) == len(scores) == 6
        return scores


class _Cooler(TemperatureLogitsWarper):
    """A subclass of one of transformers' own: nobody knows what it looks at."""


class _Never(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(len(input_ids), dtype=torch.bool)


def _even(row: int, ids: torch.Tensor) -> list[int]:
    return list(range(row % 2, VOCAB, 2))


LOOKS_ACROSS: dict[str, Any] = {
    "processor": lambda: {"logits_processor": LogitsProcessorList([_Same()])},
    "subclass": lambda: {"logits_processor": LogitsProcessorList([_Cooler(0.8)])},
    "criterion": lambda: {"stopping_criteria": StoppingCriteriaList([_Never()])},
    "prefix": lambda: {"prefix_allowed_tokens_fn": _even},
    "watermark": lambda: {"watermarking_config": WatermarkingConfig(bias=1.0)},
    "encoder": lambda: {"encoder_repetition_penalty": 1.3},
    "encoder n-grams": lambda: {"encoder_no_repeat_ngram_size": 2},
    "scores": lambda: {"return_dict_in_generate": True, "output_scores": True},
    "logits": lambda: {"return_dict_in_generate": True, "output_logits": True},
}


@pytest.mark.parametrize("name", LOOKS_ACROSS)
def test_rows_stay_where_something_may_look_across_them(name: str) -> None:
    ran = same_as_hf(
        shared_model(),
        **ROWS,
        max_new_tokens=14,
        do_sample=True,
        eos_token_id=ENDS,
        make=LOOKS_ACROSS[name],
    )
    assert is_fast(ran)
    sequences = getattr(ran.result, "sequences", ran.result)
    assert min(rows_running(sequences[:, 9:], ENDS)) < 6
    assert set(rows_fed(ran)) == {6}


def test_processors_of_transformers_given_by_the_user_let_rows_leave() -> None:
    def make() -> dict[str, Any]:
        return {
            "logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.8)]),
            "stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(20)]),
        }

    ran = same_as_hf(shared_model(), **ROWS, max_new_tokens=14, eos_token_id=ENDS, make=make)
    assert min(rows_fed(ran)) < 6


def _processors() -> dict[str, LogitsProcessor]:
    """One of each kind that is said to treat rows alone, as this transformers has them."""
    ends = torch.tensor([EOS, 7])
    made: dict[str, Any] = {
        "TemperatureLogitsWarper": (0.7,),
        "TopKLogitsWarper": (5,),
        "TopPLogitsWarper": (0.6,),
        "TopHLogitsWarper": (0.6,),
        "MinPLogitsWarper": (0.1,),
        "TypicalLogitsWarper": (0.6,),
        "EpsilonLogitsWarper": (0.02,),
        "EtaLogitsWarper": (0.02,),
        "RepetitionPenaltyLogitsProcessor": (1.3,),
        "NoRepeatNGramLogitsProcessor": (2,),
        "MinLengthLogitsProcessor": (50, ends),
        "MinNewTokensLengthLogitsProcessor": (3, 50, ends),
        "SequenceBiasLogitsProcessor": ([[[3], 2.0], [[4, 5], -3.0]],),
        "NoBadWordsLogitsProcessor": ([[3], [4, 5]], ends),
        "ForcedBOSTokenLogitsProcessor": (1,),
        "ForcedEOSTokenLogitsProcessor": (13, ends),
        "SuppressTokensLogitsProcessor": ([3, 4],),
        "SuppressTokensAtBeginLogitsProcessor": ([3, 4], 12),
        "ExponentialDecayLengthPenalty": ((2, 1.3), ends, 4),
        "InfNanRemoveLogitsProcessor": (),
        "LogitNormalization": (),
    }
    assert set(made) == set(PROCESSORS)
    kinds = {name: getattr(logits_process, name, None) for name in made}
    return {name: kind(*made[name]) for name, kind in kinds.items() if kind is not None}


@pytest.mark.parametrize("name", sorted(PROCESSORS))
def test_a_processor_that_is_said_to_treat_rows_alone_does(name: str) -> None:
    processor = _processors().get(name)
    if processor is None:
        pytest.skip(f"this transformers has no {name}")
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 7, (6, 12), generator=draw)
    scores = torch.randn(6, VOCAB, generator=draw) * 2
    scores[1, ::3] = -torch.inf
    rows = torch.tensor([4, 1, 0])
    alone = processor(ids[rows], scores[rows])
    assert torch.equal(alone, processor(ids, scores.clone())[rows])


@pytest.mark.parametrize("returns", [1, 2])
def test_a_penalty_that_skips_each_rows_padding_follows_the_rows(returns: int) -> None:
    skipped = torch.tensor([9, 0, 9, 0, 9, 0]).repeat_interleave(returns)

    def make() -> dict[str, Any]:
        return {"logits_processor": LogitsProcessorList([_penalty(9.0, skipped.clone())])}

    asked = {"max_new_tokens": 30, "eos_token_id": ENDS[:5], "do_sample": True, "top_k": 0}
    ran = same_as_hf(shared_model(), **ROWS, **asked, num_return_sequences=returns, make=make)
    assert min(rows_fed(ran)) < 6 * returns


def test_a_penalty_of_some_rows_is_theirs_and_the_callers_stays() -> None:
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (6, 12), generator=draw)
    scores = torch.randn(6, VOCAB, generator=draw)
    begins = torch.tensor([6, 0, 8, 3, 5, 2])
    given = LogitsProcessorList([TemperatureLogitsWarper(0.8), _penalty(1.9, begins)])
    rows = torch.tensor([5, 2, 1])
    found = of_rows(given, rows)(ids[rows], scores[rows])
    assert torch.equal(found, given(ids, scores)[rows])
    assert given[1].prompt_ignore_length is begins


def test_the_last_rows_fill_the_holes_and_the_others_stay() -> None:
    assert closed_up([True, False, True, True, False, True]) == [0, 5, 2, 3]
    assert closed_up([True, True]) == [0, 1]
    assert closed_up([False, False, True]) == [2]
    assert closed_up([False, False]) == []


def test_bfloat16_rows_leave_too() -> None:
    model = new_model("qwen2").bfloat16()
    asked = {"max_new_tokens": 20, "eos_token_id": ENDS, "do_sample": True, "top_k": 0}
    ran = run(model, **ROWS, **asked)
    assert is_fast(ran)
    new = ran.result[:, 9:]
    assert rows_fed(ran) == rows_running(new, ENDS)
    ended = torch.isin(new, torch.tensor(ENDS)).cumsum(1)
    assert (new[ended > 1] == PAD).all()
    assert min(rows_fed(ran)) < 6
