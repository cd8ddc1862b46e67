"""Laws 1 and 6 on the training graph: cycles of generating and training are plain training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from laws.against_hf import assert_bit_identical, tensors_of
from tiny_models import VOCAB, adapted, prompt, tiny

import hybrid_fx

CYCLES = 8


def model_under_test(lora: bool) -> Any:
    if lora:
        return adapted(tiny("llama", layers=1, attention_dropout=0.1))
    return tiny("gpt2", layers=1)  # dropout 0.1 in attention, embedding and residual


def train_once(forward: Any, optimizer: Any, cycle: int) -> float:
    """Two micro-batches of different lengths, one of them padded, and a step."""
    rng = torch.Generator().manual_seed(cycle)
    total = 0.0
    for tokens in (6, 4 + cycle % 3):
        ids = torch.randint(VOCAB, (2, tokens), generator=rng)
        mask = torch.ones_like(ids)
        mask[0, : cycle % 2] = 0
        loss = forward(input_ids=ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        total += float(loss.detach())
    optimizer.step()
    optimizer.zero_grad()
    return total


def optimizer_of(model: Any) -> Any:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def sampled(cycle: int) -> dict[str, Any]:
    lengths = (1 + cycle % 4, 1 + cycle % 3)
    return prompt(lengths, cycle) | {"max_new_tokens": 2, "do_sample": True, "pad_token_id": 0}


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_cycles_on_the_training_graph_are_bit_identical_to_plain_training(lora: bool) -> None:
    model = model_under_test(lora)
    twin = copy.deepcopy(model)
    optimizer, twin_optimizer = optimizer_of(model), optimizer_of(twin)
    forward = vars(model).get("forward")
    losses, twin_losses = [], []

    torch.manual_seed(0)
    with hybrid_fx.hybridize(model, train_graph=True) as engine:
        for cycle in range(CYCLES):
            engine.eval()
            engine.generate(**sampled(cycle))
            engine.train()
            losses.append(train_once(engine, optimizer, cycle))
        random_state = torch.get_rng_state()
        assert engine.stats.counters["train_graph_calls"] == 2 * CYCLES
        assert engine.stats.counters["hf_forwards"] == 0
        assert engine.stats.counters["captures"] <= 2
        assert engine.stats.fallbacks == {}
        assert vars(model).get("forward") is forward

    torch.manual_seed(0)
    for cycle in range(CYCLES):
        twin.eval().generate(**sampled(cycle))
        twin.train()
        twin_losses.append(train_once(twin, twin_optimizer, cycle))

    assert losses == twin_losses
    assert torch.equal(random_state, torch.get_rng_state())
    assert_bit_identical(tensors_of(model), tensors_of(twin))
    states, twin_states = (o.state_dict()["state"] for o in (optimizer, twin_optimizer))
    assert list(states) == list(twin_states)
    for index, state in twin_states.items():
        assert_bit_identical(states[index], state)
    assert [m.training for m in model.modules()] == [m.training for m in twin.modules()]
