"""Part of law 3: whatever PEFT does to LoRA adapters, generate says what PEFT's model says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from laws.against_hf import assert_bit_identical, forced_logits, hf_generate, tensors_of
from tiny_models import adapted, prompt, randomize_adapters, tiny

import hybrid_fx

LENGTHS = (5, 1, 8)


def llama(layers: int = 1, **options: Any) -> Any:
    return adapted(tiny("llama", layers=layers), **options)


def two_adapters() -> Any:
    """Two adapters of different ranks on different modules."""
    model = llama(target_modules=["q_proj", "down_proj"])
    second = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "up_proj"])
    model.add_adapter("other", second)
    randomize_adapters(model, 9)
    return model.eval()


def both_active() -> Any:
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    return model


def switched() -> Any:
    model = two_adapters()
    model.set_adapter("other")
    return model


def disabled() -> Any:
    model = llama()
    model.base_model.disable_adapter_layers()
    return model


def merged() -> Any:
    model = llama()
    model.merge_adapter()
    return model


def unmerged() -> Any:
    model = merged()
    model.unmerge_adapter()
    return model


def scaled() -> Any:
    model = llama(target_modules=["q_proj", "v_proj"])
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.3)
    return model


def saved_modules() -> Any:
    return llama(target_modules=["q_proj"], modules_to_save=["lm_head"])


def tokens_of(model: Any) -> list[torch.nn.Parameter]:
    return [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name]


def trained_tokens(kind: str = "llama", **options: Any) -> Any:
    """Rows of the embeddings of their own, random ones."""
    given = {"target_modules": ["q_proj", "up_proj"], "trainable_token_indices": [3, 11, 40]}
    model = adapted(tiny(kind, layers=1), **given, **options)
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in tokens_of(model):
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.5)
    return model


def lora_of(kind: str, **options: Any) -> Callable[[], Any]:
    return lambda: adapted(tiny(kind, layers=1), **options)


# Name -> (the model, how many places fold).
MODELS: dict[str, tuple[Callable[[], Any], int]] = {
    "all linear": (llama, 7),
    "rslora": (lambda: llama(use_rslora=True, lora_alpha=3), 7),
    "dora": (lambda: llama(use_dora=True), 7),
    "some layers": (lambda: llama(2, target_modules=["q_proj"], layers_to_transform=[1]), 1),
    "embeddings": (lambda: llama(target_modules=["embed_tokens"]), 1),
    "head": (lambda: llama(target_modules=["lm_head"]), 1),
    "rank pattern": (lambda: llama(rank_pattern={"q_proj": 1}, alpha_pattern={"v_proj": 5}), 7),
    "several active": (both_active, 3),
    "switched": (switched, 2),
    "disabled": (disabled, 0),
    "merged": (merged, 0),
    "unmerged": (unmerged, 7),
    "scaled": (scaled, 2),
    "modules to save": (saved_modules, 1),
    "lora bias": (lambda: llama(lora_bias=True), 0),
    "fan in fan out": (lora_of("gpt2", target_modules=["c_attn", "c_proj", "c_fc"]), 4),
    "gpt2 dora": (lora_of("gpt2", target_modules=["c_attn"], use_dora=True), 1),
    "opt": (lora_of("opt"), 6),
    "tied embeddings": (lora_of("qwen2", target_modules=["embed_tokens", "q_proj"]), 2),
    "trained tokens": (trained_tokens, 2),
    "trained tokens of tied embeddings": (lambda: trained_tokens("qwen2"), 2),
    "trained bias": (lora_of("qwen2", target_modules=["q_proj", "v_proj"], bias="all"), 2),
}


# Variations of what the others show; each costs a capture.
RARE = frozenset(
    ("rank pattern", "unmerged", "scaled", "gpt2 dora", "trained bias", "rslora", "head", "merged")
)
NAMES = [pytest.param(n, marks=pytest.mark.deep) if n in RARE else n for n in MODELS]


@pytest.mark.parametrize("name", NAMES)
def test_adapters_folded_give_the_tokens_and_logits_of_peft(name: str) -> None:
    make, folds = MODELS[name]
    model = make()
    call = prompt(LENGTHS, 3) | {"max_new_tokens": 16}
    weights = tensors_of(model)
    with hybrid_fx.hybridize(model, lora="fold") as engine:
        got = engine.generate(**call)
        assert got.tolist() == hf_generate(model, **call).tolist()
        assert engine.stats.counters["hf_forwards"] == 0
        ids = got[:1]
        logits = forced_logits(engine, ids)
        with torch.no_grad():
            wanted = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
        choices = [decision.choice for decision in engine.explain().lora]
        assert set(choices) <= {"fold"}
        source = engine.explain().sources["prepare"]
        recipes = [p.recipe for p in engine._graphs.runner.plan.manifest.prepared]
        assert sum(r.count("fold_lora(") + r.count("fold_dora(") for r in recipes) == folds, recipes
        assert ("op.measured_" in source) == bool(folds)
    assert_bit_identical(tensors_of(model), weights)


@pytest.mark.parametrize("name", ["dora", "several active", "gpt2"])
def test_adapters_beside_the_weights_give_the_tokens_of_peft(name: str) -> None:
    make = MODELS["fan in fan out" if name == "gpt2" else name][0]
    model = make()
    call = prompt(LENGTHS, 3) | {"max_new_tokens": 16}
    with hybrid_fx.hybridize(model, lora="side") as engine:
        got = engine.generate(**call)
        assert got.tolist() == hf_generate(model, **call).tolist()
        assert engine.stats.counters["hf_forwards"] == 0
        with torch.no_grad():
            wanted = model(input_ids=got[:1], use_cache=False).logits
        torch.testing.assert_close(forced_logits(engine, got[:1]), wanted, rtol=1e-4, atol=1e-4)
        recipes = [p.recipe for p in engine._graphs.runner.plan.manifest.prepared]
        assert not any("fold_" in recipe for recipe in recipes)
        assert 'lora="side"' in " ".join(engine.explain().notes)


def test_an_adapter_says_something_of_its_own() -> None:
    # The models above would prove nothing if the adapters did not move the tokens.
    model = llama()
    call = prompt(LENGTHS, 3) | {"max_new_tokens": 16}
    with model.disable_adapter():
        plain = hf_generate(model, **call)
    assert hf_generate(model, **call).tolist() != plain.tolist()


def test_trained_tokens_are_followed_from_step_to_step_and_beside_the_weights() -> None:
    model = trained_tokens("qwen2")
    call = prompt(LENGTHS, 3) | {"max_new_tokens": 16}
    with model.disable_adapter():
        seen = {str(hf_generate(model, **call).tolist())}
    with hybrid_fx.hybridize(model, lora="side") as engine:
        for _ in range(2):
            got = engine.generate(**call)
            assert got.tolist() == hf_generate(model, **call).tolist()
            seen.add(str(got.tolist()))
            optimizer = torch.optim.SGD(tokens_of(model), lr=30.0)
            engine(input_ids=got, labels=got).loss.backward()
            optimizer.step()
        assert not engine.stats.fallbacks
        assert engine.stats.counters["captures"] <= 1
    assert len(seen) == 3


def test_one_engine_follows_every_state_of_its_adapters() -> None:
    model = two_adapters()
    call = prompt(LENGTHS, 3) | {"max_new_tokens": 10}
    seen = set()
    with hybrid_fx.hybridize(model, lora="fold") as engine:

        def check() -> None:
            got = engine.generate(**call)
            assert got.tolist() == hf_generate(model, **call).tolist()
            seen.add(str(got.tolist()))

        check()
        model.set_adapter("other")
        check()
        model.base_model.set_adapter(["default", "other"])
        check()
        with model.disable_adapter():
            check()
        model.merge_adapter()
        check()
        model.unmerge_adapter()
        model.set_adapter("default")
        check()
        made = [engine.stats.counters[name] for name in ("captures", "cache_hits_disk")]
        model.set_adapter("other")
        check()
        model.set_adapter("default")
        check()
        assert made == [engine.stats.counters[name] for name in ("captures", "cache_hits_disk")]
        assert engine.stats.counters["hf_forwards"] == 0
    assert len(seen) >= 4
