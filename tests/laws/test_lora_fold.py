"""Law 3: what is folded, to the bit; where folding would erase an adapter, it stays a branch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws.against_hf import assert_bit_identical, forced_logits, hf_generate, tensors_of
from tiny_models import adapted, prompt, randomize_adapters, tiny
from torch import Tensor

import hybrid_fx
from hybrid_fx.runtime import PlanRunner

#: Leave a fold as the tensor that is prepared.
NO_CONCAT = ("concat_qkv", "concat_gate_up", "pack_weights")
IDS = torch.arange(1, 33).reshape(2, 16)


def folded_tensors(engine: Any) -> dict[str, Tensor]:
    """The prepared tensors that hold a fold, by the path of the adapted module."""
    runner = engine._graphs.ready()
    wanted = runner.plan.manifest.prepared
    return {
        p.recipe: tensor
        for p, tensor in zip(wanted, runner.prepared.tensors, strict=True)
        if "fold_" in p.recipe
    }


def adapted_modules(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and m.lora_A}


def exact_fold(module: Any) -> Tensor:
    """``W + s B A``, each product and sum in float32."""
    total = module.base_layer.weight.detach().float()
    for name in module.active_adapters:
        a, b = (side[name].weight.detach().float() for side in (module.lora_A, module.lora_B))
        total = total + module.scaling[name] * (b @ a)
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("wide_adapters", [False, True], ids=["same dtype", "float32 adapters"])
def test_a_fold_is_computed_in_float32_and_rounded_once(
    dtype: torch.dtype, wide_adapters: bool
) -> None:
    # alpha / r = 2 is a power of two: scaling is exact, so that the order of scaling and adding
    # cannot change a bit.
    model = adapted(
        tiny("llama", layers=1, dtype=dtype), lora_alpha=8, autocast_adapter_dtype=wide_adapters
    )
    factor = next(m for m in adapted_modules(model).values()).lora_A.default.weight
    assert factor.dtype == (torch.float32 if wide_adapters else dtype)
    before = tensors_of(model)
    with hybrid_fx.hybridize(model, lora="fold", disable_passes=NO_CONCAT) as engine:
        got = folded_tensors(engine)
        modules = adapted_modules(model)
        assert len(got) == len(modules) == 7
        for path, module in modules.items():
            (recipe,) = (r for r in got if path in r)
            assert got[recipe].dtype == dtype
            assert torch.equal(got[recipe], exact_fold(module).to(dtype)), path
    assert_bit_identical(tensors_of(model), before)


def test_a_float64_model_is_folded_in_float64() -> None:
    model = adapted(tiny("llama", layers=1, dtype=torch.float64))
    with hybrid_fx.hybridize(model, lora="fold") as engine, torch.no_grad():
        wanted = model(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(forced_logits(engine, IDS), wanted, rtol=1e-11, atol=1e-11)


def test_several_adapters_are_summed_before_they_are_rounded() -> None:
    import peft

    model = adapted(tiny("llama", dtype=torch.bfloat16), target_modules=["o_proj"], lora_alpha=8)
    other = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["o_proj"])
    model.add_adapter("other", other)
    randomize_adapters(model, 5, size=0.03)
    model.base_model.set_adapter(["default", "other"])
    with hybrid_fx.hybridize(model.eval(), lora="fold", disable_passes=NO_CONCAT) as engine:
        got = folded_tensors(engine)
        assert len(got) == 2
        twice = 0
        for path, module in adapted_modules(model).items():
            (recipe,) = (r for r in got if path in r)
            assert torch.equal(got[recipe], exact_fold(module).bfloat16())
            rounded = module.base_layer.weight.detach()
            for name in ("default", "other"):
                delta = (
                    module.scaling[name] * module.lora_B[name].weight @ module.lora_A[name].weight
                )
                rounded = (rounded.float() + delta.detach().float()).bfloat16()
            twice += int((rounded != got[recipe]).sum())
        assert twice > 0, "rounding each adapter would have shown nothing"


def small_lora(size: float, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    """LoRA whose B factors are ``size`` large, everything else of ordinary size."""
    model = adapted(tiny("llama", layers=1, dtype=dtype), **options)
    grow(model, size)
    return model


def grow(model: Any, size: float) -> None:
    rng = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * size)


def choices(engine: Any) -> set[str]:
    return {decision.choice for decision in engine.explain().lora}


def test_auto_keeps_a_branch_that_bfloat16_would_erase() -> None:
    model = small_lora(3e-5)
    with hybrid_fx.hybridize(model) as engine:
        decisions = engine.explain().lora
        assert choices(engine) == {"side"}
        assert all(d.error is not None and d.error > 0.5 for d in decisions)
        assert "LoRA side" in str(engine.explain())
        names = " ".join(p.name for p in engine._graphs.runner.plan.manifest.prepared)
        assert "lora_A" in names
        assert "lora_B" in names
        beside = forced_logits(engine, IDS)
        base = next(m for n, m in adapted_modules(model).items() if "o_proj" in n)
        same = exact_fold(base).bfloat16() == base.base_layer.weight
        assert float(same.float().mean()) > 0.95, "folding leaves nearly every weight as it was"
        grow(model, 0.0)
        assert not torch.equal(beside, forced_logits(engine, IDS)), "the branch moves the logits"


def test_auto_keeps_a_branch_that_float32_would_erase() -> None:
    with hybrid_fx.hybridize(small_lora(1e-9, torch.float32)) as engine:
        engine._graphs.ready()
        assert choices(engine) == {"side"}
        assert all(d.error is not None and d.error > 0.5 for d in engine.explain().lora)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)], ids=["float32", "bfloat16"]
)
def test_the_stated_error_is_what_rounding_takes_of_the_adapter(
    dtype: torch.dtype, size: float
) -> None:
    with hybrid_fx.hybridize(small_lora(size, dtype)) as engine:
        engine._graphs.ready()
        stated = {d.path: d.error for d in engine.explain().lora}
        for path, module in adapted_modules(engine.module).items():
            weight = module.base_layer.weight.detach().double()
            a, b = (s["default"].weight.detach().double() for s in (module.lora_A, module.lora_B))
            delta = module.scaling["default"] * (b @ a)
            lost = (weight + delta).to(dtype).double() - (weight + delta)
            (error,) = (e for site, e in stated.items() if path.endswith(site))
            assert error == pytest.approx(float(lost.norm() / delta.norm()), rel=1e-3)


def test_auto_folds_as_soon_as_the_adapter_has_grown_and_goes_back() -> None:
    model = small_lora(3e-5)
    with hybrid_fx.hybridize(model) as engine, torch.no_grad():
        for size, wanted in ((3e-5, "side"), (1.0, "fold"), (3e-5, "side"), (0.5, "fold")):
            grow(model, size)
            engine.generate(**prompt((3, 2)), max_new_tokens=2)
            assert choices(engine) == {wanted}
            theirs = model(input_ids=IDS, use_cache=False).logits.float()
            ours = forced_logits(engine, IDS).float()
            assert float((ours - theirs).norm() / theirs.norm()) < 0.03
        assert engine.stats.counters["captures"] + engine.stats.counters["cache_hits_disk"] >= 1
        assert engine.stats.counters["hf_forwards"] == 0


def test_a_fold_measures_itself_as_long_as_all_adapters_fold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measures: list[int] = []
    measure = PlanRunner.measure
    monkeypatch.setattr(
        PlanRunner, "measure", lambda self, tensors: (measures.append(1), measure(self, tensors))[1]
    )
    model = small_lora(1.0)
    with hybrid_fx.hybridize(model) as engine:
        # (size of the adapters, measures by themselves so far, times that weights were prepared)
        steps = ((1.0, 1, 1), (0.5, 1, 2), (0.7, 1, 3), (3e-5, 2, 5), (2e-5, 3, 6), (1.0, 4, 7))
        for size, measured, prepares in steps:
            grow(model, size)
            graphs = engine._graphs
            graphs.ready()
            assert len(measures) == measured, size
            assert engine.stats.counters["prepares"] == prepares, size
            assert graphs.errors == pytest.approx(measure(graphs._sides.folding, graphs.tensors()))
            assert choices(engine) == {"side" if size < 1e-3 else "fold"}


def test_auto_decides_for_each_place() -> None:
    model = small_lora(1.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "v_proj.lora_B" in name:
                parameter.mul_(1e-5)
    with hybrid_fx.hybridize(model) as engine, torch.no_grad():
        by_place = {d.path: d.choice for d in engine.explain().lora}
        assert {p for p, c in by_place.items() if c == "side"} == {"self_attn.v_proj"}
        assert len(by_place) == 7
        theirs = model(input_ids=IDS, use_cache=False).logits.float()
        ours = forced_logits(engine, IDS).float()
        assert float((ours - theirs).norm() / theirs.norm()) < 0.03


def test_auto_folds_in_float32_and_reports_the_error() -> None:
    model = small_lora(1e-3, torch.float32)
    with hybrid_fx.hybridize(model) as engine:
        call = prompt((5, 1, 8)) | {"max_new_tokens": 12}
        assert engine.generate(**call).tolist() == hf_generate(model, **call).tolist()
        decisions = engine.explain().lora
        assert choices(engine) == {"fold"}
        assert decisions
        assert all(d.error is not None and 0 <= d.error < 1e-2 for d in decisions)
        assert "largest relative error" in str(engine.explain())


def test_an_adapter_that_says_nothing_folds_without_error() -> None:
    model = small_lora(0.0)
    with hybrid_fx.hybridize(model) as engine:
        assert choices(engine) == {"fold"}
        assert {d.error for d in engine.explain().lora} == {0.0}


def test_float32_adapters_over_bfloat16_weights_are_as_exact_as_peft() -> None:
    model = small_lora(0.3)
    assert next(iter(adapted_modules(model).values())).lora_A.default.weight.dtype == torch.float32
    exact = small_lora(0.3, torch.float32)
    exact.load_state_dict({n: t.float() for n, t in model.state_dict().items()})
    with torch.no_grad():
        theirs = model(input_ids=IDS, use_cache=False).logits.float()
        wanted = exact(input_ids=IDS, use_cache=False).logits
        for mode in ("fold", "side", "auto"):
            with hybrid_fx.hybridize(model, lora=mode) as engine:
                ours = forced_logits(engine, IDS).float()
                assert engine.stats.counters["prepares"] >= 1
            distance = float((ours - wanted).norm())
            assert distance <= 1.5 * float((theirs - wanted).norm()), mode
