"""Law 5: after each kind of change generate follows the new weights; without one, no work."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from laws.against_hf import hf_generate
from tiny_models import adapted, prompt, reweigh, tiny
from torch import nn

import hybrid_fx

CALL = prompt((4, 1, 7), 6) | {"max_new_tokens": 12}
WORK = ("prepares", "captures", "cache_hits_memory", "cache_hits_disk")


def work(engine: Any) -> dict[str, int]:
    return {name: engine.stats.counters[name] for name in WORK}


def plans_made(engine: Any) -> int:
    """Captures, and plans that another test left on the disk instead of one."""
    return work(engine)["captures"] + work(engine)["cache_hits_disk"]


@pytest.fixture
def engine() -> Iterator[Any]:
    with hybrid_fx.hybridize(tiny("llama"), lora="fold") as engine:
        engine.generate(**CALL)
        yield engine


def train(engine: Any, optimizer: torch.optim.Optimizer) -> None:
    ids = torch.tensor([[3, 4, 5, 6]])
    engine.train()

    def closure() -> Any:
        optimizer.zero_grad()
        # Past the engine, whose forward with gradients counts as a change by itself.
        loss = engine.module(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    engine.eval()


def by(make: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda engine: train(engine, make(engine.module.parameters()))


class OwnOptimizer(torch.optim.Optimizer):
    """Writes through ``.data``, which counts no version."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(0.3 * parameter.grad)


def load(engine: Any) -> None:
    engine.module.load_state_dict(tiny("llama", 5).state_dict())


def load_and_assign(engine: Any) -> None:
    engine.module.load_state_dict(tiny("llama", 5).state_dict(), assign=True)


def write_in_place(engine: Any) -> None:
    with torch.no_grad():
        engine.module.model.layers[1].self_attn.v_proj.weight.mul_(-3)


def assign_data(engine: Any) -> None:
    weight = engine.module.model.layers[0].mlp.down_proj.weight
    weight.data = weight.detach() * -3


def replace_parameter(engine: Any) -> None:
    head = engine.module.lm_head
    head.weight = nn.Parameter(head.weight.detach().flip(0).clone())


def write_buffer(engine: Any) -> None:
    engine.module.model.rotary_emb.inv_freq.mul_(0.3)


def write_norm(engine: Any) -> None:
    with torch.no_grad():
        engine.module.model.norm.weight[::2] *= -1


def tell(engine: Any) -> None:
    engine.module.model.layers[0].mlp.up_proj.weight.data.mul_(-3)
    engine.weights_changed()


# What changes values only: prepared again, never captured again.
VALUES: dict[str, Callable[[Any], None]] = {
    "sgd": by(lambda p: torch.optim.SGD(p, lr=0.5)),
    "adamw foreach": by(lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True)),
    "adamw fused": by(lambda p: torch.optim.AdamW(p, lr=0.05, fused=True)),
    "sgd fused": by(lambda p: torch.optim.SGD(p, lr=0.5, fused=True)),
    "lbfgs": by(lambda p: torch.optim.LBFGS(p, lr=1.0, max_iter=15)),
    "own optimizer": by(OwnOptimizer),
    "load_state_dict": load,
    "assigned state": load_and_assign,
    "in place": write_in_place,
    "new data": assign_data,
    "new parameter": replace_parameter,
    "buffer": write_buffer,
    "norm": write_norm,
    "told by hand": tell,
}


@pytest.mark.parametrize("name", VALUES)
def test_changed_values_are_prepared_again_and_nothing_else(engine: Any, name: str) -> None:
    before, worked = engine.generate(**CALL).tolist(), work(engine)
    version = engine.weight_version
    VALUES[name](engine)
    after = engine.generate(**CALL).tolist()
    assert after == hf_generate(engine.module, **CALL).tolist()
    assert after != before, "a change that moves no token proves nothing"
    assert engine.weight_version > version
    assert work(engine) == {**worked, "prepares": worked["prepares"] + 1}
    assert engine.stats.counters["hf_forwards"] == 0


def test_nothing_changed_is_no_work(engine: Any) -> None:
    worked, version = work(engine), engine.weight_version
    for _ in range(3):
        engine.train()
        engine.eval()
        engine.generate(**CALL)
        engine.module.generate(**CALL)
        with torch.no_grad():
            engine(input_ids=CALL["input_ids"])
        engine.explain()
        engine.module.state_dict()
        copy.deepcopy(engine.module)
    assert work(engine) == worked
    assert engine.weight_version == version


def test_a_forward_with_gradients_counts_as_a_change(engine: Any) -> None:
    version, prepares = engine.weight_version, work(engine)["prepares"]
    engine(input_ids=CALL["input_ids"])
    assert engine.weight_version > version
    engine.generate(**CALL)
    assert work(engine)["prepares"] == prepares + 1


@pytest.mark.parametrize("how", ["data", "numpy"])
def test_writes_that_nothing_counts_are_found_by_the_checksum(how: str) -> None:
    model = tiny("llama")
    with hybrid_fx.hybridize(model, verify_weights="checksum") as engine:
        before = engine.generate(**CALL).tolist()
        prepares = engine.stats.counters["prepares"]
        weight = model.model.layers[0].self_attn.o_proj.weight
        if how == "data":
            weight.data.mul_(-3)
        else:
            weight.detach().numpy()[:] *= -3
        after = engine.generate(**CALL).tolist()
        assert after == hf_generate(model, **CALL).tolist()
        assert after != before
        assert engine.stats.counters["prepares"] == prepares + 1
        engine.generate(**CALL)
        assert engine.stats.counters["prepares"] == prepares + 1


def resize(model: Any) -> None:
    model.resize_token_embeddings(70, mean_resizing=False)
    reweigh(model, 3)


def replace_submodule(model: Any) -> None:
    replacement = copy.deepcopy(model.model.layers[0].mlp)
    replacement.act_fn = nn.GELU()
    model.model.layers[0].mlp = replacement


def drop_layer(model: Any) -> None:
    del model.model.layers[1]
    model.config.num_hidden_layers = 1


def patch_forward(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: -2.0 * plain(x)


def add_hook(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out * -2.0)


def cast(model: Any) -> None:
    model.double()
    reweigh(model, 8)


# What changes the structure: captured again.
STRUCTURES: dict[str, Callable[[Any], None]] = {
    "resized embeddings": resize,
    "replaced submodule": replace_submodule,
    "fewer layers": drop_layer,
    "patched forward": patch_forward,
    "forward hook": add_hook,
    "another dtype": cast,
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_changed_structure_is_captured_again(name: str) -> None:
    model = tiny("llama")
    with hybrid_fx.hybridize(model) as engine:
        before = engine.generate(**CALL).tolist()
        plans = plans_made(engine)
        STRUCTURES[name](model)
        after = engine.generate(**CALL).tolist()
        assert after == hf_generate(model, **CALL).tolist()
        assert after != before
        assert plans_made(engine) == plans + 1
        assert engine.stats.counters["hf_forwards"] == 0
        engine.generate(**CALL)
        assert plans_made(engine) == plans + 1


def test_adapters_added_and_deleted_are_captured_again_and_right() -> None:
    import peft

    model = adapted(tiny("llama", layers=1), target_modules=["q_proj", "v_proj"])
    with hybrid_fx.hybridize(model, disk_cache=False) as engine:
        one = engine.generate(**CALL).tolist()
        assert engine.stats.counters["captures"] == 1
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["o_proj"]))
        with torch.no_grad():
            model.base_model.model.model.layers[0].self_attn.o_proj.lora_B.other.weight.fill_(0.2)
        model.base_model.set_adapter(["default", "other"])
        model.eval()
        both = engine.generate(**CALL).tolist()
        assert both == hf_generate(model, **CALL).tolist() != one
        assert engine.stats.counters["captures"] == 2
        model.set_adapter("default")
        model.delete_adapter("other")
        assert engine.generate(**CALL).tolist() == one == hf_generate(model, **CALL).tolist()


def test_the_scaling_of_an_adapter_is_followed() -> None:
    model = adapted(tiny("llama", layers=1), target_modules=["q_proj", "v_proj"])
    with hybrid_fx.hybridize(model) as engine:
        seen = set()
        for scale in (1.0, -8.0, 4.0):
            for module in model.modules():
                if hasattr(module, "lora_A") and hasattr(module, "set_scale"):
                    module.set_scale("default", scale)
            got = engine.generate(**CALL).tolist()
            assert got == hf_generate(model, **CALL).tolist()
            seen.add(str(got))
        assert len(seen) > 1
