"""Any mixture of settings: the same tokens and random state as transformers, or its error."""

from __future__ import annotations

from typing import Any

import torch
from generate.same_as_hf import FAMILIES, VOCAB, assert_same, prompt, run, shared_model
from hypothesis import given
from hypothesis import strategies as st

SETTINGS = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(1, 8), "do_sample": st.booleans()},
    optional={
        "num_beams": st.sampled_from([1, 1, 2, 3]),
        "num_return_sequences": st.integers(1, 3),
        "temperature": st.floats(0.3, 2.0),
        "top_k": st.integers(1, 10),
        "top_p": st.floats(0.2, 1.0),
        "min_p": st.floats(0.0, 0.5),
        "repetition_penalty": st.floats(0.8, 2.0),
        "no_repeat_ngram_size": st.integers(1, 3),
        "min_new_tokens": st.integers(1, 6),
        "eos_token_id": st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20, unique=True),
        "pad_token_id": st.integers(0, VOCAB - 1),
        "use_cache": st.booleans(),
        "prefill_chunk_size": st.integers(1, 5),
        "return_dict_in_generate": st.booleans(),
        "output_scores": st.booleans(),
        "bad_words_ids": st.lists(st.lists(st.integers(3, 60), min_size=1, max_size=2), min_size=1),
    },
)


def outcome(call: Any) -> Any:
    """What a call returns or raises, and the random state it leaves."""
    torch.manual_seed(7)
    try:
        return call(), torch.get_rng_state()
    except (ValueError, RuntimeError) as error:
        return error, None


@given(
    family=st.sampled_from(FAMILIES),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    settings=SETTINGS,
    seed=st.integers(0, 3),
)
def test_any_settings_give_what_hf_gives(
    family: str, lengths: list[int], settings: dict[str, Any], seed: int
) -> None:
    model, rows = shared_model(family), prompt(tuple(lengths), seed)
    expected, state = outcome(lambda: model.generate(**rows, **settings))
    result, left = outcome(lambda: run(model, **rows, **settings, seed=7).result)
    if isinstance(expected, Exception):
        assert (type(result), str(result)) == (type(expected), str(expected))
        return
    assert_same(result, expected)
    assert torch.equal(left, state)
