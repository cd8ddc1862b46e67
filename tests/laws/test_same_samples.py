"""Law 2: sampling under one seed gives HF's tokens and leaves the random state as HF leaves it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from laws.against_hf import same_tokens
from tiny_models import FAMILIES, prompt, reweigh, tiny

import hybrid_fx

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "temperature": {"temperature": 0.7, "top_k": 0},
    "hot": {"temperature": 1.9},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8, "top_k": 0},
    "min_p": {"min_p": 0.1, "top_k": 0},
    "repetition": {"repetition_penalty": 1.3},
    "temperature and top_p": {"temperature": 0.7, "top_p": 0.9},
    "all": {
        "temperature": 1.2,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
    },
}
LENGTHS = ((1,), (5, 2), (1, 9, 4), (7, 1, 2, 6, 3, 1, 8, 4))


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request: pytest.FixtureRequest) -> Iterator[Any]:
    with hybrid_fx.hybridize(tiny(request.param)) as engine:
        yield engine
        assert engine.stats.counters["hf_forwards"] == 0
        assert not engine.stats.fallbacks


@pytest.mark.parametrize("name", SETTINGS)
def test_samples_and_random_state_are_those_of_transformers(engine: Any, name: str) -> None:
    for seed, lengths in enumerate(LENGTHS):
        reweigh(engine.module, seed + 20)
        torch.manual_seed(seed)
        same_tokens(
            engine, **prompt(lengths, seed), do_sample=True, max_new_tokens=12, **SETTINGS[name]
        )


def test_rows_that_end_early_still_draw(engine: Any) -> None:
    call = prompt((4, 1, 6), 2) | {"do_sample": True, "max_new_tokens": 25, "pad_token_id": 0}
    torch.manual_seed(0)
    same_tokens(engine, **call, eos_token_id=list(range(3, 12)))
    same_tokens(engine, **call, eos_token_id=list(range(3, 12)), num_return_sequences=3)


def test_greedy_leaves_the_random_state(engine: Any) -> None:
    state = torch.get_rng_state()
    engine.generate(**prompt((4, 1)), max_new_tokens=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_first_generate_draws_nothing_for_capture_and_probe() -> None:
    model = tiny("llama", layers=1)
    state = torch.get_rng_state()
    with hybrid_fx.hybridize(model, disk_cache=False) as engine:
        engine.explain()
        assert engine.stats.counters["captures"] == 1
        assert torch.equal(torch.get_rng_state(), state)
        same_tokens(engine, **prompt((3, 1)), do_sample=True, max_new_tokens=6)
