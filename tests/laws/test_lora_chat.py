"""LoRA layers that hold their factors themselves, ``(dropout(x) @ right @ left) * scaling``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from chat_lora import chat_adapted, chat_layers
from engine.training_steps import assert_same_step, padded, served, step
from laws.against_hf import assert_bit_identical, forced_logits, hf_generate, tensors_of
from tiny_models import VOCAB, prompt, tiny
from torch import Tensor

import hybrid_fx

CALL = prompt((5, 1, 8), 3) | {"max_new_tokens": 16}
IDS = torch.arange(1, 33).reshape(2, 16)


def llama(dtype: torch.dtype = torch.float32, size: float = 1.0, **options: Any) -> Any:
    """One layer, adapted in 7 places; the left factors are ``size`` times as large as usual."""
    model = chat_adapted(tiny("llama", layers=1, dtype=dtype), **options)
    return grown(model, size)


def grown(model: Any, size: float) -> Any:
    with torch.no_grad():
        for layer in chat_layers(model).values():
            layer.lora_left_weight.mul_(size)
    return model


def exact_fold(layer: Any) -> Tensor:
    """``W + scaling * (right @ left)^T`` in float32."""
    right, left = layer.lora_right_weight.float(), layer.lora_left_weight.float()
    return (layer.weight.float() + layer.lora_scaling * (right @ left).t()).detach()


def folds(engine: Any) -> int:
    """How many prepared tensors are, or hold, a fold."""
    return sum(p.recipe.count("fold_lora(") for p in engine._graphs.runner.plan.manifest.prepared)


def choices(engine: Any) -> dict[str, str]:
    return {decision.path: decision.choice for decision in engine.explain().lora}


@pytest.mark.parametrize("lora", ["fold", "side", "auto"])
def test_tokens_and_logits_are_the_modules(lora: Any) -> None:
    model = llama()
    before = tensors_of(model)
    with hybrid_fx.hybridize(model, lora=lora, strict=True) as engine:
        got = engine.generate(**CALL)
        assert got.tolist() == hf_generate(model, **CALL).tolist()
        with torch.no_grad():
            wanted = model(input_ids=got[:1], use_cache=False).logits
        torch.testing.assert_close(forced_logits(engine, got[:1]), wanted, rtol=1e-4, atol=1e-4)
        report = engine.explain()
        assert report.matched == report.total == 1
        assert not report.layers[0].missed
        assert folds(engine) == (0 if lora == "side" else 7)
        assert ("lora (7 folded)" in str(report)) == (lora != "side")
        assert ("self_attn.q_proj" in choices(engine)) == (lora != "side")
    assert_bit_identical(tensors_of(model), before)


def test_the_factors_say_something_of_their_own() -> None:
    model = llama()
    adapted = hf_generate(model, **CALL).tolist()
    assert hf_generate(grown(model, 0.0), **CALL).tolist() != adapted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_fold_is_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    model = llama(dtype)
    off = ("concat_qkv", "concat_gate_up", "pack_weights")
    with hybrid_fx.hybridize(model, lora="fold", disable_passes=off) as engine:
        runner = engine._graphs.ready()
        rows = zip(runner.plan.manifest.prepared, runner.prepared.tensors, strict=True)
        folded = {row.recipe: tensor for row, tensor in rows if "fold_lora" in row.recipe}
        assert len(folded) == 7
        for path, layer in chat_layers(model).items():
            (recipe,) = (r for r in folded if f"{path}.weight" in r)
            assert torch.equal(folded[recipe], exact_fold(layer).to(dtype)), path


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 1e-5), (torch.bfloat16, 0.2)], ids=["float32", "bfloat16"]
)
def test_the_stated_error_is_what_rounding_takes(dtype: torch.dtype, size: float) -> None:
    with hybrid_fx.hybridize(llama(dtype, size)) as engine:
        stated = {decision.path: decision.error for decision in engine.explain().lora}
        assert len(stated) == 7
        for path, layer in chat_layers(engine.module).items():
            right, left = layer.lora_right_weight.double(), layer.lora_left_weight.double()
            delta = (layer.lora_scaling * (right @ left).t()).detach()
            weight = layer.weight.double()
            lost = (weight + delta).to(dtype).double() - (weight + delta)
            (error,) = (e for site, e in stated.items() if path.endswith(site))
            assert error == pytest.approx(float(lost.norm() / delta.norm()), rel=1e-3)


def test_auto_keeps_the_branch_that_bfloat16_would_erase_until_it_has_grown() -> None:
    model = llama(torch.bfloat16, 1e-3)
    with hybrid_fx.hybridize(model) as engine, torch.no_grad():
        assert set(choices(engine).values()) == {"side"}
        report = engine.explain()
        assert "LoRA side: 7 modules" in str(report)
        assert {missed.found for missed in report.layers[0].missed} == {"a branch that stays"}
        assert len(report.layers[0].missed) == 7
        theirs = model(input_ids=IDS, use_cache=False).logits.float()
        ours = forced_logits(engine, IDS).float()
        assert float((ours - theirs).norm() / theirs.norm()) < 0.03
        grown(model, 3e3)
        assert set(choices(engine).values()) == {"fold"}


def _train_once(engine: Any, optimizer: Any, seed: int) -> Tensor:
    ids = torch.randint(VOCAB, (2, 6), generator=torch.Generator().manual_seed(seed))
    loss: Tensor = engine(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def _optimizer(model: Any) -> Any:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_generating_in_between_changes_no_bit_of_training(dtype: torch.dtype) -> None:
    model = llama(dtype)
    start, twin = tensors_of(model), copy.deepcopy(model)
    optimizer, twin_optimizer = _optimizer(model), _optimizer(twin)
    torch.manual_seed(0)
    twin.train()
    wanted = [_train_once(twin, twin_optimizer, seed) for seed in range(4)]
    torch.manual_seed(0)
    losses = []
    with hybrid_fx.hybridize(model, lora="fold") as engine:
        for seed in range(4):
            engine.eval()
            got = engine.generate(**CALL)
            if dtype == torch.float32:
                assert got.tolist() == hf_generate(model, **CALL).tolist()
            engine.train()
            losses.append(_train_once(engine, optimizer, seed))
        assert engine.stats.counters["prepares"] == 4
        assert engine.stats.counters["hf_forwards"] == 0
    assert torch.equal(torch.stack(losses), torch.stack(wanted))
    assert_bit_identical(tensors_of(model), tensors_of(twin))
    changed = {name for name, t in tensors_of(model).items() if not torch.equal(t, start[name])}
    assert changed == {name for name in start if "lora_" in name}


def test_a_training_graph_gives_the_modules_step() -> None:
    model = chat_adapted(tiny("llama", layers=1), dropout=0.2, train_all=True).train()
    want = step(model, model, **padded())
    with hybrid_fx.hybridize(model, train_graph=True) as engine:
        assert_same_step(step(engine, model, **padded()), want)
        assert served(engine) == 1
        assert "dropout" in engine.explain().sources["train"]


def _scale(model: Any) -> None:
    for layer in chat_layers(model).values():
        layer.lora_scaling = 0.5


def _fuse(model: Any) -> None:
    for layer in chat_layers(model).values():
        layer.fuse_lora_weight()


def _unfuse(model: Any) -> None:
    for layer in chat_layers(model).values():
        layer.unfuse_lora_weight()


def _more_dropout(model: Any) -> None:
    for layer in chat_layers(model).values():
        layer.lora_dropout.p = 0.4


def _no_dropout(model: Any) -> None:
    for layer in chat_layers(model).values():
        layer.lora_dropout = torch.nn.Identity()


#: Change -> whether the weights are others afterwards, and not their structure alone.
CHANGES: dict[str, tuple[Callable[[Any], None], bool]] = {
    "scaling": (_scale, True),
    "fused": (_fuse, True),
    "unfused": (_unfuse, True),
    "more dropout": (_more_dropout, False),
    "no dropout": (_no_dropout, False),
}


def test_every_state_of_the_layers_is_followed() -> None:
    model = llama(size=3.0)
    with hybrid_fx.hybridize(model, lora="fold") as engine:
        assert engine.generate(**CALL).tolist() == hf_generate(model, **CALL).tolist()
        folded = {"": folds(engine)}
        for name, (change, others) in CHANGES.items():
            version, counted = engine.weight_version, dict(engine.stats.counters)
            stamp = engine._graphs._digest
            change(model)
            assert engine.generate(**CALL).tolist() == hf_generate(model, **CALL).tolist(), name
            assert (engine.weight_version > version) == others, name
            assert engine._graphs._digest != stamp, name
            assert engine.stats.counters["prepares"] == counted["prepares"] + 1, name
            folded[name] = folds(engine)
        assert engine.stats.counters["hf_forwards"] == 0
    assert folded == dict.fromkeys(folded, 7) | {"fused": 0}


def test_a_layer_fused_all_along_is_a_plain_linear() -> None:
    model = llama()
    _fuse(model)
    with hybrid_fx.hybridize(model, strict=True) as engine:
        assert engine.generate(**CALL).tolist() == hf_generate(model, **CALL).tolist()
        assert engine.explain().lora == ()
