"""Beams, assisted decoding and the like: HF's loops over our forward and cache."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
from generate.same_as_hf import (
    FAMILIES,
    Ran,
    assert_same,
    is_fast,
    new_model,
    prompt,
    run,
    same_as_hf,
    shared_model,
    watched,
)
from transformers import ByT5Tokenizer, GenerationConfig, Phi3ForCausalLM
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerationMixin
from upstream_names import CACHE

from hybrid_fx.errors import HybridError

ROWS = prompt((3, 9, 1, 6))
BEAMS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "several returned": {"num_beams": 4, "num_return_sequences": 3},
    "early stopping": {"num_beams": 3, "early_stopping": True, "length_penalty": 0.5},
    "sampled": {"num_beams": 3, "do_sample": True, "top_k": 8},
    "processed": {"num_beams": 2, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "no cache": {"num_beams": 2, "use_cache": False},
    "static cache": {"num_beams": 2, "cache_implementation": "static"},
    "by config": {"generation_config": GenerationConfig(num_beams=3, max_new_tokens=7)},
}


def looped(ran: Ran, why: str) -> bool:
    """HF's loop ran, each module call was answered by a session, and the reason was told."""
    served = ran.module_calls == len(ran.runner.calls) > 0
    return ran.fallbacks == [f"HF loop: {why}"] and served and len(ran.runner.sessions) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_beam_search_keeps_hfs_tokens_for_left_padded_rows(family: str) -> None:
    ran = same_as_hf(shared_model(family), **ROWS, num_beams=3, max_new_tokens=12)
    assert looped(ran, "beam search")
    assert ran.runner.sessions[0].batch == 12


@pytest.mark.parametrize("name", BEAMS)
def test_beam_settings_mean_what_they_mean_to_hf(name: str) -> None:
    length = {} if "generation_config" in BEAMS[name] else {"max_new_tokens": 9}
    ran = same_as_hf(shared_model(), **ROWS, **length, **BEAMS[name], seed=4)
    assert looped(ran, "beam sample" if name == "sampled" else "beam search")


def test_beams_feed_one_column_a_step() -> None:
    ran = same_as_hf(shared_model(), **ROWS, num_beams=2, max_new_tokens=5, use_cache=False)
    assert ran.runner.calls[0] == (4, 9, 1)  # beams of a prompt share its prefill
    assert set(ran.runner.calls[1:]) == {(8, 1, 1)}


def test_beam_scores_are_hfs() -> None:
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    ran = same_as_hf(shared_model(), **ROWS, num_beams=3, max_new_tokens=6, **asked)
    assert ran.result.sequences_scores.shape == (4,)
    assert "live=False" in repr(ran.result[CACHE])


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("sample", [False, True])
def test_prompt_lookup_keeps_hfs_tokens(sample: bool, padding: int) -> None:
    ids = torch.tensor([[0] * padding + [5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    rows = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    ran = same_as_hf(
        shared_model(), **rows, prompt_lookup_num_tokens=3, max_new_tokens=20, do_sample=sample
    )
    assert looped(ran, "assisted generation")
    assert any(keep > 1 for _, _, keep in ran.runner.calls)


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_an_assistant_keeps_hfs_tokens(family: str, sample: bool) -> None:
    model, assistant = new_model(family), new_model("llama")
    assistant.load_state_dict(model.state_dict())
    for weight in assistant.parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))

    def make() -> dict[str, Any]:
        assistant.generation_config.num_assistant_tokens = 4  # HF's heuristic moves it
        return {"assistant_model": assistant}

    ran = same_as_hf(
        model, **prompt((5,)), max_new_tokens=25, eos_token_id=None, do_sample=sample, make=make
    )
    assert looped(ran, "assisted generation")
    widths = [width for _, width, _ in ran.runner.calls]
    assert len(widths) < 25  # drafts were accepted, others taken back
    assert sum(widths) > 5 + 25


def test_stop_strings_stop_where_hf_stops() -> None:
    tokenizer = ByT5Tokenizer()
    model = new_model(vocab_size=len(tokenizer))
    ids = tokenizer(["abc", "z"], return_tensors="pt", padding=True, padding_side="left")
    free = model.generate(**ids, max_new_tokens=12, eos_token_id=None, do_sample=False)
    texts = [chr(int(t) - 3) for t in free[0, -8:] if 3 <= int(t) < 131]
    assert texts
    ran = same_as_hf(model, **ids, max_new_tokens=20, stop_strings=[texts[0]], tokenizer=tokenizer)
    assert looped(ran, "stop_strings")


def test_a_model_that_prepares_its_own_inputs_gets_hfs_loop() -> None:
    model = new_model()

    class Own(type(model)):  # type: ignore[misc]
        def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
            assert inspect.signature(self.forward) == inspect.signature(super().forward)
            return super().prepare_inputs_for_generation(*args, **kwargs)

    model.__class__ = Own
    ran = same_as_hf(model, **ROWS, max_new_tokens=6, do_sample=True)
    assert looped(ran, "Own has a prepare_inputs_for_generation() of its own")


def test_a_loop_that_starts_over_drops_the_columns() -> None:
    model = new_model()

    class Forgetful(type(model)):  # type: ignore[misc]
        def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> Any:
            if input_ids.shape[1] == 12:
                kwargs |= {CACHE: None, "next_sequence_length": None}
            return super().prepare_inputs_for_generation(input_ids, **kwargs)

    model.__class__ = Forgetful
    ran = same_as_hf(model, **ROWS, max_new_tokens=8, eos_token_id=None)
    widths = [width for _, width, _ in ran.runner.calls]
    assert widths == [9, 1, 1, 12, 1, 1, 1, 1]


def asking_model(*, at_width: int) -> Any:
    """Its loop asks the forward for router logits whenever it feeds so many columns."""
    model = new_model()

    class Asks(type(model)):  # type: ignore[misc]
        def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
            inputs = super().prepare_inputs_for_generation(*args, **kwargs)
            asks = inputs["input_ids"].shape[1] == at_width
            return inputs | {"output_router_logits": asks or None}

        @functools.wraps(type(model).forward)
        def forward(self, output_router_logits: Any = None, **kwargs: Any) -> Any:
            return super().forward(**kwargs)

    model.__class__ = Asks
    return model


def test_a_forward_asked_for_more_runs_the_module() -> None:
    model = asking_model(at_width=9)
    ran = same_as_hf(model, **ROWS, max_new_tokens=4, do_sample=True)
    asked = "the model's generation loop asks its forward for output_router_logits"
    assert ran.fallbacks == [f"HF module: {asked}"]


def test_a_forward_asked_for_more_midway_says_so() -> None:
    with pytest.raises(HybridError, match="asks its forward for output_router_logits"):
        run(asking_model(at_width=1), **ROWS, max_new_tokens=4)


def test_a_streamer_hears_no_prompt_twice_from_a_model_that_asks() -> None:
    class Log(BaseStreamer):
        def put(self, value: Any) -> None:
            heard.append(value.tolist())

        def end(self) -> None:
            heard.append("end")

    events = []
    for generate in (lambda model, **k: model.generate(**k), run):
        heard: list[Any] = []
        generate(asking_model(at_width=4), **prompt((4,)), max_new_tokens=3, streamer=Log())
        events.append(heard)
    assert events[0] == events[1]


@pytest.mark.skipif(
    "next_sequence_length" not in inspect.getsource(Phi3ForCausalLM.prepare_inputs_for_generation),
    reason="this transformers drops Phi-3's cache at the switch and feeds the last token alone",
)
@pytest.mark.parametrize("name", ["longrope", "default"])
def test_long_rope_switches_where_hf_switches(name: str) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": name, "rope_theta": 1e4} | (factors if name == "longrope" else {})
    model = new_model("phi3", rope_parameters=rope, original_max_position_embeddings=12)
    ran = same_as_hf(model, **prompt((9, 9)), max_new_tokens=8, eos_token_id=None)
    if name == "default":
        assert is_fast(ran)
        return
    assert looped(ran, "Phi3ForCausalLM has a prepare_inputs_for_generation() of its own")
    widths = [width for _, width, _ in ran.runner.calls]
    assert widths == [9, 1, 1, 1, 13, 1, 1, 1]


def test_a_hook_on_the_model_runs_once_and_not_twice() -> None:
    model, seen = new_model(), []
    runner = watched(model)  # before there is a hook that keeps something: that has no plan
    call = {**ROWS, "num_beams": 2, "max_new_tokens": 3, "eos_token_id": None}
    with model.register_forward_hook(lambda *_: seen.append(1)):
        ran = run(model, **call, runner=runner)
    assert ran.fallbacks == ["HF module: beam search with a hook or a compiled call on the model"]
    assert len(seen) == 3
    assert_same(ran.result, model.generate(**call))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("in the middle")])
def test_an_interrupt_leaves_the_models_forward_and_no_session(error: BaseException) -> None:
    model = shared_model()
    runner = watched(model)
    runner.fail_at, runner.error = 3, error
    with pytest.raises(type(error)):
        run(model, **ROWS, num_beams=2, max_new_tokens=9, runner=runner)
    assert len(runner.calls) == 3
    assert runner.sessions[0].closed
    assert model.forward.__func__ is type(model).forward
    same_as_hf(model, **ROWS, num_beams=2, max_new_tokens=9)


def test_hfs_errors_come_through_in_its_words() -> None:
    class Streamer:
        def put(self, value: Any) -> None: ...

    with pytest.raises(ValueError, match="`streamer` cannot be used with beam search"):
        run(shared_model(), **ROWS, num_beams=2, streamer=Streamer())
    with pytest.raises(ValueError, match="only supported for batch_size = 1"):
        run(shared_model(), **ROWS, prompt_lookup_num_tokens=2)
    assert shared_model().generate.__func__ is GenerationMixin.generate
