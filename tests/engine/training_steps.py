"""Batches with padding on all sides, and one training step of a model or an engine, compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from tiny_models import VOCAB, adapted, tiny
from torch import Tensor

ROWS, TOKENS = 4, 11


def ids() -> Tensor:
    """[4, 11] token ids, the padding token among them."""
    return torch.randint(VOCAB, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))


def padded() -> dict[str, Tensor]:
    """A batch with padding left, right and in between, and a row without."""
    mask = torch.ones(ROWS, TOKENS, dtype=torch.int64)
    mask[0, :4] = mask[1, -3:] = mask[2, 4:6] = 0
    return {
        "input_ids": ids(),
        "attention_mask": mask,
        "labels": ids().masked_fill(mask == 0, -100),
    }


def packed() -> Tensor:
    """Positions [4, 11] of a batch in which one row holds two sequences."""
    places = torch.arange(TOKENS).repeat(ROWS, 1)
    places[1, 5:] -= 5
    return places


def model_of(case: str) -> Any:
    """A tiny model in training with every kind of dropout that its family has."""
    changes: dict[str, dict[str, Any]] = {
        "llama": {"attention_dropout": 0.1},
        "eager": {"attention_dropout": 0.1, "attn_implementation": "eager"},
        "qwen2": {"attention_dropout": 0.1},
        "gpt2": {"embd_pdrop": 0.1, "attn_pdrop": 0.2, "resid_pdrop": 0.1},
        "opt": {"dropout": 0.1, "attention_dropout": 0.1},
        "mistral": {"attention_dropout": 0.1},
        "phi3": {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attention_dropout": 0.1},
        "lora": {"attention_dropout": 0.1},
    }
    kind = {"eager": "llama", "lora": "llama"}.get(case, case)
    model = tiny(kind, layers=1 if case != "llama" else 2, **changes[case])
    return (adapted(model, lora_dropout=0.2) if case == "lora" else model).train()


@dataclass(frozen=True)
class Step:
    """What one forward and backward left behind."""

    loss: Tensor | None
    logits: Tensor
    gradients: dict[str, Tensor | None]
    random: Tensor


def step(forward: Any, model: Any, **batch: Any) -> Step:
    """Forward and backward from one fixed random state; gradients begin anew."""
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    out = forward(**batch)
    loss = out.loss
    (out.logits.float().square().mean() if loss is None else loss).backward()
    gradients = {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }
    done = torch.get_rng_state()
    return Step(None if loss is None else loss.detach(), out.logits.detach(), gradients, done)


def assert_same_step(got: Step, want: Step) -> None:
    """Loss, logits, every gradient and the random state, bit by bit."""
    assert (got.loss is None) == (want.loss is None)
    assert got.loss is None or torch.equal(got.loss, want.loss)
    assert torch.equal(got.logits, want.logits)
    assert got.gradients.keys() == want.gradients.keys()
    for name, wanted in want.gradients.items():
        gradient = got.gradients[name]
        assert (gradient is None) == (wanted is None), name
        assert wanted is None or torch.equal(gradient, wanted), name
    assert torch.equal(got.random, want.random)


#: What the oldest releases cannot trace, so that the module trains: what is said, and why.
_UNTRACED = {
    "requires_grad_": "torch 2.11 traces no requires_grad_()",
    "attempted to jump with TensorVariable": "OPT of transformers 5.17 draws layers to drop",
}
_OLDEST = torch.__version__.startswith("2.11.") and transformers.__version__.startswith("5.17.")


def skip_if_untraced(engine: Any, **more: str) -> None:
    """On the oldest releases, skip the test where a call ran the module for want of a trace."""
    for reason in engine.stats.fallbacks if _OLDEST else ():
        for said, why in (_UNTRACED | more).items():
            if said in reason:
                pytest.skip(f"the module trains: {why}")


def served(engine: Any) -> int:
    """How many training forwards the graph served; asserts that no call left it."""
    skip_if_untraced(engine)
    assert engine.stats.fallbacks == {}
    return int(engine.stats.counters["train_graph_calls"])
