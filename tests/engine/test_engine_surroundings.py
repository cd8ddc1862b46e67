"""What stands around a generate call, set by the user, must not reach the graphs or the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hybrid_fx


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def _prompt() -> dict[str, Any]:
    ids = torch.randint(3, 64, (2, 5), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6}


def test_memory_made_inside_inference_mode_is_refilled_after_a_step(model: Any) -> None:
    engine = hybrid_fx.hybridize(model)
    with torch.inference_mode():
        assert not engine.generate(**_prompt()).is_inference()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = _prompt()["input_ids"]
    engine(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    tokens = engine.generate(**_prompt())
    assert engine.stats.counters["prepares"] == 2
    engine.close()
    assert torch.equal(tokens, model.eval().generate(**_prompt()))


def test_autocast_reaches_neither_graphs_nor_prepared_tensors(model: Any) -> None:
    engine = hybrid_fx.hybridize(model, lora="fold")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = engine.explain()
    assert report.matched == report.total == 2
    assert not report.notes
    tokens = engine.generate(**_prompt())
    engine.close()
    assert torch.equal(tokens, model.eval().generate(**_prompt()))


def test_input_gradients_asked_for_by_a_hook_keep_the_model_on_its_graphs(model: Any) -> None:
    model.enable_input_require_grads()
    engine = hybrid_fx.hybridize(model)
    tokens = engine.generate(**_prompt())
    assert engine.stats.counters["hf_forwards"] == 0
    engine.close()
    assert torch.equal(tokens, model.eval().generate(**_prompt()))


def test_a_refused_call_inside_another_frees_nothing_of_the_outer_one(model: Any) -> None:
    engine = hybrid_fx.hybridize(model, release_inference_cache=True)
    refused: list[str] = []

    def generate_inside(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        with pytest.raises(hybrid_fx.EngineBusyError) as error:
            engine.generate(**_prompt())
        refused.append(str(error.value))
        return scores

    tokens = engine.generate(**_prompt(), logits_processor=[generate_inside])
    assert len(refused) == 6
    engine.close()
    assert torch.equal(tokens, model.eval().generate(**_prompt()))


def test_fusions_without_a_recorded_gain_are_made_where_they_are_asked_for(model: Any) -> None:
    engine = hybrid_fx.hybridize(model)
    measured = set(engine.explain().layers[0].fused)
    engine.close()
    engine = hybrid_fx.hybridize(model, fusions="all")
    everything = set(engine.explain().layers[0].fused)
    tokens = engine.generate(**_prompt())
    engine.close()
    assert measured == {"gate_up", "norm", "qkv"}
    assert everything == measured | {"mlp", "residual + norm"}
    assert torch.equal(tokens, model.eval().generate(**_prompt()))
