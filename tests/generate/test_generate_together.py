"""What ranks that generate together agree on: settings, prompts without rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generate.hf_runner import HFRunner
from tiny_models import prompt, tiny
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache
from upstream_names import CACHE

from hybrid_fx.errors import InputError
from hybrid_fx.generate import generate
from hybrid_fx.generate.settings import LENGTHS


class Asked:
    """Runs generates, and keeps what each was asked for."""

    def __init__(self, **options: Any) -> None:
        self.model = tiny("llama")
        self.runner = HFRunner(self.model)
        for name, value in options.items():
            setattr(self.runner, name, value)
        self.said: list[dict[str, str]] = []
        self.ready = 0
        self.fallbacks: list[str] = []

    def __call__(self, **given: Any) -> Any:
        return generate(
            self.model,
            self.made,
            (),
            {"max_new_tokens": 2, **given},
            on_fallback=self.fallbacks.append,
            on_settings=lambda settings: self.said.append(dict(settings)),
        )

    def made(self) -> Any:
        self.ready += 1
        return self.runner


def differing(asked: Asked) -> set[str]:
    """The fields in which the last two generates differ."""
    first, second = asked.said[-2:]
    return {name for name in first | second if first.get(name) != second.get(name)}


def test_lengths_and_prompts_may_differ() -> None:
    asked = Asked()
    asked(**prompt([3, 2]), max_new_tokens=2)
    asked(**prompt([4], seed=1), max_new_tokens=3, min_new_tokens=1)
    assert differing(asked) == set()
    assert not LENGTHS & set(asked.said[0])


def test_a_config_says_what_its_fields_given_one_by_one_say() -> None:
    asked = Asked()
    asked(**prompt([3]), temperature=0.5, do_sample=True)
    config = GenerationConfig(temperature=0.5, do_sample=True, max_new_tokens=2)
    asked(**prompt([3]), generation_config=config)
    assert differing(asked) == set()


class _Keeps:
    def __call__(self, ids: Any, scores: Any) -> Any:
        return scores


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"do_sample": True}, {"do_sample", "mode"}),
        ({"repetition_penalty": 1.2}, {"repetition_penalty"}),
        ({"num_beams": 2}, {"num_beams", "mode"}),
        ({"eos_token_id": 7, "pad_token_id": 0}, {"eos_token_id", "pad_token_id"}),
        ({"logits_processor": [_Keeps()]}, {"logits_processor"}),
    ],
)
def test_other_settings_are_told_by_name(changes: dict[str, Any], fields: set[str]) -> None:
    asked = Asked()
    asked(**prompt([3]))
    asked(**{**prompt([3]), **changes})
    assert differing(asked) >= fields - {"pad_token_id"}
    assert len(differing(asked)) <= 2


def test_a_prompt_without_rows_gives_none_and_takes_part() -> None:
    asked = Asked()
    ids = torch.zeros(0, 3, dtype=torch.int64)
    for changes in ({}, {"num_beams": 2}, {"do_sample": True}):
        assert asked(input_ids=ids, **changes).shape == (0, 3)
    assert asked.ready == 3
    result = asked(input_ids=ids, return_dict_in_generate=True, output_logits=True)
    assert (result.sequences.shape, result.logits, result.scores) == ((0, 3), (), None)
    with pytest.raises(InputError, match="empty"):
        asked(input_ids=ids[:, :0])
    with pytest.raises(InputError, match="empty"):
        generate(asked.model, asked.runner, (), {"input_ids": ids}, on_fallback=print)


def test_a_callers_cache_goes_to_the_module_where_sessions_hold_no_keys() -> None:
    cached = {**prompt([4]), CACHE: DynamicCache()}
    kept = Asked()
    kept(**cached)
    assert kept.fallbacks == [f"HF loop: {CACHE}"]
    asked = Asked(holds_keys=False)
    expected = asked.model.generate(**prompt([4]), max_new_tokens=2, do_sample=False)
    found = asked(**{**cached, CACHE: DynamicCache()})
    assert torch.equal(found, expected)
    assert asked.fallbacks[0].startswith("HF module: the model's generation loop asks its forward")
    assert f"{CACHE}, of which each rank would hold a part" in asked.fallbacks[0]
