"""The stamp differs whenever the key does, stays where nothing changed, and is cheap."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from call_counts import calls_of
from torch import nn

pytest.importorskip("peft")

from changes import FIELDS, MORE, Change, Steering, adapted_llama, layer, scaled_forward, tiny_llama

from hybrid_fx.cache.key import StructureKey
from hybrid_fx.cache.stamp import structure_stamp
from hybrid_fx.config import HybridConfig

CHANGES: dict[str, Change] = {**FIELDS, **{name: change for name, (_, change) in MORE.items()}}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_key_changes_the_stamp(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted_llama()
    before = structure_stamp(model, training=name == "modes")
    CHANGES[name](model, monkeypatch)
    after = structure_stamp(model, training=name == "modes")
    assert before != after
    assert after == structure_stamp(model, training=name == "modes")


def test_nothing_changed_keeps_the_stamp() -> None:
    model = adapted_llama()
    before = structure_stamp(model)
    ids = torch.tensor([[1, 2, 3]])
    for _ in range(3):
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        model.eval()
        model.generate(input_ids=ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
        assert structure_stamp(model) == before
    assert hash(structure_stamp(model)) == hash(before)


def test_values_alone_keep_the_stamp() -> None:
    model = tiny_llama()
    before = structure_stamp(model)
    for parameter in model.parameters():
        parameter.data = parameter.data + 1
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    assert structure_stamp(model) == before


def test_the_training_flags_count_for_the_training_graph_only() -> None:
    model = tiny_llama()
    eval_stamp, train_stamp = structure_stamp(model), structure_stamp(model, training=True)
    layer(model).train()
    assert structure_stamp(model) == eval_stamp
    assert structure_stamp(model, training=True) != train_stamp


def test_another_function_at_the_address_of_an_old_one_is_seen() -> None:
    model = tiny_llama()
    attention = layer(model).self_attn
    for factor in range(30):
        attention.helper = scaled_forward(float(factor))
        before = structure_stamp(model)
        del attention.helper
        attention.helper = scaled_forward(float(factor + 1))
        assert structure_stamp(model) != before


def test_a_number_that_a_hook_closes_over_or_carries_is_seen() -> None:
    model = tiny_llama()
    strength: Any = 1.0

    def steer(module: nn.Module, args: Any, output: Any) -> Any:
        return output * strength

    carried = Steering(1.0)
    layer(model).register_forward_hook(steer)
    layer(model).register_forward_hook(carried)
    stamps = [structure_stamp(model)]
    strength = 2.0
    stamps.append(structure_stamp(model))
    carried.strength = 3.0
    stamps.append(structure_stamp(model))
    assert stamps[0] != stamps[1] != stamps[2]
    assert stamps[2] == structure_stamp(model)


def test_a_config_changed_in_place_is_seen() -> None:
    model = tiny_llama()
    before = structure_stamp(model)
    model.config.rope_parameters["rope_theta"] = 1.0
    assert structure_stamp(model) != before


def test_equal_numbers_of_another_type_are_seen() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    stamps = []
    for value in (1, 1.0, True):
        model.scale = value  # type: ignore[assignment]
        stamps.append(structure_stamp(model))
    assert stamps[0] != stamps[1] != stamps[2] != stamps[0]


def test_a_stamp_keeps_no_module_and_no_weight_alive() -> None:
    model = tiny_llama()
    stamp = structure_stamp(model)
    gone = weakref.ref(model), weakref.ref(model.lm_head.weight)
    del model
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert stamp == stamp


def test_a_stamp_costs_little() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(170)))
    modules = len(list(model.modules()))
    # About 31 calls a module, which take 2 ms for 511 of them.
    assert calls_of(lambda: structure_stamp(model)) < 45 * modules


def test_a_backward_hook_is_no_part_of_what_generates() -> None:
    model = adapted_llama()
    stamps = {training: structure_stamp(model, training=training) for training in (False, True)}
    keys = {
        training: StructureKey.of(model, HybridConfig(), training=training) for training in stamps
    }
    layer(model).register_full_backward_hook(lambda module, gi, go: None)
    for training in (False, True):
        key = StructureKey.of(model, HybridConfig(), training=training)
        assert ("hooks" in key.differs(keys[training])) == training
        assert (structure_stamp(model, training=training) != stamps[training]) == training
