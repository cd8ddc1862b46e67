"""Beyond the positions of its config a model does what transformers does, or its table ends."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from laws.against_hf import hf_generate, same_tokens
from tiny_models import adapted, prompt, reweigh, tiny

import hybrid_fx

LIMIT = 24
BEYOND = prompt((5, 3), 1) | {"max_new_tokens": LIMIT + 6}
FOLLOWS = {"short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0]}


def rotary(kind: str, **rope: Any) -> Any:
    """A model whose frequencies are of this kind."""
    rope |= {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 12}
    return tiny("llama", max_position_embeddings=LIMIT, rope_parameters=rope)


def gptj() -> Any:
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4}
    ids = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    model = transformers.GPTJForCausalLM(transformers.GPTJConfig(n_positions=LIMIT, **sizes, **ids))
    reweigh(model, 0)
    return model.eval()


@pytest.mark.parametrize("kind", ["llama", "mistral", "neox", "gemma2", "llama3"])
def test_rotary_positions_go_on_from_graphs_and_one_warning_says_so(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    scaled = {"factor": 1.5, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    plain = kind != "llama3"
    model = tiny(kind, max_position_embeddings=LIMIT) if plain else rotary(kind, **scaled)
    with hybrid_fx.hybridize(model) as engine:
        same_tokens(engine, **BEYOND)
        same_tokens(engine, **BEYOND, do_sample=True, temperature=1.5)
        assert not engine.stats.fallbacks
    assert caplog.text.count(f"needs {LIMIT + 10} positions; the model was made for {LIMIT}") == 1


def test_rows_that_have_finished_do_not_hold_the_others_at_the_last_position() -> None:
    model = tiny("llama", max_position_embeddings=LIMIT)
    first = hf_generate(model, **BEYOND)[0]
    call = BEYOND | {"eos_token_id": int(first[12]), "pad_token_id": 0}
    kept = {"return_dict_in_generate": True, "output_scores": True}
    want = hf_generate(model, **call, **kept)
    assert want.sequences.shape[1] > LIMIT + 5
    with hybrid_fx.hybridize(model) as engine:
        got = engine.generate(**call, **kept)
        assert got.sequences.tolist() == want.sequences.tolist()
        each = engine.generate(**BEYOND | {"max_new_tokens": [2, LIMIT + 6]})
        assert each[1].tolist() == hf_generate(model, **BEYOND)[1].tolist()
        assert not engine.stats.fallbacks


@pytest.mark.parametrize(
    ("kind", "why"),
    [("longrope", f"positions beyond the {LIMIT} that the model was made for"), ("dynamic", "")],
)
def test_frequencies_that_follow_the_length_run_as_the_module(kind: str, why: str) -> None:
    model = rotary(kind, factor=2.0, **(FOLLOWS if kind == "longrope" else {}))
    with hybrid_fx.hybridize(model) as engine:
        same_tokens(engine, **BEYOND)
        (reason,) = engine.stats.fallbacks
        assert why in reason


def test_a_token_table_that_an_adapter_wraps_is_no_table_of_positions() -> None:
    plain = tiny("llama", vocab_size=64, max_position_embeddings=64)
    model = adapted(plain, modules_to_save=["embed_tokens"])
    call = prompt((5, 3), 1) | {"max_new_tokens": 66, "do_sample": False}
    with hybrid_fx.hybridize(model) as engine:
        same_tokens(engine, **call)


def test_a_peft_model_of_several_kinds_of_adapters_generates() -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    model = peft.get_peft_model(tiny("llama"), config, mixed=True)
    call = prompt((5, 3), 1) | {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**call)
    with hybrid_fx.hybridize(model) as engine:
        assert torch.equal(engine.generate(**call), expected)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gptj"])
def test_a_table_of_positions_ends_with_an_error_that_names_the_limit(kind: str) -> None:
    size = {"n_positions" if kind == "gpt2" else "max_position_embeddings": LIMIT}
    model = gptj() if kind == "gptj" else tiny(kind, layers=1, **size)
    with torch.no_grad(), pytest.raises((IndexError, RuntimeError)):
        hf_generate(model, **BEYOND)
    with hybrid_fx.hybridize(model) as engine:
        with pytest.raises(hybrid_fx.InputError, match=rf"the model has {LIMIT}: use max_new_tok"):
            engine.generate(**BEYOND)
        same_tokens(engine, **BEYOND | {"max_new_tokens": LIMIT - 4})
