"""torch.compile(model, backend="hybrid_fx"): the same rewrites without an engine.

    python examples/compile_backend.py

Trains a tiny Llama for a few steps and generates from it, both through compiled graphs, and shows
what was made of each graph.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hybrid_fx.backend import GraphReport


def tiny() -> LlamaForCausalLM:
    """A Llama of two layers with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, pad_token_id=0, **sizes, **heads))


def main(backend: str = "hybrid_fx", steps: int = 3) -> tuple[list[float], Tensor]:
    """Train, then generate; returns the losses and the tokens [1, T]."""
    model, reports = tiny(), list[GraphReport]()
    options = {"report": reports.append} if backend == "hybrid_fx" else None
    model.forward = torch.compile(model.forward, backend=backend, options=options)  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.arange(3, 15)[None]
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    mask = torch.ones_like(ids[:, :4])
    tokens = model.generate(ids[:, :4], attention_mask=mask, max_new_tokens=6, do_sample=False)
    for report in reports:
        print(report)
    return losses, tokens


if __name__ == "__main__":
    losses, tokens = main()
    print("losses", [round(loss, 3) for loss in losses], "tokens", tokens.tolist())
