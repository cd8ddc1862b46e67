"""Where the training graph does not serve a call, the module does, and the engine says so."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.training_steps import (
    assert_same_step,
    ids,
    model_of,
    packed,
    padded,
    served,
    skip_if_untraced,
    step,
)
from tiny_models import VOCAB

import hybrid_fx
from hybrid_fx.cache.disk import DiskStore
from hybrid_fx.errors import ConfigError, StrictError
from hybrid_fx.passes.operators import OPERATORS
from hybrid_fx.runtime.configured import Configured


def hybridized(model: Any, **options: Any) -> Any:
    return hybrid_fx.hybridize(model, train_graph=True, **options)


def a_mask_of_its_own() -> torch.Tensor:
    rows = torch.ones(11, 11, dtype=torch.bool).tril().expand(4, 1, 11, 11)
    return rows.clone()


CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "hidden states": ({"output_hidden_states": True}, "the argument output_hidden_states"),
    "a cache": ({"use_cache": True}, "use_cache=True"),
    "a 4-D mask": ({"attention_mask": a_mask_of_its_own()}, "attention_mask of another shape"),
    "one row of positions": (
        {"position_ids": torch.arange(11)[None]},
        "position_ids of another shape",
    ),
    "places by row": ({"logits_to_keep": ids()[:, :2] % 11, "labels": None}, "logits_to_keep"),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_the_graph_does_not_take_runs_as_the_module_with_the_reason(name: str) -> None:
    changes, reason = CALLS[name]
    model = model_of("llama")
    call = padded() | changes
    with hybridized(model) as engine:
        assert_same_step(step(engine, model, **call), step(model, model, **call))
        (said,) = engine.stats.fallbacks
        assert reason in said
        assert engine.stats.counters["captures"] == 0
    with hybridized(model, strict=True) as engine:
        with pytest.raises(StrictError, match="strict=False"):
            engine(**call)


def test_input_embeddings_run_as_the_module() -> None:
    model = model_of("llama")
    embeds = model.model.embed_tokens(ids()).detach()
    call = {"inputs_embeds": embeds, "labels": ids()}
    with hybridized(model) as engine:
        assert_same_step(step(engine, model, **call), step(model, model, **call))
        assert "the argument inputs_embeds" in next(iter(engine.stats.fallbacks))


def test_a_model_that_cannot_be_captured_trains_as_its_module() -> None:
    model = model_of("opt")
    model.model.decoder.layerdrop = 0.5
    with hybridized(model) as engine:
        for _ in range(2):
            assert_same_step(step(engine, model, **padded()), step(model, model, **padded()))
        ((said, times),) = engine.stats.fallbacks.items()
        assert "not captured" in said
        assert times == 2
        assert said in engine.explain().notes


def test_a_backward_hook_is_honoured_by_the_module() -> None:
    model = model_of("llama")
    with hybridized(model) as engine:
        seen: list[Any] = []
        handle = model.lm_head.register_full_backward_hook(lambda *given: seen.append(given))
        engine(**padded()).loss.backward()
        assert len(seen) == 1
        assert "a backward hook on lm_head" in next(iter(engine.stats.fallbacks))
        handle.remove()
        engine(**padded()).loss.backward()
        assert engine.stats.counters["train_graph_calls"] == len(seen) == 1


def test_a_graph_that_computes_something_else_is_found_and_never_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = Configured.__call__

    def other_scale(self: Any, *args: Any) -> Any:
        return plain(self, *args[:4], args[4] * (1 + 1e-6), *args[5:])

    def other_numbers(self: Any, *args: Any) -> Any:
        out = plain(self, *args)
        torch.rand(1)
        return out

    def other_gradient(self: Any, *args: Any) -> Any:
        return plain(self, *args[:2], args[2].detach(), *args[3:])

    model = model_of("qwen2")
    wrong: dict[str, tuple[Any, dict[str, Any]]] = {
        "differs from the module's": (other_scale, {}),
        "other random numbers": (other_numbers, {"use_cache": False}),
        "the gradient of": (other_gradient, {"labels": None, "logits_to_keep": 4}),
    }
    with hybridized(model, disk_cache=False) as engine:
        for reason, (mistake, changes) in wrong.items():
            call = padded() | changes
            monkeypatch.setattr(Configured, "__call__", mistake)
            assert_same_step(step(engine, model, **call), step(model, model, **call))
            assert reason in list(engine.stats.fallbacks)[-1]
        assert engine.stats.counters["captures"] == 1
        assert engine.stats.counters["train_graph_calls"] == 0


def test_a_stored_plan_that_is_wrong_is_captured_again_with_one_warning(tmp_path: Path) -> None:
    model = model_of("qwen2")
    with hybridized(model, cache_dir=str(tmp_path)) as engine:
        want = step(engine, model, **padded())
    (file,) = tmp_path.glob("*.json")
    store = DiskStore(tmp_path, operator_names=OPERATORS)
    plan = store.read(file.stem)
    assert plan is not None
    wrong = plan.sources["train"].replace("op.silu(", "op.gelu(")
    assert wrong != plan.sources["train"]
    store.write(file.stem, replace(plan, sources={"train": wrong}))
    with hybridized(model, cache_dir=str(tmp_path)) as engine:
        with pytest.warns(RuntimeWarning, match="captured again and the file replaced"):
            assert_same_step(step(engine, model, **padded()), want)
        assert served(engine) == engine.stats.counters["captures"] == 1
    assert store.read(file.stem) == plan


def test_an_embedding_longer_than_the_vocabulary_is_proven_within_it() -> None:
    model = model_of("llama")
    model.resize_token_embeddings(VOCAB + 8)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[:VOCAB].detach().clone())
    model.config.vocab_size = VOCAB
    with hybridized(model) as engine:
        assert_same_step(step(engine, model, **padded()), step(model, model, **padded()))
        assert served(engine) == 1


def test_what_the_model_gives_up_is_not_kept_for_it() -> None:
    model = model_of("llama")
    with hybridized(model) as engine:
        engine(**padded())
        old = weakref.ref(model.model.layers[1])
        model.model.layers = model.model.layers[:1]
        model.config.num_hidden_layers = 1
        assert_same_step(step(engine, model, **padded()), step(model, model, **padded()))
        assert served(engine) == 2
        gc.collect()
        assert old() is None


def test_a_proof_leaves_gradients_hooks_on_parameters_and_random_state_alone() -> None:
    model = model_of("gpt2")
    seen: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda _, name=name: seen.append(name))
        parameter.grad = torch.ones_like(parameter)
    torch.manual_seed(3)
    want = model(**padded()).loss
    after = torch.get_rng_state()
    torch.manual_seed(3)
    with hybridized(model) as engine:
        assert torch.equal(engine(**padded()).loss, want)
        assert torch.equal(torch.get_rng_state(), after)
        assert served(engine) == 1
    assert seen == []
    assert all(bool((p.grad == 1).all()) for p in model.parameters())


@pytest.mark.parametrize(("case", "reentrant"), [("gpt2", False), ("lora", True)])
def test_gradient_checkpointing_is_honoured(
    case: str, reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(case)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if case == "lora":
        model.enable_input_require_grads()
    want = step(model, model, **padded())
    with hybridized(model) as engine:
        assert_same_step(step(engine, model, **padded()), want)
        assert served(engine) == 1
        calls: list[Any] = []
        plain = Configured.__call__
        monkeypatch.setattr(
            Configured, "__call__", lambda self, *args: calls.append(self) or plain(self, *args)
        )
        loss = engine(**padded()).loss
        assert len(calls) == 1
        loss.backward()
        assert len(calls) == 2, "the layer was not computed again in the backward pass"


def test_positions_begin_new_sequences_under_checkpointing_as_in_the_module() -> None:
    model = model_of("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    call = {"input_ids": ids(), "position_ids": packed(), "labels": ids()}
    with hybridized(model) as engine:
        assert_same_step(step(engine, model, **call), step(model, model, **call))
        assert served(engine) == 1


def test_checkpointing_a_part_of_the_layers_is_refused_with_their_names() -> None:
    model = model_of("llama")
    model.gradient_checkpointing_enable()
    model.model.layers[0].gradient_checkpointing = False
    with hybridized(model) as engine:
        assert_same_step(step(engine, model, **padded()), step(model, model, **padded()))
        skip_if_untraced(engine)
        assert "model.layers.0" in next(iter(engine.stats.fallbacks))
    assert model.model.layers[1].gradient_checkpointing


@pytest.mark.parametrize("case", ["eager", pytest.param("lora", marks=pytest.mark.deep)])
def test_autocast_is_honoured(case: str) -> None:
    model = model_of(case)
    with hybridized(model, disk_cache=False) as engine:
        with torch.autocast("cpu", torch.bfloat16):
            want = step(model, model, **padded())
            assert_same_step(step(engine, model, **padded()), want)
        assert want.logits.dtype == torch.bfloat16
        assert_same_step(step(engine, model, **padded()), step(model, model, **padded()))
        skip_if_untraced(engine, differs="transformers 5.17 leaves autocast for rotary angles")
        assert served(engine) == 2
        assert engine.stats.counters["captures"] == 2


def test_bfloat16_weights_give_the_modules_step() -> None:
    model = model_of("mistral").to(torch.bfloat16)
    with hybridized(model) as engine:
        assert_same_step(step(engine, model, **padded()), step(model, model, **padded()))
        assert served(engine) == 1


@pytest.mark.deep
def test_switching_adapters_off_and_on_captures_each_state_once() -> None:
    model = model_of("lora")
    with hybridized(model, disk_cache=False) as engine:
        for _ in range(2):
            assert_same_step(step(engine, model, **padded()), step(model, model, **padded()))
            losses = []
            for forward in (engine, model):
                torch.manual_seed(0)
                with model.disable_adapter(), torch.no_grad():
                    losses.append(forward(**padded()).loss)
            assert torch.equal(*losses)
        assert served(engine) == 4
        assert engine.stats.counters["captures"] == 2


def test_two_engines_do_not_share_implementations() -> None:
    one, other = model_of("eager"), model_of("llama")
    with hybridized(one) as first, hybridized(other) as second:
        for engine in (first, second, first):
            model = engine.module
            assert_same_step(step(engine, model, **padded()), step(model, model, **padded()))
        assert (served(first), served(second)) == (2, 1)


def test_a_closed_engine_runs_the_module() -> None:
    model = model_of("llama")
    engine = hybridized(model)
    engine.close()
    assert_same_step(step(engine, model, **padded()), step(model, model, **padded()))
    assert served(engine) == 0


def test_the_option_must_be_a_bool() -> None:
    with pytest.raises(ConfigError, match="train_graph='yes' must be True or False"):
        hybrid_fx.HybridConfig(train_graph="yes")  # type: ignore[arg-type]
