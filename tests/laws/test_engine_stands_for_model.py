"""What is set on an engine is set on its model, or refused; an engine drafts as its model does."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tiny_models import adapted, prompt, tiny
from torch import nn
from transformers import GenerationConfig

import hybrid_fx

PROMPT: dict[str, Any] = prompt([5, 3])
SIX = {"max_new_tokens": 6, "do_sample": False}
THREE = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def by_transformers(model: Any, **given: Any) -> torch.Tensor:
    """What the model gives once nothing of the engine is on it."""
    assert "generate" not in vars(model)
    found: torch.Tensor = model.eval().generate(**given)
    return found


def test_a_generation_config_set_on_the_engine_is_the_models_and_counts() -> None:
    model = tiny("llama")
    with hybrid_fx.hybridize(model) as engine:
        assert engine.generate(**PROMPT, **SIX).shape == (2, 11)
        given = engine.generation_config = GenerationConfig(**THREE)
        assert model.generation_config is given is engine.generation_config
        tokens = engine.generate(**PROMPT)
    assert tokens.shape == (2, 8)
    assert torch.equal(tokens, by_transformers(model, **PROMPT))


def test_a_generation_config_set_on_an_engine_reaches_through_an_adapted_model() -> None:
    pytest.importorskip("peft", reason="needs peft: pip install 'hybrid_fx[peft]'")
    for task, own in ((None, False), ("CAUSAL_LM", False), ("CAUSAL_LM", True)):
        model = adapted(tiny("llama"), task_type=task)
        if own:
            model.generation_config = GenerationConfig(max_new_tokens=5)
        with hybrid_fx.hybridize(model) as engine:
            engine.generation_config = GenerationConfig(**THREE)
            tokens = engine.generate(**PROMPT)
        assert tokens.shape == (2, 8)
        assert torch.equal(tokens, by_transformers(model, **PROMPT))


@pytest.mark.parametrize("lora", [False, True])
def test_a_head_set_on_the_engine_is_generated_from(lora: bool) -> None:
    if lora:
        pytest.importorskip("peft", reason="needs peft: pip install 'hybrid_fx[peft]'")
    model: Any = adapted(tiny("llama")) if lora else tiny("llama")
    with hybrid_fx.hybridize(model) as engine:
        before = engine.generate(**PROMPT, **SIX)
        old = engine.lm_head
        torch.manual_seed(5)
        engine.lm_head = nn.Linear(old.in_features, old.out_features, bias=False)
        causal = model.get_base_model() if lora else model
        assert engine.lm_head is causal.lm_head is not old
        assert len([name for name, _ in model.named_modules() if "lm_head" in name]) == 1
        tokens = engine.generate(**PROMPT, **SIX)
        assert engine.stats.counters["hf_forwards"] == 0
    assert not torch.equal(tokens, before)
    assert torch.equal(tokens, by_transformers(model, **PROMPT, **SIX))


def test_flags_and_new_names_are_the_models_too() -> None:
    model: Any = tiny("llama").train()
    with hybrid_fx.hybridize(model) as engine:
        engine.training = False
        assert (model.training, engine.training) == (False, False)
        engine.is_mine = "yes"
        assert (model.is_mine, engine.is_mine) == ("yes", "yes")
        assert "is_mine" not in vars(engine)
        del engine.is_mine
        assert not hasattr(model, "is_mine")
        assert not hasattr(engine, "is_mine")


@pytest.mark.parametrize(
    "name", ["config", "module", "stats", "generate", "train", "weight_version"]
)
def test_what_the_engine_has_itself_is_refused_with_where_to_set_it(name: str) -> None:
    with hybrid_fx.hybridize(tiny("llama")) as engine:
        before = getattr(engine, name)
        with pytest.raises(
            AttributeError, match=rf"{name} is the engine's own.*engine\.module\.{name}"
        ):
            setattr(engine, name, None)
        with pytest.raises(AttributeError, match=f"{name} is the engine's own"):
            delattr(engine, name)
        assert getattr(engine, name) == before
        assert engine.generate(**PROMPT, **SIX).shape == (2, 11)


def test_the_options_say_where_the_models_config_is() -> None:
    with hybrid_fx.hybridize(tiny("llama")) as engine:
        with pytest.raises(AttributeError, match=r"'vocab_size'.*engine\.module\.config"):
            _ = engine.config.vocab_size
        assert not hasattr(engine.config, "vocab_size")
        assert copy.deepcopy(engine.config) == engine.config
        assert pickle.loads(pickle.dumps(engine.config)) == engine.config


def test_an_engine_lists_its_names_and_its_models_and_is_copied_deep_alone() -> None:
    with hybrid_fx.hybridize(tiny("llama")) as engine:
        assert {"generate", "explain", "stats", "lm_head", "generation_config"} <= set(dir(engine))
        assert not hasattr(engine, "no_such_name")
        for shallow in (copy.copy, pickle.dumps):
            with pytest.raises(TypeError, match=r"copy engine\.module and hybridize"):
                shallow(engine)
        with copy.deepcopy(engine) as twin:
            twin.generation_config = GenerationConfig(**THREE)
            assert twin.generate(**PROMPT).shape == (2, 8)
            assert engine.generation_config is not twin.generation_config


def _draft() -> Any:
    """Near the target: some of its tokens are accepted."""
    draft = tiny("llama")
    for weight in draft.parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    return draft


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("positional", [False, True])
def test_an_engine_drafts_for_another_as_its_model_does(sample: bool, positional: bool) -> None:
    given = {"max_new_tokens": 20, "do_sample": sample, "eos_token_id": None}
    target, draft, ids = tiny("llama"), _draft(), prompt([5])["input_ids"]
    torch.manual_seed(3)
    expected = tiny("llama").eval().generate(ids, assistant_model=_draft().eval(), **given)
    left = torch.get_rng_state()
    with hybrid_fx.hybridize(target) as engine, hybrid_fx.hybridize(draft) as drafts:
        torch.manual_seed(3)
        if positional:
            tokens = engine.generate(ids, None, None, None, None, None, drafts, **given)
        else:
            tokens = target.generate(ids, assistant_model=drafts, **given)
        assert torch.equal(torch.get_rng_state(), left)
        assert "assisted generation" in str(engine.stats.fallbacks)
        assert drafts.stats.counters["generate_calls"] > 1
    assert torch.equal(tokens, expected)


def test_an_engine_that_drafts_for_itself_is_its_model() -> None:
    ids = prompt([5])["input_ids"]
    expected = tiny("llama").eval().generate(ids, assistant_model=tiny("llama").eval(), **SIX)
    with hybrid_fx.hybridize(tiny("llama")) as engine:
        assert torch.equal(engine.generate(ids, assistant_model=engine, **SIX), expected)
        assert "its own assistant" in str(engine.stats.fallbacks)


def test_a_model_without_an_engine_takes_the_module_of_one_and_is_told_so() -> None:
    given = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    target, ids = tiny("llama").eval(), prompt([5])["input_ids"]
    expected = target.generate(ids, assistant_model=_draft().eval(), **given)
    with hybrid_fx.hybridize(_draft()) as drafts:
        with pytest.raises(AttributeError, match=r"pass engine\.module where a model is asked for"):
            target.generate(ids, assistant_model=drafts, **given)
        assert torch.equal(target.generate(ids, assistant_model=drafts.module, **given), expected)
        assert drafts.stats.counters["generate_calls"] > 1


def test_a_generate_inside_another_says_what_is_in_the_way() -> None:
    model = tiny("llama")
    with hybrid_fx.hybridize(model) as engine:

        def inside(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            engine.generate(**PROMPT, **SIX)
            return scores

        with pytest.raises(hybrid_fx.EngineBusyError, match="by another model") as error:
            engine.generate(**PROMPT, **SIX, logits_processor=[inside])
        assert not isinstance(error.value, hybrid_fx.EngineClosedError)
        tokens = engine.generate(**PROMPT, **SIX)
    assert torch.equal(tokens, by_transformers(model, **PROMPT, **SIX))


def test_a_generate_inside_one_that_runs_the_module_works() -> None:
    model = tiny("llama")
    found: list[torch.Tensor] = []
    # Captured while the module runs, and its forwards are counted.
    with hybrid_fx.hybridize(model, disk_cache=False) as engine:

        def inside(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            found.append(engine.generate(**PROMPT, **SIX))
            return scores

        outer = engine.generate(**PROMPT, **SIX, logits_processor=[inside], output_attentions=True)
        assert list(engine.stats.fallbacks) == ["HF module: output_attentions"]
    expected = by_transformers(model, **PROMPT, **SIX)
    assert len(found) == 6
    assert all(torch.equal(tokens, expected) for tokens in [outer, *found])


def test_what_returns_the_model_returns_the_engine() -> None:
    with hybrid_fx.hybridize(tiny("llama")) as engine:
        assert engine.to(torch.float32) is engine.float() is engine.requires_grad_(False) is engine


@pytest.mark.parametrize("name", ["use_cache", "strict"])
def test_options_are_not_set_and_the_error_says_where_the_models_config_is(name: str) -> None:
    with hybrid_fx.hybridize(tiny("llama")) as engine:
        with pytest.raises(AttributeError, match=r"config is engine\.module\.config"):
            setattr(engine.config, name, False)
        with pytest.raises(AttributeError, match="call hybridize again"):
            delattr(engine.config, name)
