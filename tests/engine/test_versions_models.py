"""Law 5 on Hugging Face models: resized embeddings, and everything PEFT can do to adapters."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from engine.versioned_net import risen
from transformers import GPT2Config, GPT2LMHeadModel
from upstream_names import adapters_of_transformers

from hybrid_fx.engine.versions import WeightTracker

peft = pytest.importorskip("peft")


def tiny() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=8))


def lora(**options: object) -> object:
    given = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, **options}
    return peft.LoraConfig(**given)


@pytest.fixture
def adapted() -> object:
    model = peft.get_peft_model(tiny(), lora())
    model.add_adapter("other", lora(r=3))
    return model


@pytest.fixture
def tracker(adapted: torch.nn.Module) -> Iterator[WeightTracker]:
    tracker = WeightTracker(adapted)
    yield tracker
    tracker.close()


def test_resized_embeddings_raise_the_version() -> None:
    model = tiny()
    tracker = WeightTracker(model)
    assert "wte" in risen(tracker, lambda: model.resize_token_embeddings(40))
    tracker.close()


def test_untied_embeddings_raise_the_version() -> None:
    model = tiny()
    tracker = WeightTracker(model)
    fresh = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert "lm_head" in risen(tracker, lambda: setattr(model.lm_head, "weight", fresh))
    tracker.close()


def test_forwards_and_generate_leave_the_version() -> None:
    model = tiny().eval()
    tracker = WeightTracker(model, verify="checksum")
    ids = torch.tensor([[1, 2, 3]])
    model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    model(ids, labels=ids).loss.backward()
    assert tracker.refresh() == 0
    tracker.close()


def test_merge_and_unmerge_raise_the_version(adapted: object, tracker: WeightTracker) -> None:
    assert "merged () -> ('default',)" in risen(tracker, adapted.merge_adapter)
    assert "merged" in risen(tracker, adapted.unmerge_adapter)


def test_set_adapter_raises_the_version(adapted: object, tracker: WeightTracker) -> None:
    reason = risen(tracker, lambda: adapted.set_adapter("other"))
    assert "active ('default',) -> ('other',)" in reason
    risen(tracker, lambda: adapted.base_model.set_adapter(["default", "other"]))
    risen(tracker, lambda: adapted.base_model.set_adapter(["other", "default"]))


def test_disable_adapter_raises_the_version_going_in_and_out(
    adapted: object, tracker: WeightTracker
) -> None:
    before = tracker.refresh()
    with adapted.disable_adapter():
        inside = tracker.refresh()
        assert "disabled False -> True" in tracker.reason
    assert before < inside < tracker.refresh()


def test_a_changed_scaling_raises_the_version(adapted: object, tracker: WeightTracker) -> None:
    layer = adapted.base_model.model.transformer.h[1].attn.c_attn
    reason = risen(tracker, lambda: layer.set_scale("default", 0.5))
    assert "h.1.attn.c_attn" in reason
    assert "scaling" in reason
    risen(tracker, lambda: layer.scaling.update(other=9.0))


def test_adapters_added_and_deleted_raise_the_version(
    adapted: object, tracker: WeightTracker
) -> None:
    risen(tracker, lambda: adapted.add_adapter("third", lora()))
    risen(tracker, lambda: adapted.delete_adapter("third"))


def test_a_step_on_the_adapter_raises_the_version(
    adapted: torch.nn.Module, tracker: WeightTracker
) -> None:
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    ids = torch.tensor([[1, 2, 3]])
    adapted(ids, labels=ids).loss.backward()
    assert "AdamW" in risen(tracker, optimizer.step)


@pytest.mark.parametrize("kind", ["ia3", "modules_to_save", "prompt"])
def test_other_kinds_of_adapters_are_read(kind: str) -> None:
    config = {
        "ia3": lambda: peft.IA3Config(
            target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True
        ),
        "modules_to_save": lambda: lora(modules_to_save=["ln_f"]),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    }[kind]()
    model = peft.get_peft_model(tiny(), config)
    tracker = WeightTracker(model)
    assert tracker.refresh() == 0
    with model.disable_adapter():
        assert tracker.refresh() == 1
        assert "disabled" in tracker.reason
    assert tracker.refresh() == 2
    tracker.close()


@adapters_of_transformers
def test_adapters_put_in_by_transformers_are_read() -> None:
    model = tiny()
    model.add_adapter(lora(), adapter_name="one")
    tracker = WeightTracker(model)
    assert tracker.refresh() == 0
    assert "disabled False -> True" in risen(tracker, model.disable_adapters)
    risen(tracker, model.enable_adapters)
    tracker.close()
