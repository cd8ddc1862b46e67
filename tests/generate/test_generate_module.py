"""What only the original module can do runs there, with HF's tokens, and says why."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from generate.same_as_hf import is_fast, new_model, prompt, run, same_as_hf, shared_model, watched
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import GenerationConfig

from hybrid_fx.errors import StrictError
from hybrid_fx.generate import RULES, Route, generate
from hybrid_fx.generate.request import resolve
from hybrid_fx.generate.routes import choose

ROWS = prompt((3, 9, 1, 6))
RIGHT = prompt((3, 9, 1, 6), side="right")
HOLED = ROWS["attention_mask"].clone()
HOLED[1, 4] = 0
EMPTY = ROWS["attention_mask"].clone()
EMPTY[2] = 0
SOFT = ROWS["attention_mask"] * 2

MODULE: dict[str, tuple[str, dict[str, Any]]] = {
    "right padding": ("a right-padded attention mask", RIGHT),
    "right padding, inferred": (
        "a right-padded attention mask",
        {"input_ids": RIGHT["input_ids"]},
    ),
    "holes": ("an attention mask with holes", ROWS | {"attention_mask": HOLED}),
    "only padding": (
        "an attention mask with a row of padding only",
        ROWS | {"attention_mask": EMPTY},
    ),
    "weights as mask": (
        "an attention mask with values other than 0 and 1",
        ROWS | {"attention_mask": SOFT},
    ),
    "attentions": (
        "output_attentions",
        ROWS | {"output_attentions": True, "return_dict_in_generate": True},
    ),
    "hidden states": (
        "output_hidden_states",
        ROWS | {"output_hidden_states": True, "return_dict_in_generate": True},
    ),
    "two reasons": (
        "a right-padded attention mask; output_hidden_states",
        RIGHT | {"output_hidden_states": True},
    ),
    "guidance": (
        "guidance_scale: the guidance runs the module itself at each step",
        ROWS | {"guidance_scale": 1.5},
    ),
    "early exit": (
        "assistant_early_exit",
        {"input_ids": ROWS["input_ids"][1:2], "assistant_early_exit": 1},
    ),
}


def _greedy(model: Any, input_ids: Any, stopping_criteria: Any, **kwargs: Any) -> Any:
    kwargs.pop("logits_processor")
    while not stopping_criteria(input_ids, None).all():
        step = model(input_ids).logits[:, -1].argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, step], -1)
    return input_ids


@pytest.mark.parametrize("name", MODULE)
def test_the_module_keeps_hfs_tokens_and_the_reason_is_told(name: str) -> None:
    why, kwargs = MODULE[name]
    model = new_model()
    model.set_attn_implementation("eager")
    ran = same_as_hf(model, **kwargs, max_new_tokens=6, do_sample="exit" not in name)
    assert ran.fallbacks == [f"HF module: {why}"]
    assert ran.runner.sessions == []


def test_a_custom_loop_is_run_by_hf() -> None:
    ids = prompt((8, 8))["input_ids"]
    ran = same_as_hf(shared_model(), ids, max_new_tokens=4, custom_generate=_greedy)
    assert ran.fallbacks == ["HF module: custom_generate"]


def test_a_model_that_assists_itself_runs_the_module() -> None:
    model = new_model()
    ran = same_as_hf(model, **prompt((5,)), assistant_model=model, max_new_tokens=6)
    assert ran.fallbacks == ["HF module: the model is its own assistant"]


def test_autocast_is_honoured() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        ran = same_as_hf(shared_model(), **ROWS, max_new_tokens=6)
    assert ran.fallbacks == ["HF module: autocast is on for cpu"]


def test_contrastive_search_is_left_to_hf_and_its_hub_code() -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        run(shared_model(), **ROWS, penalty_alpha=0.6, top_k=4, max_new_tokens=4)


def test_without_a_runner_the_module_runs() -> None:
    for runner in (None, lambda: None):
        ran = run(shared_model(), **ROWS, max_new_tokens=5, runner=runner)
        assert ran.fallbacks == ["HF module: no captured graph"]
        expected = shared_model().generate(**ROWS, max_new_tokens=5)
        assert ran.result.tolist() == expected.tolist()


def test_a_runner_is_made_only_where_one_is_needed() -> None:
    made: list[str] = []

    def make() -> None:
        made.append("runner")

    run(shared_model(), **RIGHT, max_new_tokens=3, runner=make)
    assert made == []
    run(shared_model(), **ROWS, max_new_tokens=3, runner=make)
    assert made == ["runner"]


@pytest.mark.parametrize(
    ("kwargs", "raises"),
    [(RIGHT, True), (ROWS, False), ({**ROWS, "num_beams": 2}, False)],
)
def test_strict_refuses_the_module_and_nothing_else(kwargs: dict[str, Any], raises: bool) -> None:

    model, fallbacks = shared_model(), []

    def call() -> Any:
        kw = {**kwargs, "max_new_tokens": 3}
        return generate(model, watched(model), (), kw, on_fallback=fallbacks.append, strict=True)

    if not raises:
        assert call().shape == (4, 12)
        return
    with pytest.raises(StrictError, match="right-padded attention mask"):
        call()
    assert fallbacks == []


def test_padding_is_warned_of_once_for_each_record(caplog: pytest.LogCaptureFixture) -> None:
    model = shared_model()
    for warned in (set(), set()):
        for _ in range(2):
            kwargs = {**RIGHT, "max_new_tokens": 2}
            generate(model, None, (), kwargs, on_fallback=lambda _: None, warned=warned)
    told = [r.getMessage() for r in caplog.records if r.name == "hybrid_fx"]
    assert len(told) == 2
    assert all("right-padded attention mask" in text and "pad left" in text for text in told)
    assert all(r.levelno == logging.WARNING for r in caplog.records if r.name == "hybrid_fx")


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_lora_generates_on_the_fast_path_of_the_base_model(task: str | None) -> None:
    config = LoraConfig(task_type=task, init_lora_weights=False, r=4)
    model = get_peft_model(new_model(), config).eval()
    assert is_fast(same_as_hf(model, **ROWS, max_new_tokens=8, do_sample=True))
    own = type(model.generation_config)(max_new_tokens=3, pad_token_id=0, eos_token_id=None)
    model.generation_config = own  # only PeftModelForCausalLM hands it down
    ran = run(model, **ROWS)
    assert is_fast(ran)
    assert ran.result.tolist() == model.generate(**ROWS).tolist()
    assert ran.result.shape[1] == (29 if task is None else 12)


def test_lora_beams_run_hfs_loop_of_the_base_model() -> None:
    model = get_peft_model(new_model(), LoraConfig(init_lora_weights=False, r=4)).eval()
    ran = same_as_hf(model, **ROWS, max_new_tokens=8, num_beams=3)
    assert ran.fallbacks == ["HF loop: beam search"]
    assert len(ran.runner.calls) == ran.module_calls


def test_lora_adapters_by_row_run_the_module() -> None:
    model = get_peft_model(new_model(), LoraConfig(init_lora_weights=False, r=4)).eval()
    names = ["default", "__base__", "default", "__base__"]
    ran = same_as_hf(model, **ROWS, max_new_tokens=5, adapter_names=names)
    assert ran.fallbacks[0].startswith("HF module: adapter_names picks adapters by row")


def test_prompt_tuning_runs_the_module() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(new_model(), config).eval()
    ran = same_as_hf(model, **ROWS, max_new_tokens=5)
    assert ran.fallbacks == ["HF module: adapter 'default' is prompt learning (PROMPT_TUNING)"]


def test_an_activated_lora_runs_the_module() -> None:
    config = LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6], r=4)
    model = get_peft_model(new_model(), config).eval()
    ran = same_as_hf(model, **ROWS, max_new_tokens=3)
    assert ran.fallbacks == ["HF module: adapter 'default' is an activated LoRA"]


def test_a_draft_for_another_model_is_left_to_the_module() -> None:
    config = GenerationConfig(max_new_tokens=4)
    config.is_assistant = True
    request = resolve(shared_model(), (), {**ROWS, "generation_config": config})
    assert choose(request) == (Route.MODULE, "this model drafts for another one")


def test_positions_of_three_dimensions_are_left_to_the_module() -> None:
    kwargs = {**ROWS, "position_ids": torch.zeros(3, 4, 9, dtype=torch.long)}
    route, why = choose(resolve(shared_model(), (), kwargs))
    assert (route, why) == (Route.MODULE, "position_ids that are no [B, T] tensor")


def test_a_model_that_reorders_its_own_cache_beams_by_itself() -> None:
    model = new_model()

    class Reorders(type(model)):  # type: ignore[misc]
        def _reorder_cache(self, cache: Any, rows: torch.Tensor) -> Any:
            cache.reorder_cache(rows)
            return cache

    model.__class__ = Reorders
    assert is_fast(same_as_hf(model, **ROWS, max_new_tokens=3))
    ran = same_as_hf(model, **ROWS, max_new_tokens=3, num_beams=2)
    assert ran.fallbacks == ["HF module: Reorders reorders its cache itself"]


def test_hf_calling_generate_again_gets_the_plain_one() -> None:
    model = new_model()

    class Heals(type(model)):  # type: ignore[misc]
        def heal_tokens(self, ids: torch.Tensor, tokenizer: Any = None) -> torch.Tensor:
            return self.generate(ids, max_new_tokens=2)[:, : ids.shape[1]]

    model.__class__ = Heals
    plain = model.generate
    kwargs = {"input_ids": ROWS["input_ids"][1:2], "max_new_tokens": 3, "token_healing": True}
    expected = plain(**kwargs)
    model.generate = lambda *_, **__: pytest.fail("the instance's generate was called")
    out = generate(
        model, watched(model), (), kwargs, on_fallback=lambda _: None, plain_generate=plain
    )
    assert out.tolist() == expected.tolist()


def test_a_runner_is_made_without_gradients_and_in_eval() -> None:
    model = new_model().train()

    def make() -> Any:
        assert not torch.is_grad_enabled()
        assert not any(module.training for module in model.modules())
        return watched(model)

    with torch.enable_grad():
        run(model, **ROWS, max_new_tokens=2, runner=make)
    assert model.training


def test_every_rule_is_named_once_and_leads_off_the_fast_path() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert all(rule.route is not Route.FAST for rule in RULES)
