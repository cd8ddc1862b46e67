"""A model whose weights lie elsewhere generates as transformers does; a wrapper names its model."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pytest
import torch
from laws.against_hf import hf_generate
from tiny_models import adapted, prompt, tiny
from torch import nn

import hybrid_fx

accelerate = pytest.importorskip("accelerate")

CALL = prompt((4, 1, 7), 6) | {"max_new_tokens": 5}
SAMPLED = CALL | {"do_sample": True, "temperature": 1.5}
CPU = torch.device("cpu")
DISK = ("model.layers.0", "lm_head")
PLACES = dict.fromkeys(
    ("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb"), "cpu"
) | dict.fromkeys(DISK, "disk")


def dispatch(model: Any, places: dict[str, str]) -> None:
    folder = tempfile.mkdtemp()
    accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=folder, force_hooks=True
    )


def stay_with_hook(model: Any) -> None:
    accelerate.cpu_offload_with_hook(model, execution_device="cpu")


# Name -> (what puts the weights elsewhere, what is said of it).
OFFLOADS: dict[str, tuple[Callable[[Any], object], str]] = {
    "cpu": (lambda model: accelerate.cpu_offload(model, execution_device=CPU), "is offloaded"),
    "disk": (lambda m: accelerate.disk_offload(m, tempfile.mkdtemp(), CPU), "is offloaded"),
    "map": (lambda model: dispatch(model, PLACES), "is offloaded"),
    "map without offload": (lambda model: dispatch(model, {"": "cpu"}), "by a device map"),
    "hook": (stay_with_hook, "the model is offloaded"),
}


def seeded(generate: Callable[..., Any], call: dict[str, Any]) -> tuple[Any, Any]:
    """The tokens from one random state, and the state that is left."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return generate(**call).tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("verify", ["off", "checksum"])
@pytest.mark.parametrize("name", OFFLOADS)
def test_an_offloaded_model_generates_as_transformers_does(
    name: str, verify: Any, caplog: pytest.LogCaptureFixture
) -> None:
    offload, said = OFFLOADS[name]
    plain, model = tiny("llama"), tiny("llama")
    offload(plain), offload(model)
    engine = hybrid_fx.hybridize(model, verify_weights=verify)
    for call in (CALL, SAMPLED):
        assert seeded(engine.generate, call) == seeded(plain.generate, call)
    (reason,) = engine.stats.fallbacks
    assert said in reason
    assert caplog.text.count("runs as transformers' module") == 1
    assert any(said in note for note in engine.explain().notes)
    assert engine.weight_version == 0
    engine.train()
    assert torch.equal(engine(CALL["input_ids"]).logits, plain.train()(CALL["input_ids"]).logits)
    engine.eval()
    assert engine.generate(**CALL).tolist() == hf_generate(plain, **CALL).tolist()
    engine.close()
    assert sorted(vars(model)) == sorted(vars(plain))


def test_a_model_offloaded_later_leaves_the_graphs_and_comes_back_to_them() -> None:
    model = tiny("llama")
    want = hf_generate(model, **CALL).tolist()
    with hybrid_fx.hybridize(model, share_storage=True) as engine:
        assert engine.generate(**CALL).tolist() == want
        assert not engine.stats.fallbacks
        accelerate.cpu_offload(model, execution_device=CPU)
        version = engine.weight_version
        for _ in range(2):
            assert engine.generate(**CALL).tolist() == want
        assert engine.weight_version == version
        assert sum(engine.stats.fallbacks.values()) == 2
        accelerate.hooks.remove_hook_from_submodules(model)
        with torch.no_grad():
            model.lm_head.weight.neg_()
        assert engine.generate(**CALL).tolist() == hf_generate(model, **CALL).tolist() != want
        assert sum(engine.stats.fallbacks.values()) == 2


def test_an_offloaded_model_is_refused_where_strict_and_copied_where_asked() -> None:
    model = tiny("llama")
    accelerate.cpu_offload(model, execution_device=CPU)
    with hybrid_fx.hybridize(model, strict=True) as engine:
        with pytest.raises(hybrid_fx.StrictError, match="is offloaded"):
            engine.generate(**CALL)
    with hybrid_fx.hybridize(model) as engine, copy.deepcopy(engine) as other:
        assert other.generate(**CALL).tolist() == hf_generate(model, **CALL).tolist()


def test_an_offloaded_model_under_an_adapter_generates_as_transformers_does() -> None:
    model = adapted(tiny("llama"))
    accelerate.cpu_offload(model, execution_device=CPU)
    want = model.generate(**CALL).tolist()
    with hybrid_fx.hybridize(model) as engine:
        assert engine.generate(**CALL).tolist() == want
        assert "is offloaded" in next(iter(engine.stats.fallbacks))


class ValueHead(nn.Module):
    """A language model and a value for each token, as PPO trainers have them."""

    def __init__(self, pretrained_model: Any) -> None:
        super().__init__()
        self.pretrained_model = pretrained_model
        self.config = pretrained_model.config
        self.v_head = nn.Linear(self.config.hidden_size, 1)

    def forward(self, input_ids: torch.Tensor, **others: Any) -> Any:
        out = self.pretrained_model(input_ids, output_hidden_states=True, **others)
        return out.logits, out.loss, self.v_head(out.hidden_states[-1]).squeeze(-1)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.pretrained_model.generate(*args, **kwargs)


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


WRAPPERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "data parallel": (torch.nn.DataParallel, "model.module"),
    "compiled": (compiled, "model._orig_mod"),
    "value head": (ValueHead, "model.pretrained_model"),
    "two": (lambda model: torch.nn.DataParallel(ValueHead(model)), "model.module.pretrained_model"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_is_refused_by_the_object_to_pass_and_generates_through_it(name: str) -> None:
    wrap, named = WRAPPERS[name]
    inner = tiny("llama")
    model = wrap(inner)
    before = sorted(vars(model))
    with pytest.raises(hybrid_fx.InputError, match=f"around a LlamaForCausalLM; pass .*{named}:"):
        hybrid_fx.hybridize(model)
    assert sorted(vars(model)) == before
    want = hf_generate(inner, **CALL).tolist()
    with hybrid_fx.hybridize(attrgetter(named.removeprefix("model."))(model)) as engine:
        assert engine.module is inner
        if "generate" in dir(type(model)) or name == "compiled":
            assert model.generate(**CALL).tolist() == want
            assert engine.stats.counters["generate_calls"] == 1
        version = engine.weight_version
        out = model(CALL["input_ids"], labels=CALL["input_ids"])
        (out[1] if isinstance(out, tuple) else out.loss).backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        assert engine.weight_version > version
        assert engine.generate(**CALL).tolist() == hf_generate(inner, **CALL).tolist()
        assert not engine.stats.fallbacks


def test_a_model_that_compiled_its_own_call_generates_the_same_tokens() -> None:
    model = tiny("llama")
    want = hf_generate(model, **CALL).tolist()
    model.compile(backend="eager")
    with hybrid_fx.hybridize(model) as engine:
        assert engine.generate(**CALL).tolist() == want
        assert not engine.stats.fallbacks
        engine(CALL["input_ids"], labels=CALL["input_ids"]).loss.backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        assert engine.generate(**CALL).tolist() == hf_generate(model, **CALL).tolist() != want
