"""``train_graph=True``: a training step on the captured graph is the module's, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine.training_steps import assert_same_step, ids, model_of, packed, padded, served, step
from upstream_names import CACHE

import hybrid_fx

CASES = ("llama", "eager", "qwen2", "gpt2", "opt", "mistral", "phi3", "lora")


def hybridized(model: Any, **options: Any) -> Any:
    return hybrid_fx.hybridize(model, train_graph=True, **options)


@pytest.mark.parametrize("case", CASES)
def test_loss_logits_gradients_and_random_state_are_the_modules(case: str) -> None:
    model = model_of(case)
    want = step(model, model, **padded())
    with hybridized(model) as engine:
        assert_same_step(step(engine, model, **padded()), want)
        kept = {key: value for key, value in padded().items() if key != "labels"}
        kept["logits_to_keep"] = 4
        assert_same_step(step(engine, model, **kept), step(model, model, **kept))
        assert served(engine) == 2


CALLS: dict[str, dict[str, Any]] = {
    "no mask": {"labels": ids()},
    "no mask, no cache": {"labels": ids(), "use_cache": False},
    "packed": {"labels": ids(), "position_ids": packed(), "use_cache": False},
    "positions beside a cache": {"labels": ids(), "position_ids": packed()},
    "a mask of ones": {"labels": ids(), "attention_mask": torch.ones_like(ids())},
    "a mask of bools": padded() | {"attention_mask": padded()["attention_mask"].bool()},
    "items counted": padded() | {"num_items_in_batch": 7},
    "another ignored label": {"labels": ids(), "ignore_index": 3},
    "shifted labels": padded() | {"shift_labels": ids().roll(-1, 1)},
    "places kept": {"logits_to_keep": torch.tensor([0, 3, 9])},
    "one row": {"input_ids": ids()[:1], "labels": ids()[:1]},
    "one token": {"input_ids": ids()[:, :1]},
}


@pytest.fixture(scope="module")
def llama() -> Any:
    model = model_of("llama")
    with hybridized(model) as engine:
        yield engine


@pytest.mark.parametrize("name", CALLS)
def test_every_way_to_call_gives_the_modules_step(name: str, llama: Any) -> None:
    call = {"input_ids": ids()} | CALLS[name]
    before = served(llama)
    want = step(llama.module, llama.module, **call)
    assert_same_step(step(llama, llama.module, **call), want)
    assert served(llama) == before + 1


def test_a_family_that_looks_for_no_packing_gives_its_step_too() -> None:
    model = model_of("opt")
    call = {"input_ids": ids(), "labels": ids(), "position_ids": packed(), "use_cache": False}
    with hybridized(model) as engine:
        assert_same_step(step(engine, model, **call), step(model, model, **call))
        assert served(engine) == 1


def test_the_row_of_padding_is_not_trained_in_the_graph_either(llama: Any) -> None:
    padding = llama.module.model.embed_tokens.padding_idx
    assert bool((ids() == padding).any())
    gradient = step(llama, llama.module, input_ids=ids(), labels=ids()).gradients
    assert not gradient["model.embed_tokens.weight"][padding].any()


def test_a_tuple_is_returned_where_the_call_asks_for_one(llama: Any) -> None:
    torch.manual_seed(0)
    loss, logits = llama(**padded(), return_dict=False)
    torch.manual_seed(0)
    want = llama.module(**padded())
    assert torch.equal(loss, want.loss)
    assert torch.equal(logits, want.logits)


def test_the_result_is_the_models_own_class_without_a_cache(llama: Any) -> None:
    out = llama(**padded())
    assert type(out) is type(llama.module(**padded()))
    assert getattr(out, CACHE) is None


def test_positional_arguments_are_the_forwards_own(llama: Any) -> None:
    before = served(llama)
    torch.manual_seed(0)
    got = llama(ids(), padded()["attention_mask"]).logits
    torch.manual_seed(0)
    assert torch.equal(got, llama.module(ids(), padded()["attention_mask"]).logits)
    assert served(llama) == before + 1


def test_gradients_accumulate_and_a_graph_can_be_kept() -> None:
    model = model_of("qwen2")
    model.model.layers[0].mlp.requires_grad_(False)
    found = []
    with hybridized(model) as engine:
        for forward in (model, engine):
            torch.manual_seed(0)
            model.zero_grad(set_to_none=True)
            forward(**padded()).loss.backward()
            loss = forward(input_ids=ids(), labels=ids()).loss
            loss.backward(retain_graph=True)
            loss.backward()
            found.append({n: p.grad for n, p in model.named_parameters()})
        assert served(engine) == 2
    for name, gradient in found[0].items():
        frozen = ".mlp." in name
        assert (gradient is None) == (found[1][name] is None) == frozen, name
        assert frozen or torch.equal(gradient, found[1][name]), name


def test_the_graph_reads_the_parameters_that_the_model_has_now(llama: Any) -> None:
    model = llama.module
    captures = llama.stats.counters["captures"]
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    assert_same_step(step(llama, model, **padded()), step(model, model, **padded()))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 0.5)
    assert_same_step(step(llama, model, **padded()), step(model, model, **padded()))
    assert llama.stats.counters["captures"] == captures
    assert served(llama)


def test_a_part_that_stands_in_eval_stays_without_dropout() -> None:
    model = model_of("gpt2")
    model.transformer.drop.eval()
    with hybridized(model) as engine:
        assert_same_step(step(engine, model, **padded()), step(model, model, **padded()))
        assert served(engine) == 1


def test_a_model_in_eval_is_the_modules_business() -> None:
    model = model_of("llama").eval()
    with hybridized(model) as engine:
        engine(**padded()).loss.backward()
        assert served(engine) == 0
        assert engine.stats.counters["captures"] == 0


def test_without_the_option_nothing_is_captured() -> None:
    model = model_of("llama")
    with hybrid_fx.hybridize(model) as engine:
        engine(**padded()).loss.backward()
        assert served(engine) == engine.stats.counters["captures"] == 0


def test_the_graph_is_captured_once_and_a_second_engine_reads_it_from_the_disk(
    tmp_path: Any,
) -> None:
    losses = []
    for captures, hits in ((1, 0), (0, 1)):
        model = model_of("opt")
        with hybridized(model, cache_dir=str(tmp_path)) as engine:
            for _ in range(3):
                losses.append(step(engine, model, **padded()).loss)
            assert served(engine) == 3
            assert engine.stats.counters["captures"] == captures
            assert engine.stats.counters["cache_hits_disk"] == hits
    assert all(torch.equal(loss, losses[0]) for loss in losses)


def test_the_source_of_the_graph_can_be_read(llama: Any) -> None:
    llama(**padded())
    source = llama.explain().sources["train"]
    assert source.count("def decoder_layer(") == 1
    assert source.count("= decoder_layer(") == 2
    assert "op.attend_as_configured(" in source
    assert "def train(input_ids, attention_mask, position_ids, causal_mask, window_mask" in source


def test_labels_of_a_wrong_shape_raise_as_the_module_does(llama: Any) -> None:
    call = {"input_ids": ids(), "labels": ids()[:, :5]}
    with pytest.raises(ValueError) as wanted:
        llama.module(**call)
    with pytest.raises(ValueError, match="batch_size") as got:
        llama(**call)
    assert str(got.value) == str(wanted.value)
