"""Decoders of many families, as transformers builds them, generate from graphs of their own.

They differ in norms, windows, masks, rotary forms, heads, experts and scales.
"""

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
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_HEAD = {"head_dim": 8}
_WINDOW = {"sliding_window": 5}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {**_HEAD, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

#: Prefix of the transformers classes to the fields beside the sizes.
DECODERS: dict[str, dict[str, Any]] = {
    "Apertus": {},
    "Arcee": {},
    "Cohere": {},
    "Cohere2": _WINDOW,
    "Dots1": {
        **_ROUTED,
        "n_shared_experts": 1,
        **_WINDOW,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "Ernie4_5": _HEAD,
    "Exaone4": {**_WINDOW, "sliding_window_pattern": 2},
    "FlexOlmo": _EXPERTS,
    "Gemma": _HEAD,
    "Glm": _HEAD,
    "Glm4": _HEAD,
    "Glm4Moe": {**_ROUTED, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "Granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "GraniteMoe": _LOCAL,
    "Helium": _HEAD,
    "HunYuanDenseV1": _HEAD,
    "Ministral": {**_HEAD, **_WINDOW},
    "Nemotron": {},
    "Olmo": {},
    "Olmo3": _WINDOW,
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "Phi": {},
    "Phimoe": {**_LOCAL, **_WINDOW},
    "Qwen2Moe": {**_EXPERTS, **_WINDOW, "shared_expert_intermediate_size": 24},
    "SeedOss": _HEAD,
    "SmolLM3": {"no_rope_layer_interval": 2},
}


@pytest.mark.deep
@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_gives_the_tokens_of_transformers_from_its_own_graph(family: str) -> None:
    config = getattr(transformers, f"{family}Config")(**{**_SIZES, **DECODERS[family]})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = prompt((8, 5), 9)
    with hybrid_fx.hybridize(model, fusions="all") as engine:
        for seed, rows in enumerate(((9, 1, 4), (23,), (1, 1))):
            reweigh(model, seed)
            torch.manual_seed(seed)
            engine.train()
            engine(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            engine.eval()
            given = prompt(rows, seed) | {"max_new_tokens": 12}
            same_tokens(engine, **given, do_sample=False)
            same_tokens(engine, **given, do_sample=True, top_k=20)
        assert not engine.stats.fallbacks
        assert engine.stats.counters["prepares"] == 3
