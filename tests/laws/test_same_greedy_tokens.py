"""Law 2: greedy decoding in float32 gives the very tokens of ``transformers.generate``."""

from __future__ import annotations

import pytest
import torch
from laws.against_hf import hf_generate, logits_of, module_forwards, near_ties
from tiny_models import FAMILIES, prompt, reweigh, tiny

import hybrid_fx

SEEDS = range(10)
NEW_TOKENS = 40
KINDS = (*FAMILIES, "mistral", "qwen3", "phi3")

# Batch 1 to 8: one-token prompts, rows that are mostly padding, rows of one length.
LENGTHS = (
    (1,),
    (7,),
    (1, 1),
    (9, 1, 4),
    (5, 5, 5, 5),
    (2, 12, 1, 7, 3),
    (6, 1, 11, 2, 9, 4),
    (1, 2, 3, 4, 5, 6, 7),
    (13, 1, 8, 2, 5, 3, 1, 10),
    (3, 3, 1, 1, 8, 8, 2, 2),
)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_transformers(kind: str) -> None:
    model = tiny(kind)
    engine = hybrid_fx.hybridize(model).eval()
    excused = rows = 0
    seen: set[int] = set()
    for seed in SEEDS:
        reweigh(model, seed)
        call = prompt(LENGTHS[seed], seed) | {"max_new_tokens": NEW_TOKENS}
        got, want = engine.generate(**call), hf_generate(model, **call)
        assert got.dtype == want.dtype
        assert got.shape == want.shape == (len(LENGTHS[seed]), max(LENGTHS[seed]) + NEW_TOKENS)
        excused += near_ties(model, call, got, want)
        rows += len(got)
        seen.update(got[:, -NEW_TOKENS:].flatten().tolist())
    print(f"{kind}: {excused} of {rows} rows excused by a near-tie of transformers' own")
    assert excused == 0
    assert len(seen) > 20, "models that repeat a few tokens prove nothing"
    assert engine.stats.counters["captures"] + engine.stats.counters["cache_hits_disk"] == 1
    assert engine.stats.counters["prepares"] == len(SEEDS)
    assert engine.stats.counters["hf_forwards"] == 0
    assert not engine.stats.fallbacks
    report = engine.explain()
    assert report.matched == report.total == 2
    engine.close()


@pytest.mark.parametrize("kind", KINDS)
def test_generating_runs_no_module_of_the_model(kind: str) -> None:
    model = tiny(kind)
    call = prompt((4, 1, 6)) | {"max_new_tokens": 5}
    with hybrid_fx.hybridize(model) as engine:
        engine.generate(**call)  # captured here, or read from the disk and proven
        with module_forwards(model) as called:
            engine.generate(**call)
            engine.generate(**call, do_sample=True)
            reweigh(model, 3)  # and where the weights changed
            engine.generate(**call)
        assert called == []
        assert engine.stats.counters["hf_forwards"] == 0
        with module_forwards(model) as called:
            hf_generate(model, **call)
        assert type(model).__name__ in called


def test_several_eos_tokens_and_pad_equal_to_eos() -> None:
    model = tiny("llama")
    with hybrid_fx.hybridize(model) as engine:
        call = prompt((4, 1, 6, 2))
        free = engine.generate(**call, max_new_tokens=20)
        ends = sorted({int(free[0, 9]), int(free[1, 12])})
        for pad in (0, ends[0]):
            stopping = {"eos_token_id": ends, "pad_token_id": pad, "max_new_tokens": 20}
            got = engine.generate(**call, **stopping)
            assert got.tolist() == hf_generate(model, **call, **stopping).tolist()
            assert got.tolist() != free.tolist()
        assert engine.stats.counters["hf_forwards"] == 0


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    model = tiny("qwen2")
    with hybrid_fx.hybridize(model) as engine:
        together = engine.generate(**prompt((3, 9, 1, 6), 5), max_new_tokens=12)
        alone = prompt((3, 9, 1, 6), 5)
        for row, length in enumerate((3, 9, 1, 6)):
            ids = alone["input_ids"][row : row + 1, 9 - length :]
            got = engine.generate(input_ids=ids, max_new_tokens=12)
            assert got[0].tolist() == together[row, 9 - length :].tolist()


def test_half_the_window_and_more_than_it_agree() -> None:
    model = tiny("mistral")
    assert model.config.sliding_window == 4
    with hybrid_fx.hybridize(model) as engine:
        short = {"input_ids": torch.tensor([[5, 9]]), "max_new_tokens": 2}
        long = {"input_ids": torch.tensor([[5, 9, 7, 3, 8, 6, 4, 11]]), "max_new_tokens": 30}
        for call in (short, long):
            assert engine.generate(**call).tolist() == hf_generate(model, **call).tolist()
        assert engine.stats.counters["hf_forwards"] == 0


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_prompt_read_in_pieces_has_finite_padding(chunk: int) -> None:
    model = tiny("llama")
    with hybrid_fx.hybridize(model) as engine:
        call = prompt((9, 1, 4), 1) | {"max_new_tokens": 10}
        whole = hf_generate(model, **call)
        assert engine.generate(**call, prefill_chunk_size=chunk).tolist() == whole.tolist()
        assert engine.stats.counters["hf_forwards"] == 0
        ids, mask = call["input_ids"], call["attention_mask"].bool()
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        assert bool(logits_of(engine, ids, positions, mask, prefill=chunk).isfinite().all())
