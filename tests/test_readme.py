"""The README's Python blocks run, in order, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hybrid_fx.backend import hybrid_fx

README = Path(__file__).parent.parent / "README.md"


def test_every_python_block_of_the_readme_runs() -> None:
    # Found by its entry point where the checkout is installed as it is now, registered elsewhere.
    if "hybrid_fx" not in torch._dynamo.list_backends():
        torch._dynamo.register_backend(hybrid_fx, name="hybrid_fx")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(blocks) >= 2
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
        )
    )
    ids = torch.randint(3, 64, (2, 7))
    names = {
        "model": model,
        "tokens": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "batch": {"input_ids": ids, "labels": ids},
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2),
    }
    before = model.lm_head.weight.detach().clone()
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["out"].shape[0] == 2
    assert names["out"].shape[1] > 7
    assert not torch.equal(before, model.lm_head.weight)
    assert torch.equal(
        names["fast"](names["batch"]["input_ids"]).logits,
        model(names["batch"]["input_ids"]).logits,
    )
    assert names["engine"].stats.counters["hf_forwards"] == 0
