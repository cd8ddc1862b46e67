"""Law 4: autocast that others put on a model is named with the remedy, and the remedy serves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from engine.training_steps import skip_if_untraced
from laws.against_hf import hf_generate
from tiny_models import adapted, prompt, tiny

import hybrid_fx

CALL = prompt((5, 1, 3), 2) | {"max_new_tokens": 8}
BATCH = prompt((6, 4), 1) | {"labels": torch.ones(2, 6, dtype=torch.int64)}


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """One that trains in bfloat16; accelerate keeps its state for the whole process."""
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def assert_from_graphs(engine: Any, model: Any) -> None:
    before = engine.stats.counters["hf_forwards"], dict(engine.stats.fallbacks)
    assert engine.generate(**CALL).tolist() == hf_generate(model, **CALL).tolist()
    assert (engine.stats.counters["hf_forwards"], dict(engine.stats.fallbacks)) == before


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_a_model_that_accelerate_prepared_says_so_and_runs_from_graphs_without_its_wrapper(
    accelerator: Accelerator, lora: bool
) -> None:
    model = tiny("llama", layers=1)
    model = accelerator.prepare(adapted(model, lora_dropout=0.0) if lora else model)
    with hybrid_fx.hybridize(model, disk_cache=False) as engine:
        assert engine.generate(**CALL).tolist() == hf_generate(model, **CALL).tolist()
        ((said, times),) = engine.stats.fallbacks.items()
        assert times == 1
        assert "accelerate runs the forward of the model under autocast" in said
        assert "load the model in bfloat16 and leave mixed precision off" in said
        assert "accelerator.unwrap_model(model, keep_fp32_wrapper=False)" in said
        assert any(said.endswith(note) for note in engine.explain().notes)
        loss = engine(**BATCH).loss
        assert accelerator.unwrap_model(model, keep_fp32_wrapper=False) is model
        assert_from_graphs(engine, model)
        with accelerator.autocast():
            again = engine(**BATCH).loss
        assert torch.equal(again.float(), loss), "training goes on as it was"
        assert not torch.equal(engine(**BATCH).loss, loss)


def test_a_bfloat16_model_without_mixed_precision_runs_from_graphs() -> None:
    try:
        model = Accelerator(cpu=True).prepare(tiny("llama", layers=1, dtype=torch.bfloat16))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    with hybrid_fx.hybridize(model, disk_cache=False) as engine:
        assert_from_graphs(engine, model)


def test_an_autocast_in_a_forward_is_named() -> None:
    model = tiny("llama", layers=1)
    mlp = model.model.layers[0].mlp
    mlp.forward = torch.autocast("cpu", torch.bfloat16)(mlp.forward)
    with hybrid_fx.hybridize(model, disk_cache=False) as engine:
        assert engine.generate(**CALL).tolist() == hf_generate(model, **CALL).tolist()
        (said,) = engine.stats.fallbacks
        assert "the forward turns on autocast (cpu, torch.bfloat16)" in said


def test_a_training_graph_is_refused_with_the_same_words(accelerator: Accelerator) -> None:
    model = accelerator.prepare(tiny("llama", layers=1).train())
    wanted = model(**BATCH).loss
    with hybrid_fx.hybridize(model, disk_cache=False, train_graph=True) as engine:
        assert torch.equal(engine(**BATCH).loss, wanted)
        (said,) = engine.stats.fallbacks
        assert "accelerate runs the forward of the model under autocast" in said
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        with accelerator.autocast():
            assert torch.equal(engine(**BATCH).loss.float(), wanted)
        skip_if_untraced(engine, differs="transformers 5.17 leaves autocast for rotary angles")
        assert engine.stats.counters["train_graph_calls"] == 1
