"""A prompt given as embeddings, or begun in a cache: HF's loop over our graphs and workspace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generate.same_as_hf import (
    CONFIGS,
    Ran,
    assert_same,
    new_model,
    prompt,
    run,
    same_as_hf,
    shared_model,
)
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, StaticCache
from upstream_names import CACHE

from hybrid_fx.errors import InputError

ROWS = prompt((3, 9, 1, 6))
LENGTH = {"max_new_tokens": 7, "eos_token_id": None}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "beams": {"num_beams": 3},
}


def looped(ran: Ran, why: str) -> bool:
    """HF's loop ran over sessions alone; a module call is one that a session answered."""
    assert ran.fallbacks == [f"HF loop: {why}"]
    return ran.module_calls == len([c for c in ran.runner.calls if c[0] == ran.runner.calls[-1][0]])


def embedded(model: Any, rows: dict[str, Any]) -> dict[str, Any]:
    with torch.no_grad():
        embeds = model.get_input_embeddings()(rows["input_ids"])
    return {"inputs_embeds": embeds, "attention_mask": rows["attention_mask"]}


def prefilled(model: Any, rows: dict[str, Any], columns: int, **options: Any) -> DynamicCache:
    cache = DynamicCache(**options)
    mask = rows["attention_mask"][:, :columns]
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    with torch.no_grad():
        model(
            rows["input_ids"][:, :columns],
            attention_mask=mask,
            position_ids=positions,
            **{CACHE: cache},
        )
    return cache


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", CONFIGS)
def test_embeddings_give_hfs_tokens(family: str, mode: str) -> None:
    model = shared_model(family)
    ran = same_as_hf(model, **embedded(model, ROWS), **LENGTH, **MODES[mode])
    why = "beam search; inputs_embeds" if mode == "beams" else "inputs_embeds"
    assert ran.fallbacks == [f"HF loop: {why}"]
    assert ran.runner.sessions[-1].batch == (12 if mode == "beams" else 4)


def test_embeddings_of_no_token_are_computed_from() -> None:
    model = new_model()
    embeds = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    ran = same_as_hf(model, inputs_embeds=embeds, **LENGTH)
    assert ran.runner.calls[1:] == [(2, 5, 1)] + [(2, 1, 1)] * 6  # behind the comparison of 4


def test_embeddings_beside_ids_come_behind_them_in_the_result() -> None:
    model = shared_model()
    given = embedded(model, ROWS)
    ran = same_as_hf(model, ROWS["input_ids"], **given, **LENGTH)
    assert ran.result.shape == (4, 9 + 7)


def test_one_embedding_is_a_prompt() -> None:
    model = shared_model("opt")
    same_as_hf(model, inputs_embeds=torch.randn(3, 1, 32), **LENGTH)


def test_embeddings_pass_a_lora_on_the_table_by() -> None:
    model = new_model()
    config = LoraConfig(target_modules=["embed_tokens", "q_proj"], r=2, init_lora_weights=False)
    model = get_peft_model(model, config).eval()
    ran = same_as_hf(model, **embedded(model, ROWS), **LENGTH)
    assert ran.fallbacks == ["HF loop: inputs_embeds"]


def test_a_table_that_scales_is_passed_by_whole() -> None:
    config = Gemma3TextConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, sliding_window=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).eval()
    ran = same_as_hf(model, **embedded(model, ROWS), **LENGTH)
    assert ran.fallbacks == ["HF loop: inputs_embeds"]


def test_a_forward_that_treats_embeddings_otherwise_runs_the_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = new_model()
    plain = type(model).forward

    def forward(self: Any, input_ids: Any = None, inputs_embeds: Any = None, **rest: Any) -> Any:
        if inputs_embeds is not None:
            inputs_embeds = inputs_embeds * 3
        return plain(self, input_ids=input_ids, inputs_embeds=inputs_embeds, **rest)

    ids = ROWS["input_ids"]
    runner = run(model, ids, max_new_tokens=1).runner
    runner.calls.clear()
    if not hasattr(runner.runner, "plan"):
        pytest.skip("the reference runtime is the module itself: it cannot differ from it")
    monkeypatch.setattr(type(model), "forward", forward)
    ran = run(model, inputs_embeds=torch.randn(2, 5, 32), max_new_tokens=3, runner=runner)
    assert ran.fallbacks == [
        "HF module: the model's generation loop asks its forward for inputs_embeds, which its "
        "graphs do not take"
    ]


def test_embeddings_of_another_size_are_refused() -> None:
    with pytest.raises(InputError, match=r"inputs_embeds is \[2, 5, 31\].*\[B, T, 32\]"):
        run(shared_model(), inputs_embeds=torch.randn(2, 5, 31), max_new_tokens=3)
    with pytest.raises(InputError, match="after a prompt of 100 tokens needs 139"):
        run(shared_model("gpt2"), inputs_embeds=torch.randn(1, 100, 32), max_new_tokens=40)


@pytest.mark.parametrize("columns", [1, 5, 8])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_prefix_gives_hfs_tokens(family: str, columns: int) -> None:
    model = shared_model(family)

    def make() -> dict[str, Any]:
        return {CACHE: prefilled(model, ROWS, columns)}

    ran = same_as_hf(model, **ROWS, **LENGTH, make=make)
    assert looped(ran, CACHE)
    assert ran.runner.calls[0] == (4, 9 - columns, 1)


@pytest.mark.parametrize("mode", MODES)
def test_a_prefix_of_windowed_layers_gives_hfs_tokens(mode: str) -> None:
    model = shared_model("mistral")
    rows = prompt((12, 9))
    expanded = {k: v.repeat_interleave(3, 0) for k, v in rows.items()} if mode == "beams" else rows

    def make() -> dict[str, Any]:
        return {CACHE: prefilled(model, expanded, 10, config=model.config)}

    ran = same_as_hf(model, **rows, **LENGTH, **MODES[mode], make=make)
    assert ran.runner.calls[0] == (len(expanded["input_ids"]), 2, 1)


@pytest.mark.parametrize("given", ["ids", "embeds"])
def test_the_callers_cache_is_extended_as_hf_extends_it(given: str) -> None:
    model = shared_model("qwen2")
    start = ROWS if given == "ids" else embedded(model, ROWS)
    asked = {"return_dict_in_generate": True, **LENGTH}
    theirs, ours = (prefilled(model, ROWS, 5) for _ in range(2))
    expected = model.generate(**start, **{CACHE: theirs}, **asked)
    ran = run(model, **start, **{CACHE: ours}, **asked)
    assert_same(ran.result, expected)
    assert ran.result[CACHE] is ours
    assert ours.get_seq_length() == theirs.get_seq_length() == 9 + 6
    mask = ROWS["attention_mask"].bool()
    seen = torch.cat([mask, torch.ones(4, 6, dtype=torch.bool)], -1)
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        for name in ("keys", "values"):
            pair = [getattr(layer, name).transpose(1, 2)[seen] for layer in (mine, other)]
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


def test_beams_leave_the_rows_of_the_cache_as_hf_does() -> None:
    model = shared_model()
    rows = prompt((6, 6))
    tripled = {k: v.repeat_interleave(3, 0) for k, v in rows.items()}
    asked = {"num_beams": 3, **LENGTH}
    theirs, ours = (prefilled(model, tripled, 4) for _ in range(2))
    model.generate(**rows, **{CACHE: theirs}, **asked)
    run(model, **rows, **{CACHE: ours}, **asked)
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(mine.keys, other.keys, rtol=1e-4, atol=1e-5)


def test_one_cache_carries_a_conversation() -> None:
    model = shared_model("gpt2")
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    ids = prompt((5, 5))["input_ids"]
    for turn in range(3):
        expected = model.generate(ids, **{CACHE: caches[0]}, **LENGTH)
        ran = run(model, ids, **{CACHE: caches[1]}, **LENGTH)
        assert ran.result.tolist() == expected.tolist()
        assert looped(ran, CACHE)
        ids = torch.cat([expected, prompt((3, 3), seed=turn)["input_ids"]], -1)


def test_a_cache_returned_for_embeddings_can_be_continued() -> None:
    model = shared_model()
    asked = {"return_dict_in_generate": True, **LENGTH}
    given = {"inputs_embeds": embedded(model, prompt((6, 6)))["inputs_embeds"]}
    first = run(model, **given, **asked).result
    assert type(first[CACHE]) is DynamicCache
    other = model.generate(**given, **asked)[CACHE]
    assert first[CACHE].get_seq_length() == other.get_seq_length() == 6 + 6


def test_an_error_leaves_the_callers_cache_as_it_was() -> None:
    model = shared_model()
    cache = prefilled(model, ROWS, 5)
    before = [layer.keys.clone() for layer in cache.layers]
    runner = run(model, **ROWS, max_new_tokens=1).runner
    runner.fail_at = len(runner.calls) + 3
    with pytest.raises(KeyboardInterrupt):
        run(model, **ROWS, **{CACHE: cache}, **LENGTH, runner=runner)
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)


def test_another_kind_of_cache_is_left_to_the_module() -> None:
    model = shared_model()

    def make() -> dict[str, Any]:
        return {CACHE: StaticCache(config=model.config, max_cache_len=32)}

    ran = same_as_hf(model, **ROWS, **LENGTH, make=make)
    assert ran.fallbacks == [f"HF module: {CACHE} is a StaticCache"]


@pytest.mark.parametrize("odd", ["rows", "dtype"])
def test_a_prefix_that_does_not_fit_gets_hfs_error(odd: str) -> None:
    model = shared_model()
    rows = {k: v[:3] for k, v in ROWS.items()} if odd == "rows" else ROWS
    caches = [prefilled(model, rows, 5) for _ in range(2)]
    for layer in (layer for cache in caches for layer in cache.layers if odd == "dtype"):
        layer.keys = layer.keys.double()
    with pytest.raises(RuntimeError) as expected:
        model.generate(**ROWS, **LENGTH, **{CACHE: caches[0]})
    with pytest.raises(RuntimeError) as got:
        run(model, **ROWS, **LENGTH, **{CACHE: caches[1]})
    assert str(got.value) == str(expected.value)
