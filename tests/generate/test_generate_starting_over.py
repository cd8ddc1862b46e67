"""A loop of transformers that asks for what a session does not do starts over, as if it had not."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from generate.same_as_hf import new_model, prompt, run, same_as_hf
from transformers.generation.streamers import BaseStreamer
from upstream_names import CACHE

from hybrid_fx.errors import HybridError

DRAFTED = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 12, "eos_token_id": None}


def demanding_model() -> Any:
    """Its first forward is asked for router logits."""
    model = new_model()

    class Demands(type(model)):  # type: ignore[misc]
        def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
            inputs = super().prepare_inputs_for_generation(*args, **kwargs)
            return inputs | {"output_router_logits": True}

        @functools.wraps(type(model).forward)
        def forward(self, output_router_logits: Any = None, **kwargs: Any) -> Any:
            return super().forward(**kwargs)

    model.__class__ = Demands
    return model


class Log(BaseStreamer):
    """What a streamer hears."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, value: Any) -> None:
        self.heard.append(value.tolist())

    def end(self) -> None:
        self.heard.append("end")


@pytest.mark.parametrize("seed", range(3))
def test_what_drafts_drew_is_put_back(seed: int) -> None:
    assistant = new_model(seed=5)
    ran = same_as_hf(
        demanding_model(), **prompt((6,)), **DRAFTED, assistant_model=assistant, seed=seed
    )
    (said,) = ran.fallbacks
    assert said.startswith("HF module: the model's generation loop asks its forward for output_ro")


@pytest.mark.parametrize("model", [new_model, demanding_model])
def test_a_streamer_hears_a_call_once(model: Any) -> None:
    logs = []
    for by in (lambda model, **k: model.generate(**k), run):
        logs.append(Log())
        torch.manual_seed(0)
        assistant = new_model(seed=5)
        by(model(), **prompt((6,)), **DRAFTED, assistant_model=assistant, streamer=logs[-1])
    assert logs[0].heard == logs[1].heard
    assert len(logs[0].heard) > 2


def test_a_call_whose_processor_chose_drafts_does_not_start_over() -> None:
    given = {**prompt((6,)), **DRAFTED, "assistant_model": new_model(seed=5)}
    seen = []

    def processor(ids: Any, scores: Any) -> Any:
        seen.append(ids.shape[1])
        return scores

    with pytest.raises(HybridError, match="call the model itself, outside of its engine"):
        run(demanding_model(), **given, logits_processor=[processor])
    assert seen
    same_as_hf(new_model(), **given, logits_processor=[lambda ids, scores: scores])


@pytest.mark.skipif(CACHE == "past_key_values", reason="this transformers knows one name only")
@pytest.mark.parametrize("name", ["past_key_values", "cache_params"])
def test_a_former_name_of_the_cache_is_taken(name: str) -> None:
    from transformers import DynamicCache

    model, rows = new_model(), prompt((6,))
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for turn in range(2):
        new = {"max_new_tokens": 4, "eos_token_id": None}
        expected = model.generate(**rows, **{CACHE: caches[0]}, **new)
        ran = run(model, **rows, **{name: caches[1]}, **new)
        assert ran.result.tolist() == expected.tolist(), turn
        assert ran.fallbacks == [f"HF loop: {CACHE}"]
        rows = {"input_ids": torch.cat([expected, rows["input_ids"]], -1)}
