"""How far each layer looks back is what transformers computes, whatever a model says of it."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from laws.against_hf import same_tokens
from tiny_models import POSITIONS, VOCAB, prompt, reweigh

import hybrid_fx
from hybrid_fx.capture import capture
from hybrid_fx.errors import CaptureError

_FIELDS = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "sliding_window": 5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_EXPERTS = {"num_experts_per_tok": 2, "tie_word_embeddings": False}


def _model(prefix: str, **changes: Any) -> Any:
    config = getattr(transformers, f"{prefix}Config")(**{**_FIELDS, **changes})
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    reweigh(model, 3)
    return model


@pytest.mark.parametrize(
    ("prefix", "changes"),
    [
        ("Phimoe", {**_EXPERTS, "num_local_experts": 4}),  # a window in its masks alone
        ("Qwen2Moe", {**_EXPERTS, "num_experts": 4, "use_sliding_window": True}),
    ],
)
def test_the_window_is_that_of_the_mask(prefix: str, changes: dict[str, Any]) -> None:
    if prefix == "Qwen2Moe":
        kinds = ["sliding_attention", "full_attention"]
        changes = changes | {"layer_types": kinds, "moe_intermediate_size": 16}
        changes |= {"shared_expert_intermediate_size": 16}
    engine = hybrid_fx.hybridize(_model(prefix, **changes), disk_cache=False)
    same_tokens(engine, **prompt([9, 4, 12]), max_new_tokens=8, do_sample=False)
    assert not engine.stats.fallbacks


@pytest.mark.parametrize(
    ("prefix", "changes"),
    [
        ("Moshi", {"num_codebooks": 2, "audio_vocab_size": 16, "ffn_dim": 48}),
        ("Olmoe", {**_EXPERTS, "num_experts": 4}),  # told to its attention, which does not listen
    ],
)
def test_a_layer_that_sees_more_than_the_cache_keeps_is_run_by_transformers(
    prefix: str, changes: dict[str, Any]
) -> None:
    engine = hybrid_fx.hybridize(_model(prefix, **changes), disk_cache=False)
    same_tokens(engine, **prompt([9, 4, 12]), max_new_tokens=8, do_sample=False)
    assert "the cache of transformers keeps 5" in next(iter(engine.stats.fallbacks))


def test_behind_a_window_of_one_column_transformers_keeps_all_and_runs_its_module() -> None:
    model = _model("Mistral", sliding_window=1)
    engine = hybrid_fx.hybridize(model, disk_cache=False)
    for call in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 2, "do_sample": False}):
        same_tokens(engine, **prompt([9, 4, 12]), max_new_tokens=8, **call)
    assert "keeps every one behind a window of 1" in next(iter(engine.stats.fallbacks))


def test_an_implementation_that_listens_to_an_attention_must_hear_the_window_of_the_mask() -> None:
    model = _model("Phimoe", **_EXPERTS, num_local_experts=4)
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(CaptureError, match="a window of 5 and says a window of None"):
        capture(model)


class _Wrapped(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """Names none of its arguments: transformers' generate finds no positions to give it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("lengths", [(9, 4, 12), (6, 6)])
def test_a_forward_that_names_no_positions_counts_columns(lengths: tuple[int, ...]) -> None:
    fields = {name: value for name, value in _FIELDS.items() if name != "sliding_window"}
    model = _Wrapped(transformers.LlamaConfig(**fields)).eval()
    reweigh(model, 3)
    engine = hybrid_fx.hybridize(model, disk_cache=False)
    for call in ({}, {"num_beams": 2}):
        same_tokens(engine, **prompt(lengths), max_new_tokens=8, do_sample=False, **call)
    whole = prompt((6, 6))["input_ids"]
    same_tokens(engine, input_ids=whole, max_new_tokens=8, do_sample=False)  # without a mask
    reasons = [r for r in engine.stats.fallbacks if "names no position_ids" in r]
    assert len(reasons) == (1 if len(set(lengths)) > 1 else 0)
