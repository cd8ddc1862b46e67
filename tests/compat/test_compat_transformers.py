"""What is assumed of transformers: read from it where it can be, and said where it cannot."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

from hybrid_fx.compat import transformers as compat


def held(layers: int = 2) -> tuple[Cache, Cache]:
    """A cache of ours, and one of transformers with as many layers."""
    return compat.HeldCache(layers), Cache(layers=[DynamicLayer() for _ in range(layers)])


def test_a_held_cache_says_of_itself_what_a_dynamic_one_says() -> None:
    ours, theirs = held()
    asked = [n for n, value in vars(Cache).items() if isinstance(value, property)]
    assert {"is_sliding", "is_compileable"} <= set(asked)
    for name in asked:
        if name != "batch_size" or hasattr(theirs, name):
            assert getattr(ours, name) == getattr(theirs, name), name
    assert (len(ours), ours.get_seq_length()) == (2, 0)


def test_what_generate_calls_a_cache_is_what_forwards_call_it() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2,
        )
    )  # fmt: skip
    name = compat.cache_argument()
    assert name in inspect.signature(model.forward).parameters
    cache = DynamicCache(config=model.config)
    output = model(torch.tensor([[1, 2]]), **{name: cache})
    assert output[compat.output_cache_name(type(output)) or ""] is cache
    mine = compat.forward_output(output.logits, cache)
    assert list(mine) == list(output)
    assert compat.loop_fault() is None


def test_names_that_cannot_be_read_are_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def renamed(self: Any, input_ids: Any, memory: Any = None) -> None: ...

    mixin = SimpleNamespace(prepare_inputs_for_generation=renamed)
    monkeypatch.setattr(compat, "GenerationMixin", mixin)
    said = compat.loop_fault.__wrapped__()
    assert "prepares the inputs of a forward from self, input_ids, memory: none of them is" in said
    assert compat.cache_argument.__wrapped__() == "cache"


def test_an_output_without_a_known_field_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Output(dict[str, Any]):
        __dataclass_fields__ = ("logits", "memory")

    monkeypatch.setattr(compat, "CausalLMOutputWithPast", Output)
    assert compat.loop_fault.__wrapped__().startswith("Output of transformers ")
    assert compat.forward_output(1, 2) == {"logits": 1}


@pytest.mark.parametrize(
    ("current", "given", "taken"),
    [
        ("cache", {"past_key_values": 1, "top_k": 2}, {"cache": 1, "top_k": 2}),
        ("cache", {"cache_params": 1}, {"cache": 1}),
        ("cache", {"cache": 1, "past_key_values": 2}, {"cache": 1}),
        ("past_key_values", {"cache_params": 1}, {"cache_params": 1}),
        ("past_key_values", {"past_key_values": 1}, {"past_key_values": 1}),
    ],
)
def test_former_names_give_way(
    monkeypatch: pytest.MonkeyPatch, current: str, given: Any, taken: Any
) -> None:
    monkeypatch.setattr(compat, "cache_argument", lambda: current)
    assert compat.under_current_names(given) == taken
