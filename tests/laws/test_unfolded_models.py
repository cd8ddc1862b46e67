"""Law 4: what cannot be folded or captured still generates HF's tokens, and says so."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from laws.against_hf import hf_generate
from tiny_models import adapted, prompt, randomize_adapters, tiny

import hybrid_fx

CALL = prompt((5, 1, 3), 2) | {"max_new_tokens": 10}


def ia3() -> Any:
    config = peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    )
    model = peft.get_peft_model(tiny("llama", layers=1), config)
    rng = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.copy_(1 + 0.5 * torch.randn(parameter.shape, generator=rng))
    return model.eval()


def prompt_tuning() -> Any:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(tiny("llama", layers=1), config).eval()


def test_ia3_runs_unfolded_from_the_graphs_and_is_reported() -> None:
    model = ia3()
    with hybrid_fx.hybridize(model) as engine:
        assert engine.generate(**CALL).tolist() == hf_generate(model, **CALL).tolist()
        assert engine.stats.counters["hf_forwards"] == 0
        (decision,) = engine.explain().lora
        assert (decision.choice, decision.path) == ("unfolded", "default")
        assert "IA3" in decision.reason


def test_prompt_tuning_runs_by_the_module_and_is_reported() -> None:
    model = prompt_tuning()
    with hybrid_fx.hybridize(model) as engine:
        assert engine.generate(**CALL).tolist() == hf_generate(model, **CALL).tolist()
        assert any("prompt learning" in reason for reason in engine.stats.fallbacks)
        assert [d.choice for d in engine.explain().lora] == ["unfolded"]


def test_a_lora_bias_stays_a_branch_and_the_layer_says_so() -> None:
    model = adapted(tiny("llama", layers=1), lora_bias=True, target_modules=["q_proj", "up_proj"])
    with hybrid_fx.hybridize(model, lora="fold") as engine:
        assert engine.generate(**CALL).tolist() == hf_generate(model, **CALL).tolist()
        assert engine.stats.counters["hf_forwards"] == 0
        missed = [m for layer in engine.explain().layers for m in layer.missed]
        assert sum(m.what == "fold_lora" for m in missed) == 2


def test_lora_on_conv1d_without_dropout_and_with_adapter_dropout_agree() -> None:
    for dropout in (0.0, 0.5):
        model = adapted(tiny("gpt2", layers=1), target_modules=["c_attn"], lora_dropout=dropout)
        with hybrid_fx.hybridize(model.train()) as engine:
            got = engine.generate(**CALL)
            assert engine.stats.counters["hf_forwards"] == 0
            model.eval()
            assert got.tolist() == hf_generate(model, **CALL).tolist()


def untraceable(model: Any) -> None:
    """Give the first MLP a forward that looks at its values, which no trace can follow."""
    mlp = model.model.layers[0].mlp
    plain = mlp.forward

    def forward(x: Any) -> Any:
        return plain(x) * (2.0 if float(x.abs().sum()) > 0 else 1.0)

    mlp.forward = forward


def test_a_forward_that_cannot_be_traced_generates_by_transformers_and_says_so() -> None:
    model = tiny("llama")
    untraceable(model)
    with hybrid_fx.hybridize(model, disk_cache=False) as engine:
        for _ in range(2):
            assert engine.generate(**CALL).tolist() == hf_generate(model, **CALL).tolist()
        assert sum(engine.stats.fallbacks.values()) == 2
        assert all("HF module" in reason for reason in engine.stats.fallbacks)
        assert engine.stats.counters["hf_forwards"] > 0
        report = engine.explain()
        assert (report.matched, report.total) == (0, 2)
        assert [layer.path for layer in report.layers] == ["model.layers.0", "model.layers.1"]
        assert all("captured" in layer.missed[0].found for layer in report.layers)
        assert any("captured" in note for note in report.notes)
        assert "captured" in str(report)
        del model.model.layers[0].mlp.forward
        before = engine.stats.counters["hf_forwards"]
        assert engine.generate(**CALL).tolist() == hf_generate(model, **CALL).tolist()
        assert engine.stats.counters["hf_forwards"] == before, "captured once it can be"
        assert engine.explain().notes == ()


def test_strict_refuses_what_cannot_be_traced_each_time() -> None:
    model = tiny("llama")
    untraceable(model)
    with hybrid_fx.hybridize(model, strict=True, disk_cache=False) as engine:
        for _ in range(2):
            with pytest.raises(hybrid_fx.StrictError, match="strict=False"):
                engine.generate(**CALL)
        with pytest.raises(hybrid_fx.StrictError):
            engine.explain()


def test_strict_refuses_a_layer_without_a_policy_each_time() -> None:
    model = ia3()  # its products stand where the policies expect the activation
    with hybrid_fx.hybridize(model, strict=True) as engine:
        for _ in range(2):
            with pytest.raises(hybrid_fx.StrictError, match=r"layers\.0"):
                engine.generate(**CALL)


def test_strict_refuses_a_call_that_leaves_the_graphs() -> None:
    model = tiny("llama")
    right = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    with hybrid_fx.hybridize(model, strict=True) as engine:
        with pytest.raises(hybrid_fx.StrictError, match="right-padded"):
            engine.generate(**right, max_new_tokens=2)
        assert engine.generate(**CALL).tolist() == hf_generate(model, **CALL).tolist()


def test_right_padding_gives_the_tokens_of_transformers_and_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny("llama")
    right = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    with hybrid_fx.hybridize(model) as engine, caplog.at_level("WARNING", "hybrid_fx"):
        for _ in range(3):
            got = engine.generate(**right, max_new_tokens=5)
            assert got.tolist() == hf_generate(model, **right, max_new_tokens=5).tolist()
        warned = [r for r in caplog.records if r.name == "hybrid_fx" and "pad left" in r.message]
        assert len(warned) == 1
        assert sum(engine.stats.fallbacks.values()) == 3


def test_a_random_adapter_of_each_kind_moves_the_tokens() -> None:
    plain = hf_generate(tiny("llama", layers=1), **CALL).tolist()
    assert hf_generate(ia3(), **CALL).tolist() != plain
    model = adapted(tiny("llama", layers=1))
    randomize_adapters(model, 1)
    assert hf_generate(model, **CALL).tolist() != plain
