"""Part 6: inference memory is given back, or kept and refilled, as the config says."""

from __future__ import annotations

from typing import Any

import pytest
from laws.against_hf import hf_generate
from memory_ledger import address
from tiny_models import prompt, reweigh, tiny

import hybrid_fx

CALL = prompt((4, 1, 7), 6) | {"max_new_tokens": 12}


def pointers(engine: Any) -> tuple[list[int], list[int]]:
    """Addresses of the prepared tensors that own memory, and of the KV workspace."""
    runner = engine._graphs.runner
    wanted = zip(runner.plan.manifest.prepared, runner.prepared.tensors, strict=True)
    owned = [address(tensor) for p, tensor in wanted if p.owns_memory or p.packed]
    return owned, [t.data_ptr() for t in (*runner.workspace.keys, *runner.workspace.values)]


def test_memory_is_kept_and_refilled_from_version_to_version() -> None:
    model = tiny("llama")
    with hybrid_fx.hybridize(model) as engine:
        engine.generate(**CALL)
        before = pointers(engine)
        assert all(before)
        for seed in (1, 2, 3):
            reweigh(model, seed)
            engine.train()
            engine.eval()
            assert engine.generate(**CALL).tolist() == hf_generate(model, **CALL).tolist()
            assert pointers(engine) == before
        report = engine.explain()
        assert report.prepared_bytes > 0
        assert report.kv_bytes > 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_released_memory_is_gone_after_each_generate_and_the_next_is_right(kind: str) -> None:
    model = tiny(kind)
    with hybrid_fx.hybridize(model, release_inference_cache=True) as engine:
        for seed in (0, 0, 1):
            reweigh(model, seed)
            assert engine.generate(**CALL).tolist() == hf_generate(model, **CALL).tolist()
            runner = engine._graphs.runner
            assert runner.workspace.nbytes == 0
            assert runner.prepared.nbytes == 0
            assert runner.prepared.tensors == []
        assert engine.stats.kv_bytes_peak > 0
        assert engine.stats.kv_bytes == 0
        assert engine.stats.counters["prepares"] == 3
        assert engine.stats.counters["hf_forwards"] == 0


def test_the_workspace_grows_with_need_and_is_presized_by_max_out_tokens() -> None:
    model = tiny("llama")
    with hybrid_fx.hybridize(model) as engine:
        sizes = []
        for batch, tokens in ((1, 4), (2, 30), (8, 60), (1, 4)):
            call = prompt([5] * batch) | {"max_new_tokens": tokens}
            assert engine.generate(**call).tolist() == hf_generate(model, **call).tolist()
            sizes.append(engine.explain().kv_bytes)
        assert sizes[0] < sizes[1] < sizes[2] == sizes[3]
    with hybrid_fx.hybridize(model, max_out_tokens=100) as engine:
        engine.generate(**prompt([5] * 2), max_new_tokens=1)
        presized = engine.explain().kv_bytes
        engine.generate(**prompt([5] * 2), max_new_tokens=60)
        assert engine.explain().kv_bytes == presized
        call = prompt([5]) | {"max_new_tokens": 110}  # never a cap
        assert engine.generate(**call).tolist() == hf_generate(model, **call).tolist()
