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
    "intermediate_size": 20,
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
    "Qwen3Moe": {"num_experts": 5, "moe_intermediate_size": 12},
    "GptOss": {"num_local_experts": 3, "sliding_window": 4},
}


@pytest.mark.parametrize("family", EXPERTS)
def test_batched_experts_generate_from_their_own_graph(family: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**_SIZES, **EXPERTS[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.set_experts_implementation("batched_mm")
    with hybrid_fx.hybridize(model) as engine:
        for seed in range(3):
            reweigh(model, seed)
            same_tokens(engine, **prompt((5, 1, 9), seed), max_new_tokens=12, do_sample=False)
        assert not engine.stats.fallbacks
        assert engine.stats.counters["hf_forwards"] == 0
        assert engine.stats.counters["prepares"] == 3
