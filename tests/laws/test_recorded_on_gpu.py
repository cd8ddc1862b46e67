"""What the tests of recorded steps beside this file claim of a tape, of CUDA graphs on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from laws.against_hf import hf_generate, near_ties
from laws.recorded_engines import ENDS, LOOKS, family, sizes_of, steps_of
from runtime.test_recording import REFUSED, TAKEN, X
from tiny_models import VOCAB, adapted, prompt, randomize_adapters, tiny
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hybrid_fx
from hybrid_fx.runtime.attend_at import attend_at, masks_at
from hybrid_fx.runtime.recording import CudaRecorder, NotRecordableError

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Products of float32 in float32, whatever was chosen elsewhere."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def engine_of(model: nn.Module, **options: Any) -> Any:
    return hybrid_fx.hybridize(model.to(GPU), graph="cudagraphs", **options)


def asked(*lengths: int, new: int = 9, **options: Any) -> dict[str, Any]:
    rows = {name: tensor.to(GPU) for name, tensor in prompt(lengths).items()}
    return {**rows, "max_new_tokens": new, "do_sample": False, **options}


def assert_same(engine: Any, call: dict[str, Any]) -> Any:
    """The tokens of transformers; a near-tie of its own is excused once."""
    got = engine.generate(**call)
    assert near_ties(engine.module, call, got, hf_generate(engine.module, **call)) <= 1
    return got


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "opt", "mistral", "gemma2"])
def test_the_tokens_are_those_of_transformers_and_of_the_plain_step(kind: str) -> None:
    model = family(kind)
    plain = hybrid_fx.hybridize(copy.deepcopy(model).to(GPU))
    with engine_of(model) as engine:
        for lengths in ((5, 3, 1, 7), (1,), (4, 4)):
            got = assert_same(engine, asked(*lengths))
            assert torch.equal(got, plain.generate(**asked(*lengths)))
        assert [rows for rows, _ in sizes_of(engine)] == [4, 1, 2]
        assert not engine.stats.fallbacks
        assert engine.stats.counters["recordings"] == 3
        assert engine.explain().recorded_bytes > 0
    plain.close()


def test_one_graph_serves_all_positions_and_rows_that_outgrow_it() -> None:
    model = tiny("llama", max_position_embeddings=400)
    with engine_of(model) as engine:
        for length, new in ((2, 40), (30, 60)):
            assert_same(engine, asked(length, length, new=new))
        assert engine.stats.counters["recordings"] == 1
        assert_same(engine, asked(20, 9, new=300))
        assert sizes_of(engine) == [(2, 256), (2, 512)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_graphs_in_half_precision_say_what_the_plain_step_says(dtype: torch.dtype) -> None:
    with engine_of(tiny("llama", dtype=dtype)) as engine:
        for lengths in ((5, 3, 1), (9,)):
            engine.generate(**asked(*lengths))
        assert [rows for rows, _ in sizes_of(engine)] == [3, 1], "each was held against it"


def test_rows_leave_and_draws_are_those_without_graphs() -> None:
    model = tiny("llama").to(GPU)
    call = asked(3, 9, 1, 6, new=24, do_sample=True, eos_token_id=ENDS)
    found = []
    for graph in ("eager", "cudagraphs"):
        options: dict[str, Any] = {"graph": graph}
        with hybrid_fx.hybridize(model, **options) as engine:
            torch.manual_seed(3)
            found.append((engine.generate(**call).tolist(), torch.cuda.get_rng_state().tolist()))
            counted = engine.stats.counters["recordings"]
    assert found[0] == found[1]
    assert counted > 1


@pytest.mark.parametrize("options", [{}, {"share_storage": True}])
def test_a_weight_step_keeps_the_graphs(options: dict[str, Any]) -> None:
    model = tiny("llama").to(GPU)
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    with engine_of(model, **options) as engine:
        seen = set()
        for _ in range(3):
            seen.add(str(assert_same(engine, asked(5, 3)).tolist()))
            engine.train()
            ids = torch.randint(VOCAB, (2, 8), device=GPU)
            engine(input_ids=ids).logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            engine.eval()
        assert len(seen) == 3, "a stale weight would show"
        assert engine.stats.counters["recordings"] == 1


def test_adapters_that_change_keep_the_graphs() -> None:
    model = adapted(tiny("llama"))
    with engine_of(model, lora="fold") as engine:
        for seed in range(3):
            randomize_adapters(model, seed, size=0.3)
            assert_same(engine, asked(5, 3))
        assert engine.stats.counters["recordings"] == 1


def test_beams_and_a_second_stream_go_on_from_the_same_graphs() -> None:
    with engine_of(tiny("llama")) as engine:
        call = asked(5, 3, num_beams=3)
        want = hf_generate(engine.module, **call)
        assert torch.equal(engine.generate(**call), want)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            assert torch.equal(engine.generate(**call), want)
        torch.cuda.current_stream().wait_stream(stream)
        assert engine.stats.counters["recordings"] == 1


def test_a_step_that_waits_for_the_device_runs_as_it_is() -> None:
    before = torch.cuda.current_stream()
    with engine_of(tiny("llama"), passes=(LOOKS,)) as engine:
        assert_same(engine, asked(5, 3))
        assert "_local_scalar_dense" in steps_of(engine).failure
    assert torch.cuda.current_stream() == before


def test_closing_gives_all_memory_back() -> None:
    model = tiny("llama").to(GPU)
    for _ in range(2):  # the first time, libraries make workspaces of their own
        before = torch.cuda.memory_allocated()
        with engine_of(model) as engine:
            engine.generate(**asked(5, 3))
            assert torch.cuda.memory_allocated() > before
        del engine
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_so_before_a_capture_begins(name: str) -> None:
    x = X.to(GPU)
    with pytest.raises(NotRecordableError):
        CudaRecorder(GPU).record(lambda: REFUSED[name][0](x.clone()))
    assert torch.equal(x + 0, X.to(GPU)), "the device goes on"


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken_is_captured_and_replayed(name: str) -> None:
    x = X.to(GPU)
    made = CudaRecorder(GPU).record(lambda: TAKEN[name](x.clone()))
    x.copy_(X.flip(0))
    torch.testing.assert_close(made.replay(), TAKEN[name](x.clone()))


@pytest.mark.parametrize("pitch", [256, 768])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (5, 1)])
def test_a_fused_kernel_takes_the_mask(heads: tuple[int, int], pitch: int) -> None:
    def normal(count: int, tokens: int) -> torch.Tensor:
        return torch.randn(3, count, tokens, 64, device=GPU, dtype=torch.bfloat16)

    query, key, value = normal(heads[0], 1), normal(heads[1], 1), normal(heads[1], 1)
    keys, values = normal(heads[1], pitch), normal(heads[1], pitch)
    at = torch.tensor([100], device=GPU)
    valid = torch.ones(3, pitch, dtype=torch.bool, device=GPU)
    masks = masks_at(valid, at, [0], torch.bfloat16)
    given_ = (query, key, value, keys, values, at, masks, pitch, 0.125)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        fused = attend_at(*given_)
    with sdpa_kernel(SDPBackend.MATH):
        written = attend_at(*given_)
    torch.testing.assert_close(fused, written, rtol=2e-2, atol=2e-2)
