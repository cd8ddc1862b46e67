"""Law 2: a model into which adapters were put generates with them, whoever put them there."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from laws.against_hf import hf_generate
from tiny_models import adapted, prompt, randomize_adapters, tiny
from upstream_names import adapters_of_transformers

import hybrid_fx

CALL = prompt((5, 1, 3), 2) | {"max_new_tokens": 10, "do_sample": False}


def tokens(model: Any) -> list[list[int]]:
    """Those of transformers' own generate of this very model."""
    found: list[list[int]] = hf_generate(model, **CALL).tolist()
    return found


def two_adapters() -> Any:
    model = adapted(tiny("llama", layers=1))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    randomize_adapters(model, 11, size=0.3)
    return model


def test_the_base_model_of_a_peft_model_generates_with_its_adapters() -> None:
    peft_model = two_adapters()
    model = peft_model.get_base_model()
    seen = []
    with hybrid_fx.hybridize(model) as engine:
        for change in (
            lambda: None,
            lambda: peft_model.set_adapter("other"),
            lambda: peft_model.base_model.set_adapter(["default", "other"]),
            lambda: peft_model.base_model.disable_adapter_layers(),
            lambda: peft_model.base_model.enable_adapter_layers(),
            lambda: randomize_adapters(model, 3, size=0.5),
        ):
            change()
            seen.append(engine.generate(**CALL).tolist())
            assert seen[-1] == tokens(model)
        assert engine.stats.fallbacks == {}
        assert engine.stats.counters["hf_forwards"] == 0
    assert len({str(each) for each in seen}) == 5, "enabled again gives what was there before"


@adapters_of_transformers
def test_adapters_that_transformers_put_into_a_model_are_followed() -> None:
    model = tiny("llama", layers=1)
    with hybrid_fx.hybridize(model) as engine:
        plain = engine.generate(**CALL).tolist()
        model.add_adapter(peft.LoraConfig(r=4, target_modules="all-linear"))
        randomize_adapters(model, 3, size=0.3)
        assert engine.generate(**CALL).tolist() == tokens(model) != plain
        model.disable_adapters()
        assert engine.generate(**CALL).tolist() == tokens(model) == plain
        assert engine.stats.fallbacks == {}


def test_the_base_model_of_prompt_learning_generates_without_it() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny("llama", layers=1), config).eval().get_base_model()
    with hybrid_fx.hybridize(model) as engine:
        assert engine.generate(**CALL).tolist() == tokens(model)
        assert engine.stats.fallbacks == {}


@pytest.mark.parametrize("active", [True, False])
def test_an_activated_lora_runs_the_module_while_it_is_active(active: bool) -> None:
    peft_model = adapted(tiny("llama", layers=1), alora_invocation_tokens=[5, 6])
    peft_model.add_adapter("plain", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    randomize_adapters(peft_model, 11, size=0.3)
    peft_model.set_adapter("default" if active else "plain")
    model = peft_model.get_base_model()
    with hybrid_fx.hybridize(model) as engine:
        assert engine.generate(**CALL).tolist() == tokens(model)
        assert any("activated LoRA" in why for why in engine.stats.fallbacks) == active


def test_training_the_base_model_of_a_peft_model_reaches_what_it_generates() -> None:
    model = adapted(tiny("llama", layers=1)).get_base_model()
    factors = [p for name, p in model.named_parameters() if "lora_" in name]
    optimizer = torch.optim.SGD(factors, lr=5.0)
    with hybrid_fx.hybridize(model) as engine:
        before = engine.generate(**CALL).tolist()
        engine.train()
        ids = CALL["input_ids"]
        engine(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        engine.eval()
        assert engine.generate(**CALL).tolist() == tokens(model) != before
