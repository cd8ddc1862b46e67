"""Law 6: close() puts everything back; copies of a hybridized model are plain models."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from laws.against_hf import assert_bit_identical, hf_generate, tensors_of
from tiny_models import adapted, prompt, reweigh, tiny
from torch.optim import optimizer as torch_optimizer
from transformers import AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hybrid_fx

CALL = prompt((4, 1, 7), 6) | {"max_new_tokens": 8}


def test_a_backward_hook_runs_in_training_and_keeps_no_call_from_the_graphs() -> None:
    model, seen = tiny("llama", layers=1), []
    layer = model.model.layers[0]
    layer.mlp.register_full_backward_hook(lambda module, into, out: seen.append(out[0].shape))
    layer.register_full_backward_pre_hook(lambda module, out: seen.append(out[0].shape))
    with hybrid_fx.hybridize(model, disk_cache=False) as engine:
        for count in (2, 4):
            assert engine.generate(**CALL).tolist() == hf_generate(model, **CALL).tolist()
            assert not engine.stats.fallbacks
            engine(**prompt((5, 3)), labels=torch.ones(2, 5).long()).loss.backward()
            assert seen == [(2, 5, 32)] * count


def surroundings(model: Any) -> dict[str, Any]:
    """Everything outside of its own objects that an engine could have touched."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return {
        "attention": dict(ALL_ATTENTION_FUNCTIONS._global_mapping),
        "masks": dict(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping),
        "steps": dict(torch_optimizer._global_optimizer_post_hooks),
        "before steps": dict(torch_optimizer._global_optimizer_pre_hooks),
        "implementations": [c._attn_implementation for c in configs.values()],
        "instances": [sorted(vars(m)) for m in model.modules()],
        "hooks": [[list(getattr(m, hook).values()) for hook in hooks] for m in model.modules()],
        "flags": [m.training for m in model.modules()],
        "classes": [type(m) for m in model.modules()],
        "grad": torch.is_grad_enabled(),
        "requires": [p.requires_grad for p in model.parameters()],
    }


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_close_puts_everything_back(lora: bool) -> None:
    model = adapted(tiny("llama", layers=1)) if lora else tiny("gpt2")
    before, weights = surroundings(model), tensors_of(model)
    plain = hf_generate(model, **CALL).tolist()
    engine = hybrid_fx.hybridize(model, disk_cache=False)
    assert "generate" in vars(model)
    engine.generate(**CALL)
    model.generate(**CALL, num_beams=2)  # by HF's loop, with a forward of ours for its time
    engine.train()
    engine.eval()
    engine.close()
    engine.close()
    assert surroundings(model) == before
    assert_bit_identical(tensors_of(model), weights)
    assert model.generate.__func__ is type(model).generate
    assert model.generate(**CALL).tolist() == plain
    with pytest.raises(hybrid_fx.EngineClosedError, match="hybridize"):
        engine.generate(**CALL)
    ids = CALL["input_ids"]
    assert engine(input_ids=ids).logits.shape[:2] == ids.shape  # the model itself still runs


def test_close_frees_the_memory_and_drops_the_hold_on_the_model() -> None:
    model = tiny("gpt2", layers=1)
    engine = hybrid_fx.hybridize(model)
    engine.generate(**CALL)
    runner = engine._graphs.runner
    engine.close()
    held = 0 if runner is None else runner.workspace.nbytes + runner.prepared.nbytes
    assert held == 0
    watched = weakref.ref(model)
    del model, engine, runner
    gc.collect()
    assert watched() is None, "a closed engine's model can be freed"


def test_a_generate_that_was_on_the_instance_comes_back() -> None:
    model = tiny("gpt2", layers=1)
    own = model.generate
    model.generate = own
    hybrid_fx.hybridize(model).close()
    assert vars(model)["generate"] is own


def test_a_closed_model_can_be_hybridized_again() -> None:
    model = tiny("gpt2", layers=1)
    for seed in (1, 2):
        reweigh(model, seed)
        with hybrid_fx.hybridize(model) as engine:
            assert engine.generate(**CALL).tolist() == hf_generate(model, **CALL).tolist()


def after_training(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.tensor([[3, 4, 5, 6]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_a_copy_generates_by_transformers_on_its_own_weights(way: str, lora: bool) -> None:
    model = adapted(tiny("llama", layers=1)) if lora else tiny("gpt2", layers=1)
    with hybrid_fx.hybridize(model) as engine:
        before = engine.generate(**CALL).tolist()
        if way == "deepcopy":
            twin = copy.deepcopy(model)
        elif way == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        assert_bit_identical(tensors_of(twin), tensors_of(model))
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        after_training(model)
        calls = engine.stats.counters["generate_calls"]
        assert twin.generate(**CALL).tolist() == before
        assert engine.stats.counters["generate_calls"] == calls, "a copy is not the engine's"
        now = engine.generate(**CALL).tolist()
        assert now == hf_generate(model, **CALL).tolist()
        assert now != before
        with hybrid_fx.hybridize(twin) as other:
            assert other is not engine
            assert other.generate(**CALL).tolist() == before
        assert twin.generate(**CALL).tolist() == before


def test_a_deep_copy_of_the_engine_serves_a_copy_of_the_model() -> None:
    engine = hybrid_fx.hybridize(tiny("gpt2", layers=1))
    before = engine.generate(**CALL).tolist()
    twin = copy.deepcopy(engine)
    reweigh(engine.module, 9)
    assert twin.module is not engine.module
    assert twin.generate(**CALL).tolist() == before
    assert engine.generate(**CALL).tolist() != before
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(engine)
    twin.close()
    engine.close()


def test_state_dict_and_save_pretrained_are_those_of_the_plain_model(tmp_path: Any) -> None:
    model = tiny("llama", layers=1)
    plain = copy.deepcopy(model)
    with hybrid_fx.hybridize(model) as engine:
        engine.generate(**CALL)
        assert_bit_identical(model.state_dict(), plain.state_dict())
        assert_bit_identical(engine.state_dict(), plain.state_dict())
        model.save_pretrained(tmp_path / "ours")
        engine.save_pretrained(tmp_path / "engine")
        plain.save_pretrained(tmp_path / "plain")
        for name in ("config.json", "generation_config.json", "model.safetensors"):
            wanted = (tmp_path / "plain" / name).read_bytes()
            assert (tmp_path / "ours" / name).read_bytes() == wanted
            assert (tmp_path / "engine" / name).read_bytes() == wanted
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
        assert loaded.generate(**CALL).tolist() == engine.generate(**CALL).tolist()


def test_save_pretrained_of_an_adapter_is_that_of_the_plain_model(tmp_path: Any) -> None:
    model = adapted(tiny("llama", layers=1))
    model.save_pretrained(tmp_path / "plain")
    with hybrid_fx.hybridize(model) as engine:
        engine.generate(**CALL)
        model.save_pretrained(tmp_path / "ours")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
