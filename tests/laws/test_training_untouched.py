"""Law 1: generating leaves no trace in training, whatever is generated in between.

Greedy generation is held against a loop that never generates, sampling against one that calls
HF's generate at the same points, since that draws the same random numbers. Dropout is on, so that
a random number drawn too many would show in every later gradient.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from laws.against_hf import assert_bit_identical, tensors_of
from tiny_models import VOCAB, adapted, prompt, tiny

import hybrid_fx

CYCLES = 100


def model_under_test(lora: bool, dtype: torch.dtype) -> Any:
    if lora:
        return adapted(tiny("llama", layers=1, dtype=dtype), autocast_adapter_dtype=False)
    return tiny("gpt2", layers=1, dtype=dtype)  # dropout 0.1 in attention, embedding and residual


def train_once(model: Any, optimizer: Any, step: int) -> float:
    rng = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCAB, (2, 6), generator=rng)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def optimizer_of(model: Any, **options: Any) -> Any:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-3, **options)


def sampled(step: int) -> dict[str, Any]:
    lengths = (1 + step % 4, 1 + step % 3)
    return prompt(lengths, step) | {"max_new_tokens": 2, "do_sample": True, "pad_token_id": 0}


def greedy(step: int) -> dict[str, Any]:
    return prompt((1 + step % 5, 2), step) | {"max_new_tokens": 2, "pad_token_id": 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_cycles_leave_weights_and_optimizer_bit_identical(lora: bool, dtype: torch.dtype) -> None:
    model = model_under_test(lora, dtype)
    twin = copy.deepcopy(model)
    optimizer, twin_optimizer = optimizer_of(model), optimizer_of(twin)
    before = tensors_of(model)
    losses, twin_losses = [], []

    torch.manual_seed(0)
    engine = hybrid_fx.hybridize(model)
    for step in range(CYCLES):
        if step % 3:
            engine.eval()  # else a bare generate, as TRL calls it
        engine.generate(**greedy(step))
        if step % 2:
            engine.generate(**sampled(step))
        engine.train()
        losses.append(train_once(engine, optimizer, step))
    random_state = torch.get_rng_state()
    assert engine.stats.counters["prepares"] == CYCLES
    assert engine.stats.counters["hf_forwards"] == 0

    torch.manual_seed(0)
    for step in range(CYCLES):
        if step % 2:
            twin.eval().generate(**sampled(step))
        twin.train()
        twin_losses.append(train_once(twin, twin_optimizer, step))

    assert losses == twin_losses
    assert torch.equal(random_state, torch.get_rng_state())
    assert_bit_identical(tensors_of(model), tensors_of(twin))
    states, twin_states = (o.state_dict()["state"] for o in (optimizer, twin_optimizer))
    assert list(states) == list(twin_states)
    for index, state in twin_states.items():
        assert_bit_identical(states[index], state)
    moved = [name for name, old in before.items() if not torch.equal(tensors_of(model)[name], old)]
    assert moved, "training that changes nothing proves nothing"
    assert [m.training for m in model.modules()] == [m.training for m in twin.modules()]
    engine.close()
    assert_bit_identical(tensors_of(model), tensors_of(twin))


def test_gradients_that_stand_while_generating_are_kept() -> None:
    model = tiny("gpt2", layers=1).train()
    ids = torch.tensor([[3, 4, 5]])
    with hybrid_fx.hybridize(model) as engine:
        engine(input_ids=ids, labels=ids).loss.backward()
        before = {name: p.grad.clone() for name, p in model.named_parameters()}
        engine.generate(input_ids=ids, max_new_tokens=3)
        assert_bit_identical({name: p.grad for name, p in model.named_parameters()}, before)
        assert all(module.training for module in model.modules())


def test_a_generate_in_training_uses_no_dropout_and_restores_each_flag() -> None:
    model = tiny("gpt2", layers=1)
    call = prompt((4, 2)) | {"max_new_tokens": 8}
    with hybrid_fx.hybridize(model) as engine:
        wanted = engine.generate(**call).tolist()
        engine.train()
        model.transformer.h[0].mlp.eval()
        flags = [module.training for module in model.modules()]
        assert engine.generate(**call).tolist() == wanted
        assert [module.training for module in model.modules()] == flags
        assert True in flags
        assert False in flags
