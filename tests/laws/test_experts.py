"""Mixtures of experts whose forward is one graph generate from it, with transformers' tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from laws.against_hf import same_tokens
from tiny_models import prompt, reweigh

import hybrid_fx

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "eos_token_id": None,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 5, "moe_intermediate_size": 16},
    "GptOss": {"num_local_experts": 3, "sliding_window": 4},
}


def mixture(family: str, experts: str | None = None) -> Any:
    """A tiny model; its experts as they are by default where nothing is asked."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**_SIZES, **EXPERTS[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    if experts is not None:
        model.set_experts_implementation(experts)
    return model


@pytest.mark.parametrize("experts", [None, "batched_mm"])
@pytest.mark.parametrize("family", EXPERTS)
def test_mixtures_generate_from_their_own_graph(family: str, experts: str | None) -> None:
    model = mixture(family, experts)
    with hybrid_fx.hybridize(model) as engine:
        for seed in range(3):
            reweigh(model, seed)
            same_tokens(engine, **prompt((5, 1, 9), seed), max_new_tokens=12, do_sample=False)
        assert not engine.stats.fallbacks
        assert engine.stats.counters["hf_forwards"] == 0
        assert engine.stats.counters["prepares"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixture_trains_on_a_graph_bit_by_bit(dtype: torch.dtype) -> None:
    model = mixture("Mixtral").to(dtype)
    reweigh(model, 1)
    batch = prompt((6, 4), 1)
    batch["labels"] = batch["input_ids"]
    found = []
    for graph in (False, True):
        with hybrid_fx.hybridize(model, train_graph=graph) as engine:
            engine.train()
            model.zero_grad()
            loss = engine(**batch).loss
            loss.backward()
            assert engine.stats.fallbacks == {}
            found.append([loss, *(weight.grad for weight in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_experts_one_by_one_generate_through_transformers_and_say_so() -> None:
    model = mixture("Mixtral", "eager")
    with hybrid_fx.hybridize(model) as engine:
        same_tokens(engine, **prompt((5, 1, 9)), max_new_tokens=6, do_sample=False)
        assert any("not captured" in reason for reason in engine.stats.fallbacks)
