"""Packed in float32: the same generation, weights followed, and its memory said and refusable."""

from __future__ import annotations

import pytest
import torch
from tiny_models import adapted, prompt, reweigh, tiny

import hybrid_fx
from hybrid_fx.passes.packing import PackForm, lent, packs
from hybrid_fx.runtime import forms

CPU = torch.device("cpu")
CALL = {**prompt((5, 3)), "max_new_tokens": 6, "do_sample": False}

needs_onednn = pytest.mark.skipif(
    not packs(CPU, torch.float32), reason="needs a torch built with oneDNN"
)


@pytest.fixture
def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without instructions for bfloat16."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)


def engine_of(kind: str, **options: object) -> hybrid_fx.HybridEngine:
    return hybrid_fx.hybridize(tiny(kind).to(torch.bfloat16), disk_cache=False, **options)


def first_logits(engine: hybrid_fx.HybridEngine, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the second token, by the graphs and by the module in float64."""
    call = {"max_new_tokens": 2, "do_sample": False, "output_logits": True}
    inputs = {name: value[:rows] for name, value in prompt((5, 5)).items()}
    out = engine.generate(**inputs, **call, return_dict_in_generate=True)
    wide = tiny("llama").to(torch.float64)
    wide.load_state_dict({k: v.double() for k, v in engine.module.state_dict().items()})
    with torch.no_grad():
        exact = wide(out.sequences[:, :-1]).logits[:, -1]
    return out.logits[1].double(), exact


@needs_onednn
@pytest.mark.usefixtures("without_bfloat16")
@pytest.mark.parametrize("rows", [1, 2])
def test_logits_are_those_of_the_weights_as_they_are(rows: int) -> None:
    with engine_of("llama") as engine:
        for seed in range(2):
            found, exact = first_logits(engine, rows)
            scale = exact.abs().max()
            assert ((found - exact).abs().max() / scale).item() < 2e-2
            reweigh(engine.module, seed=seed + 5)
        assert engine.stats.fallbacks == {}
        assert engine.stats.counters["hf_forwards"] == 0


@needs_onednn
@pytest.mark.usefixtures("without_bfloat16")
def test_one_row_reads_the_models_own_memory_and_the_report_says_what_the_copy_takes() -> None:
    with engine_of("llama") as engine:
        engine.generate(**CALL)
        held = [t for t in engine._graphs.runner.prepared.tensors if t.is_mkldnn]
        assert held
        assert {t.dtype for t in held} == {torch.float32}
        own = {t.untyped_storage().data_ptr() for t in engine.module.parameters()}
        parts = [part for t in held for part in lent(t).parts]
        assert all(part.untyped_storage().data_ptr() in own for part in parts)
        said = engine.explain()
        copies = [copy for copy in said.copies if "packed" in copy.reason]
        assert len(copies) == len(held)
        assert "float32, 4 bytes a weight" in copies[0].reason
        assert 'pack_dtype="same" keeps bfloat16' in str(said).replace("\n", " ")
        assert sum(copy.nbytes for copy in copies) >= 4 * sum(part.numel() for part in parts)


@needs_onednn
@pytest.mark.usefixtures("without_bfloat16")
def test_a_config_that_wants_the_same_dtype_holds_no_float32() -> None:
    with engine_of("llama", pack_dtype="same") as engine:
        engine.generate(**CALL)
        assert not any(t.is_mkldnn for t in engine._graphs.runner.prepared.tensors)
        assert not any("packed" in copy.reason for copy in engine.explain().copies)


@needs_onednn
@pytest.mark.usefixtures("without_bfloat16")
def test_folded_weights_are_packed_in_float32_and_lend_nothing() -> None:
    model = adapted(tiny("llama")).to(torch.bfloat16)
    with hybrid_fx.hybridize(model, disk_cache=False, lora="fold") as engine:
        engine.generate(**CALL)
        runner = engine._graphs.runner
        pairs = zip(runner.plan.manifest.prepared, runner.prepared.tensors, strict=True)
        folded = [t for wanted, t in pairs if wanted.folded and t.is_mkldnn]
        assert folded
        assert {t.dtype for t in folded} == {torch.float32}
        assert {lent(t) for t in folded} == {None}
        assert engine.stats.fallbacks == {}


@needs_onednn
def test_the_plan_is_the_same_whatever_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    sources, held = [], set()
    for mode in ("auto", "same", "float32"):
        if mode == "float32":
            monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        with engine_of("llama", pack_dtype="same" if mode == "same" else "auto") as engine:
            sources.append(dict(engine.explain().sources))
            held.add(engine._graphs.runner.forms[torch.bfloat16])
    assert len(held) == 2
    assert sources[0] == sources[1] == sources[2]


def test_another_pack_dtype_is_refused_by_name() -> None:
    with pytest.raises(hybrid_fx.ConfigError, match="pack_dtype='float16' is not known; use one"):
        hybrid_fx.HybridConfig(pack_dtype="float16")


@needs_onednn
def test_what_measured_fastest_is_what_an_engine_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(directory: object, dtype: torch.dtype) -> dict[str, list[float]]:
        return {"bfloat16": [1.0] * 3, "float32": [0.2] * 3, "plain": [1.0] * 3}

    monkeypatch.setattr(forms, "_seconds", seconds)
    with engine_of("llama") as engine:
        engine.generate(**CALL)
        assert engine._graphs.runner.forms == {torch.bfloat16: PackForm(torch.float32)}
        held = [t for t in engine._graphs.runner.prepared.tensors if t.is_mkldnn]
        assert {t.dtype for t in held} == {torch.float32}
