"""Bad input gets a clear error at the front door, and nothing is lost by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from laws.against_hf import hf_generate
from tiny_models import POSITIONS, VOCAB, prompt, tiny

import hybrid_fx

CALL = prompt((4, 1, 7), 6) | {"max_new_tokens": 5}


def encoder() -> Any:
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8}
    depth = {"num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.BertModel(transformers.BertConfig(**sizes, **depth))


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("a name", "str"),
        (None, "NoneType"),
        (torch.nn.Linear, "type"),
    ],
)
def test_what_is_no_module_is_refused_by_name(what: Any, named: str) -> None:
    with pytest.raises(hybrid_fx.InputError, match=f"got a {named}"):
        hybrid_fx.hybridize(what)


@pytest.mark.parametrize(
    "make", [encoder, lambda: torch.nn.Linear(2, 2), lambda: tiny("llama").model]
)
def test_what_cannot_generate_is_refused_and_left_alone(make: Any) -> None:
    model = make()
    before = sorted(vars(model))
    with pytest.raises(hybrid_fx.InputError, match=f"{type(model).__name__} does not generate"):
        hybrid_fx.hybridize(model)
    assert sorted(vars(model)) == before


def test_unknown_options_name_the_nearest() -> None:
    model = tiny("gpt2", layers=1)
    with pytest.raises(hybrid_fx.ConfigError, match="did you mean 'max_out_tokens'"):
        hybrid_fx.hybridize(model, max_out_token=5)
    with pytest.raises(hybrid_fx.ConfigError, match="did you mean 'release_inference_cache'"):
        hybrid_fx.hybridize(model, {"release_cache": True})
    with pytest.raises(hybrid_fx.ConfigError, match=r"lora='folded'.*auto, fold, side"):
        hybrid_fx.hybridize(model, lora="folded")
    assert "generate" not in vars(model)


ROW = torch.tensor([[3, 4, 5]])
# Name -> (arguments, what the message must say).
CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "too many tokens": (
        {"input_ids": ROW, "max_new_tokens": POSITIONS},
        rf"max_new_tokens={POSITIONS}.*{POSITIONS}: use max_new_tokens<={POSITIONS - 2}",
    ),
    "id too large": ({"input_ids": torch.tensor([[3, VOCAB]])}, rf"\[0, 1\] is {VOCAB}.*resize"),
    "negative id": ({"input_ids": torch.tensor([[3, -100]])}, "is -100.*pad"),
    "mask too short": (
        {"input_ids": ROW, "attention_mask": torch.ones(1, 2, dtype=torch.int64)},
        r"\[1, 2\].*\[1, 3\]",
    ),
    "mask of one dimension": (
        {"input_ids": ROW, "attention_mask": torch.ones(3, dtype=torch.int64)},
        r"\[3\].*\[1, 3\]",
    ),
    "positions too short": (
        {"input_ids": ROW, "position_ids": torch.tensor([[0, 1]])},
        r"position_ids has shape \[1, 2\]",
    ),
    "no batch": ({"input_ids": torch.tensor([3, 4])}, r"input_ids\[None\]"),
    "empty": ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "empty"),
    "floats": ({"input_ids": torch.rand(1, 3)}, "float32.*int64"),
    "a list": ({"input_ids": [[3, 4]]}, "list.*tensor"),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_calls_are_refused_before_any_work_and_nothing_is_lost(name: str) -> None:
    arguments, message = CALLS[name]
    model = tiny("gpt2", layers=1)
    with hybrid_fx.hybridize(model) as engine:
        for serve in (engine.generate, model.generate):
            with pytest.raises(hybrid_fx.InputError, match=message):
                serve(**{"max_new_tokens": 2, **arguments})
        assert engine.stats.counters["captures"] == engine.stats.counters["prepares"] == 0
        assert engine.generate(**CALL).tolist() == hf_generate(model, **CALL).tolist()
        engine.train()
        with pytest.raises(hybrid_fx.InputError, match=message):
            engine.generate(**{"max_new_tokens": 2, **arguments})
        assert all(module.training for module in model.modules())
        engine(input_ids=ROW, labels=ROW).loss.backward()
        model.eval()
        assert engine.generate(**CALL).tolist() == hf_generate(model, **CALL).tolist()


def test_the_last_position_can_be_used() -> None:
    model = tiny("gpt2", layers=1)
    call = {"input_ids": ROW, "max_new_tokens": POSITIONS - 2}
    with hybrid_fx.hybridize(model) as engine:
        assert engine.generate(**call).tolist() == hf_generate(model, **call).tolist()
        with pytest.raises(hybrid_fx.InputError):
            engine.generate(input_ids=ROW, max_new_tokens=POSITIONS - 1)


def test_an_argument_that_transformers_refuses_raises_its_error() -> None:
    model = tiny("gpt2", layers=1)
    with hybrid_fx.hybridize(model) as engine:
        with pytest.raises(ValueError, match="model_kwargs") as theirs:
            hf_generate(model, **CALL, no_such_option=1)
        with pytest.raises(type(theirs.value)) as ours:
            engine.generate(**CALL, no_such_option=1)
        assert str(ours.value) == str(theirs.value)
        assert engine.generate(**CALL).tolist() == hf_generate(model, **CALL).tolist()
