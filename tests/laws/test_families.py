"""Every family with a policy is rewritten in full, all fusions included, and gives the tokens of
transformers before and after a step."""

from __future__ import annotations

import pytest
import torch
from laws.against_hf import same_tokens
from tiny_models import prompt, tiny

import hybrid_fx

KINDS = ("gemma2", "olmo2", "stablelm", "starcoder2", "qwen2moe", "qwen3moe")


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_is_rewritten_in_full_and_gives_the_tokens_of_transformers(kind: str) -> None:
    model = tiny(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batch = prompt((8, 5), 9)
    with hybrid_fx.hybridize(model, fusions="all", strict=True) as engine:
        for seed in range(3):
            engine.eval()
            same_tokens(engine, **prompt((9, 1, 4), seed), max_new_tokens=16, do_sample=False)
            engine.train()
            engine(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert engine.stats.counters["prepares"] == 3
        assert not engine.stats.fallbacks
        report = engine.explain()
        assert report.matched == report.total == 2
        for layer in report.layers:  # transformers 5.17 adds experts up in place: missed, and said
            told = {"mlp" in layer.fused, "fuse_mlp" in {missed.what for missed in layer.missed}}
            # Qwen3-MoE has experts, and no MLP that all tokens share.
            assert (True in told) == (kind != "qwen3moe")
