"""What a recording of a step is: what it repeats, what it refuses, and the attention inside."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tape import Tape, TapeRecorder, taped
from torch import Tensor

import hybrid_fx
from hybrid_fx.errors import ConfigError
from hybrid_fx.passes.attention import attend_one
from hybrid_fx.plan.records import KVLayer
from hybrid_fx.runtime import recording
from hybrid_fx.runtime.attend_at import attend_at, masks_at
from hybrid_fx.runtime.recording import (
    CudaRecorder,
    NotRecordableError,
    Watch,
    check_records,
    recorder_of,
)
from hybrid_fx.runtime.workspace import Workspace

CPU = torch.device("cpu")
X = torch.arange(6.0)

#: Operators that wait for a GPU, or whose shapes wait for data, to what is said of them.
REFUSED = {
    "item": (lambda x: x.sum().item(), "_local_scalar_dense reads"),
    "a branch": (lambda x: x if x.any() else -x, "_local_scalar_dense reads"),
    "equal": (lambda x: torch.equal(x, x + 1), "equal reads"),
    "nonzero": (lambda x: x.nonzero(), "nonzero makes a shape"),
    "masked_select": (lambda x: x.masked_select(x > 1), "masked_select makes a shape"),
    "unique": (lambda x: x.unique(), "_unique2 makes a shape"),
    "counts": (lambda x: x.repeat_interleave(x.long()), "repeat_interleave makes a shape"),
    "bool index": (lambda x: x[x > 1], "indexes by a mask"),
    "bool write": (lambda x: x.index_put_((x > 1,), X[0]), "index_put_ indexes by a mask"),
    "host data": (lambda x: x + torch.tensor([1.0] * 6), "lift_fresh makes a tensor"),
    "random": (lambda x: x + torch.rand(6), "rand draws"),
    "dropout": (lambda x: F.dropout(x, 0.5), "draws random numbers"),
    "elsewhere": (lambda x: x.to("meta"), "_to_copy copies to meta"),
    "from elsewhere": (lambda x: x.copy_(torch.empty(6, device="meta")), "from meta"),
}
#: Operators of the same kind that a GPU records.
TAKEN = {
    "index": lambda x: x[x.long()],
    "index_copy_": lambda x: x.index_copy_(0, x[:1].long(), x[3:4].clone()),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 0),
    "repeats of a known sum": lambda x: x.repeat_interleave(
        torch.ones_like(x).long(), output_size=6
    ),
    "where": lambda x: torch.where(x > 1, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(x > 1, -torch.inf),
    "topk": lambda x: x.topk(2).values,
    "attention": lambda x: F.scaled_dot_product_attention(*[x.view(1, 1, 3, 2)] * 3),
    "a cast": lambda x: x.to(torch.bfloat16),
    "a number": lambda x: x * 2 + 1 / 3,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_gpu_cannot_record_is_refused_by_name(name: str) -> None:
    step, said = REFUSED[name]
    with pytest.raises(NotRecordableError, match=said), Watch(CPU):
        step(X.clone())


@pytest.mark.parametrize("name", TAKEN)
def test_what_a_gpu_records_is_not_refused(name: str) -> None:
    wanted = TAKEN[name](X.clone())
    with Watch(CPU):
        got = TAKEN[name](X.clone())
    assert torch.equal(got, wanted)


def test_a_tensor_on_the_host_is_refused_though_it_holds_one_number() -> None:
    """Its value would be that of the recording, whatever a weight switch writes into it."""
    nowhere = torch.device("meta")
    with pytest.raises(NotRecordableError, match="takes a tensor from cpu"), Watch(nowhere):
        torch.empty(3, device=nowhere) * torch.ones(())


def test_a_tape_repeats_operators_on_its_memory_and_not_the_code_around_them() -> None:
    factor, given_ = 2.0, torch.ones(3)
    kept = torch.zeros(2, 3)

    def step() -> Tensor:
        rows = kept[:, 1:]
        rows.copy_((given_ * factor)[1:].expand(2, 2))
        return kept.sum(0) + given_

    tape = Tape(step, CPU)
    first = tape.replay()
    assert first.tolist() == [1, 5, 5]
    factor = 100.0
    given_.fill_(2.0)
    kept[0, 0] = 7.0
    assert tape.replay() is first
    assert first.tolist() == [9, 10, 10], "the number is that of the recording"
    assert tape.nbytes == 3 * 4 * 3


def grouped(seed: int, rows: int, heads: int, kv_heads: int, size: int, pitch: int) -> Any:
    """Query, key and value of one token a row; keys and values of all positions but those."""
    rng = torch.Generator().manual_seed(seed)
    shapes = [(heads, 1), (kv_heads, 1), (kv_heads, 1), (kv_heads, pitch), (kv_heads, pitch)]
    return [torch.randn(rows, count, n, size, generator=rng) for count, n in shapes]


@given(
    seed=st.integers(0, 5),
    rows=st.integers(1, 4),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3), (5, 1)]),
    at=st.integers(0, 20),
    window=st.sampled_from([0, 1, 3, 30]),
    softcap=st.sampled_from([0.0, 5.0]),
    sinks=st.booleans(),
    padded=st.booleans(),
)
@settings(max_examples=60)
def test_attention_at_a_column_is_that_of_one_token(
    seed: int,
    rows: int,
    heads: tuple[int, int],
    at: int,
    window: int,
    softcap: float,
    sinks: bool,
    padded: bool,
) -> None:
    query, key, value, keys, values = grouped(seed, rows, *heads, 8, 32)
    extra = torch.randn(heads[0]) if sinks else None
    valid = torch.ones(rows, 32, dtype=torch.bool)
    if padded:
        valid &= torch.arange(32) >= torch.randint(at + 1, (rows, 1))
    wanted_memory = (keys.clone(), values.clone())
    slots = torch.arange(rows)[:, None] * 32 + torch.arange(at + 1)
    shown = valid[:, : at + 1] if padded else None
    options = (8**-0.5, window, softcap, extra)
    wanted = attend_one(query, key, value, *wanted_memory, slots, shown, 32, *options)
    column = torch.tensor([at])
    valid[:, at + 1 :] = torch.rand(rows, 31 - at) > 0.5  # nobody asks
    masks = masks_at(valid, column, [0, window], torch.float32)
    got = attend_at(query, key, value, keys, values, column, masks, 32, *options)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(keys, wanted_memory[0])
    assert torch.equal(values, wanted_memory[1])


def test_a_row_whose_columns_are_all_padding_sees_itself() -> None:
    query, key, value, keys, values = grouped(0, 2, 4, 2, 8, 32)
    valid = torch.zeros(2, 32, dtype=torch.bool)
    masks = masks_at(valid, torch.tensor([5]), [0, 2], torch.bfloat16)
    assert all(mask.isfinite().sum() == 2 for mask in masks.values())
    got = attend_at(query, key, value, keys, values, torch.tensor([5]), masks, 32, 1.0)
    torch.testing.assert_close(got.squeeze(1), value.squeeze(2).repeat_interleave(2, 1))


def workspace(recorded: bool) -> Workspace:
    layer = KVLayer(
        path="a", kv_heads=2, head_size=3, value_head_size=3, window=None, dtype="float32"
    )
    return Workspace([layer], CPU, recorded=recorded)


def test_recorded_rows_are_few_sizes_and_what_nobody_wrote_is_zero() -> None:
    space = workspace(recorded=True)
    space.reserve(3, 10)
    assert (space.pitch, space.most_rows, space.generation) == (256, 3, 1)
    space.keys[0].fill_(torch.nan)
    space.reserve(2, 257)
    assert (space.pitch, space.most_rows, space.generation) == (512, 2, 2)
    space.values[0].fill_(torch.nan)
    space.reserve(1, 300)
    assert (space.pitch, space.most_rows, space.generation) == (512, 2, 2)
    assert not any(memory[0].any() for memory in space.first(2))


def test_moving_rows_keeps_what_they_hold_and_forgetting_reaches_all() -> None:
    space = workspace(recorded=True)
    space.reserve(3, 10)
    space.keys[0][:, :, :4] = torch.arange(3.0)[:, None, None, None] + 1
    space.relay(torch.tensor([2, 0]), 256, 4)
    assert space.keys[0][:, 0, 0, 0].tolist() == [3, 1]
    space.forget(2, 4)
    assert space.first(3)[0][0][:, 0, :5, 0].bool().tolist() == [[True] * 2 + [False] * 3] * 3
    other = workspace(recorded=False)
    other.reserve(3, 10)
    assert other.pitch == 10


def test_only_some_devices_record_and_others_are_refused_with_the_remedy() -> None:
    assert recorder_of(CPU) is None
    with pytest.raises(ConfigError, match=r'on cuda, and the model is on cpu; .*graph="eager"'):
        check_records("cudagraphs", CPU)
    check_records("cudagraphs", torch.device("cuda", 1))
    check_records("eager", CPU)
    with taped():
        assert isinstance(recorder_of(CPU), TapeRecorder)
        check_records("cudagraphs", CPU)


def test_a_refused_model_stands_as_before() -> None:
    from tiny_models import tiny

    model = tiny("llama")
    before = dict(vars(model))
    with pytest.raises(ConfigError, match="the model is on cpu"):
        hybrid_fx.hybridize(model, graph="cudagraphs")
    assert vars(model) == before


class _Stream:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: _Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def _fake_cuda(
    log: list[str],
    patch: pytest.MonkeyPatch,
    *,
    fails: bool = False,
) -> None:
    """``torch.cuda`` as far as a recorder uses it, each call held against the real signature."""
    real = {name: getattr(torch.cuda, name) for name in ("graph", "memory_snapshot", "CUDAGraph")}
    current = [_Stream(log, "here")]

    @contextmanager
    def stream(other: _Stream) -> Any:
        before = current[0]
        current[0] = other
        try:
            yield
        finally:
            current[0] = before

    class Capture:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            bound = inspect.signature(real["graph"]).bind(*args, **kwargs).arguments
            self.mode, self.pool = bound["capture_error_mode"], bound["pool"]
            self.capture_stream = bound["stream"] or _Stream(log, "torch's")

        def __enter__(self) -> None:
            log.append(f"captures on {self.capture_stream.name} into {self.pool}, {self.mode}")
            current[0] = self.capture_stream

        def __exit__(self, *_: object) -> None:
            if fails:
                raise RuntimeError("invalidated")  # and the stream stays
            current[0] = _Stream(log, "here")

    class CUDAGraph:
        def replay(self) -> None:
            log.append("replays")

    def memory_snapshot(**asked: Any) -> Any:
        inspect.signature(real["memory_snapshot"]).bind(**asked)
        captured = sum(entry.startswith("captures") for entry in log)
        mine = {"total_size": 100 * captured, "segment_pool_id": (0, 1)}
        return [mine, {"total_size": 7 * captured, "segment_pool_id": (0, 0)}]

    @contextmanager
    def device(_: Any) -> Any:
        yield

    pools, own = iter([(0, 1), (0, 2)]), iter(["own", "another"])
    for name, fake in {
        "Stream": lambda device: _Stream(log, f"{next(own)} on {device}"),
        "stream": stream,
        "current_stream": lambda _: current[0],
        "graph": Capture,
        "get_allocator_backend": lambda: "native",
        "CUDAGraph": CUDAGraph,
        "graph_pool_handle": lambda: next(pools),
        "memory_snapshot": memory_snapshot,
        "device": device,
    }.items():
        patch.setattr(torch.cuda, name, fake)


def test_a_gpu_is_warmed_up_beside_the_stream_and_captures_share_one_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []
    _fake_cuda(log, monkeypatch)
    recorder = CudaRecorder(CPU)

    def step() -> Tensor:
        log.append(f"steps on {torch.cuda.current_stream(0).name}")
        return X + 1

    made = recorder.record(step)
    own = "own on cpu"
    ran = [f"{own} waits for here", *[f"steps on {own}"] * 2, f"here waits for {own}"]
    captured = [f"captures on {own} into (0, 1), thread_local", f"steps on {own}"]
    assert log == [*ran, *captured], "and not on torch's, which may be on another GPU"
    assert torch.equal(made.replay(), X + 1)
    assert made.replay() is made.replay()
    assert recorder.record(step).nbytes == made.nbytes == 100
    recorder.release()
    recorder.record(step)
    assert [entry for entry in log if "captures" in entry][1:] == [
        f"captures on {own} into (0, 1), thread_local",
        f"captures on {own} into (0, 2), thread_local",
    ]


def test_a_capture_that_fails_leaves_the_stream_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    _fake_cuda(log, monkeypatch, fails=True)
    with pytest.raises(RuntimeError, match="invalidated"):
        CudaRecorder(CPU).record(lambda: X + 1)
    assert torch.cuda.current_stream(0).name == "here"


@pytest.mark.parametrize("name", ["item", "host data"])
def test_a_step_that_cannot_be_captured_never_comes_to_a_capture(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    log: list[str] = []
    _fake_cuda(log, monkeypatch)
    with pytest.raises(NotRecordableError):
        CudaRecorder(CPU).record(lambda: REFUSED[name][0](X.clone()))
    assert log == ["own on cpu waits for here", "here waits for own on cpu"]


def test_whoever_goes_on_waits_for_a_warm_up_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    _fake_cuda(log, monkeypatch)
    steps = iter([X])

    def step() -> Tensor:
        log.append(f"steps on {torch.cuda.current_stream(0).name}")
        return next(steps)

    with pytest.raises(StopIteration):
        CudaRecorder(CPU).record(step)
    assert log[1:] == [*["steps on own on cpu"] * 2, "here waits for own on cpu"]
    assert torch.cuda.current_stream(0).name == "here"


def test_the_table_of_recorders_is_read_only() -> None:
    with pytest.raises(TypeError):
        recording.RECORDERS["cpu"] = TapeRecorder  # type: ignore[index]
