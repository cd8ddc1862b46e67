"""Sessions of a real plan: rows grow, move, leave and are padded; the logits stay the same.

Legend: B batch, T tokens, S positions, V vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCAB, tiny
from torch.utils._python_dispatch import TorchDispatchMode

import hybrid_fx
from hybrid_fx.errors import EngineBusyError
from hybrid_fx.plan.records import KVLayer
from hybrid_fx.runtime import moving
from hybrid_fx.runtime.recording import tensors_in
from hybrid_fx.runtime.session import PlanSession
from hybrid_fx.runtime.workspace import Workspace

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 products of other shapes sum in another order


@pytest.fixture(scope="module")
def runners():
    """A prepared runner for each kind of attention; the engines keep them alive."""
    engines = [hybrid_fx.hybridize(tiny(kind)) for kind in ("llama", "mistral")]
    return {e.module.config.model_type: e._graphs.ready() for e in engines}, engines


@pytest.fixture(params=["llama", "mistral"])
def runner(runners, request):
    return runners[0][request.param]


def random_ids(batch, length, seed=0):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def positions_of(batch, first, length):
    return torch.arange(first, first + length).expand(batch, length)


def feed(session, ids, widths, keep_all=True):
    """Columns in pieces of these widths; logits [B, T, V] of all of them."""
    parts, at = [], session.length
    start = at
    for width in widths:
        piece = ids[:, at - start : at - start + width]
        positions = positions_of(len(ids), at, width)
        parts.append(session.forward(piece, positions, keep=width))
        at += width
    return torch.cat(parts, 1)


def once(runner, ids, valid=None, positions=None):
    """All columns in one call."""
    batch, length = ids.shape
    session = runner.session(batch=batch, capacity=length)
    try:
        at = positions_of(batch, 0, length) if positions is None else positions
        return session.forward(ids, at, valid, keep=length)
    finally:
        session.close()


def test_the_table_names_the_slot_of_every_column_while_rows_grow_and_move():
    """The graphs read it only where rows do not lie at one pitch; it must be right all the same."""
    layer = KVLayer(
        path="a", kv_heads=1, head_size=2, value_head_size=2, window=None, dtype="float32"
    )
    device = torch.device("cpu")
    seen = []

    def graph(ids, positions, slots, valid, pitch, *_):
        seen.append((slots, pitch))
        return torch.zeros(*ids.shape, VOCAB)

    session = PlanSession(
        Workspace([layer], device), graph, graph, [], batch=2, capacity=3, device=device,
        limit=None, timer=lambda _: nullcontext(SimpleNamespace(tokens=0)), on_close=lambda: None,
    )  # fmt: skip
    feed(session, random_ids(2, 6), [3, 3])
    session.reorder(torch.tensor([1, 0, 1]))
    feed(session, random_ids(3, 1), [1])
    for slots, pitch in seen:
        rows, columns = slots.shape
        assert pitch >= columns
        assert slots.tolist() == [[b * pitch + s for s in range(columns)] for b in range(rows)]
    assert [slots.shape for slots, _ in seen] == [(2, 3), (2, 6), (3, 7)]


@given(
    widths=st.lists(st.integers(1, 4), min_size=1, max_size=8),
    capacity=st.integers(1, 12),
    batch=st.integers(1, 3),
)
@settings(max_examples=15)
def test_a_session_that_grows_step_by_step_says_what_one_call_says(
    runners, widths, capacity, batch
):
    for runner in runners[0].values():
        ids = random_ids(batch, sum(widths))
        runner.workspace.release()
        session = runner.session(batch=batch, capacity=capacity)
        try:
            logits = feed(session, ids, widths)
            assert session.length == sum(widths)
        finally:
            session.close()
        torch.testing.assert_close(logits, once(runner, ids), **CLOSE)


def test_growth_stops_at_the_models_positions_and_goes_on_where_it_must(runner):
    runner.workspace.release()
    session = runner.session(batch=1, capacity=120)
    feed(session, random_ids(1, 121), [120, 1])
    assert runner.workspace.pitch == 128  # not half as much again
    session.close()


@pytest.mark.parametrize("rows", [[1, 0], [0, 0, 1, 1], [1], [1, 1], [0, 1, 0]])
def test_rows_are_reordered_repeated_added_and_dropped(runner, rows):
    ids, more = random_ids(2, 6), random_ids(len(rows), 3, seed=1)
    runner.workspace.release()  # so that more rows need more memory
    session = runner.session(batch=2, capacity=6)
    feed(session, ids, [6])
    session.reorder(torch.tensor(rows))
    assert session.batch == len(rows)
    logits = feed(session, more, [1, 1, 1])
    session.close()
    whole = once(runner, torch.cat((ids[rows], more), 1))
    torch.testing.assert_close(logits, whole[:, 6:], **CLOSE)


@pytest.mark.parametrize("rows", [[0, 3, 2], [0, 1], [3, 2, 1, 0], [3, 0, 0, 1, 3]])
def test_rows_move_within_the_memory_there_is(runner, rows):
    ids, more = random_ids(4, 6), random_ids(len(rows), 3, seed=1)
    session = runner.session(batch=5, capacity=12)
    held = [t.data_ptr() for t in runner.workspace.keys]
    session.reorder(torch.arange(4))
    feed(session, ids, [6])
    session.reorder(torch.tensor(rows))
    assert [t.data_ptr() for t in runner.workspace.keys] == held
    assert runner.workspace.rows == len(rows)
    logits = feed(session, more, [1, 1, 1])
    session.close()
    whole = once(runner, torch.cat((ids[rows], more), 1))
    torch.testing.assert_close(logits, whole[:, 6:], **CLOSE)


def test_where_no_row_changes_its_place_nothing_is_copied(runner):
    session = runner.session(batch=3, capacity=12)
    feed(session, random_ids(3, 6), [6])
    memory = (*runner.workspace.keys, *runner.workspace.values)
    before = [t._version for t in memory]
    session.reorder(torch.tensor([0, 1]))
    assert [t._version for t in memory] == before
    session.reorder(torch.tensor([1]))
    session.close()
    assert all(t._version > old for t, old in zip(memory, before, strict=True))


def test_columns_are_cropped_and_others_follow(runner):
    ids, more = random_ids(2, 7), random_ids(2, 4, seed=1)
    session = runner.session(batch=2, capacity=8)
    feed(session, ids, [5, 1, 1])
    session.crop(4)
    assert session.length == 4
    logits = feed(session, more, [2, 1, 1])
    session.close()
    torch.testing.assert_close(
        logits, once(runner, torch.cat((ids[:, :4], more), 1))[:, 4:], **CLOSE
    )


@pytest.mark.parametrize("pads", [1, 5, 9])
def test_a_padded_row_says_what_the_row_says_alone(runner, pads):
    alone, other = random_ids(1, 6), random_ids(1, 6 + pads, seed=2)
    ids = torch.cat((torch.cat((torch.zeros(1, pads, dtype=torch.long), alone), 1), other))
    valid = torch.ones(2, 6 + pads, dtype=torch.bool)
    valid[0, :pads] = False
    positions = (valid.long().cumsum(1) - 1).clamp_min(0)
    session = runner.session(batch=2, capacity=2)
    width = pads + 3
    parts = [session.forward(ids[:, :width], positions[:, :width], valid[:, :width], keep=width)]
    for at in range(width, 6 + pads):  # nothing is said of later columns: they are valid
        parts.append(session.forward(ids[:, at : at + 1], positions[:, at : at + 1]))
    session.reorder(torch.tensor([1, 0]))
    last = session.forward(random_ids(2, 1, seed=3), positions[[1, 0], -1:] + 1)
    session.close()
    logits = torch.cat(parts, 1)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:1, pads:], once(runner, alone), **CLOSE)
    torch.testing.assert_close(logits[1:], once(runner, other), **CLOSE)
    longer = torch.cat((alone, random_ids(2, 1, seed=3)[1:]), 1)
    torch.testing.assert_close(last[1:], once(runner, longer)[:, -1:], **CLOSE)


def test_columns_that_are_padding_in_every_row_change_nothing(runner):
    ids = torch.cat((torch.zeros(2, 4, dtype=torch.long), random_ids(2, 5)), 1)
    valid = torch.arange(9).expand(2, 9) >= 4
    positions = (torch.arange(9) - 4).clamp_min(0).expand(2, 9)
    session = runner.session(batch=2, capacity=9)
    empty = session.forward(ids[:, :4], positions[:, :4], valid[:, :4], keep=4)
    one_more = session.forward(ids[:, :1], positions[:, :1], valid[:, :1])  # decode, all padding
    session.crop(4)
    logits = session.forward(ids[:, 4:], positions[:, 4:], keep=5)
    session.close()
    assert empty.isfinite().all()
    assert one_more.isfinite().all()
    torch.testing.assert_close(logits, once(runner, ids[:, 4:]), **CLOSE)


def test_memory_left_over_from_other_rows_never_shows(runner):
    ids = random_ids(2, 6)
    wanted = once(runner, ids)
    session = runner.session(batch=4, capacity=20)
    session.close()
    for memory in (*runner.workspace.keys, *runner.workspace.values):
        memory.fill_(float("nan"))
    session = runner.session(batch=2, capacity=4)
    logits = feed(session, ids, [3, 1, 1, 1])
    session.close()
    torch.testing.assert_close(logits, wanted, **CLOSE)


def test_memory_is_kept_from_session_to_session_and_counted_exactly(runner):
    runner.workspace.release()
    assert runner.workspace.nbytes == 0
    runner.session(batch=3, capacity=10).close()
    held = [t.untyped_storage().data_ptr() for t in runner.workspace.keys]
    layers, kv_heads, head_size, four_bytes = 2, 2, 8, 4
    assert runner.workspace.nbytes == 2 * layers * 3 * 10 * kv_heads * head_size * four_bytes
    runner.session(batch=2, capacity=15).close()  # another layout of the same memory
    assert [t.untyped_storage().data_ptr() for t in runner.workspace.keys] == held
    runner.session(batch=2, capacity=16).close()
    assert runner.workspace.nbytes == 2 * layers * 32 * kv_heads * head_size * four_bytes


def test_an_allocation_that_fails_leaves_a_workspace_that_works(runner, monkeypatch):
    ids = random_ids(2, 6)
    wanted = once(runner, ids)
    runner.workspace.release()
    real, calls = torch.zeros, []

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError("no more")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros", fails)
    with pytest.raises(MemoryError):
        runner.session(batch=2, capacity=12)
    monkeypatch.undo()
    torch.testing.assert_close(once(runner, ids), wanted)


def test_one_session_at_a_time_and_a_closed_one_frees_the_runner(runner):
    session = runner.session(batch=1, capacity=2)
    with pytest.raises(EngineBusyError, match="another generate"):
        runner.session(batch=1, capacity=2)
    session.close()
    session.close()
    runner.session(batch=1, capacity=2).close()


class Copies(TorchDispatchMode):
    """Notes what comes from the host, and how; nothing else may look there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[list[int], bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        result = func(*args, **given)
        places = {t.device.type for t in tensors_in((args, given, result))}
        if len(places) > 1:
            assert func._schema.name == "aten::_to_copy", f"{func} waits for its rows"
            self.seen.append((args[0].flatten().tolist(), given["non_blocking"]))
        return result


def test_rows_come_from_the_host_once_for_each_use_and_nobody_waits_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, pinned = torch.device("meta"), []
    monkeypatch.setattr(moving, "ASYNCHRONOUS", frozenset({"meta"}))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t.tolist()) or t)
    layer = KVLayer(
        path="a", kv_heads=2, head_size=4, value_head_size=4, window=None, dtype="float32"
    )
    session = PlanSession(
        Workspace([layer, layer], device),
        lambda *args: torch.empty(3, 1, 7, device=device),
        lambda *args: torch.empty(3, 1, 7, device=device),
        (),
        batch=3,
        capacity=8,
        device=device,
        limit=None,
        timer=lambda name: nullcontext(SimpleNamespace(tokens=0)),
        on_close=lambda: None,
    )
    ids = torch.ones(3, 4, dtype=torch.int64)
    session.forward(ids, ids, torch.tensor([[False, True, True, True]] * 3))
    with Copies() as copies:
        session.reorder(torch.tensor([0, 2]))
    assert copies.seen == [([0, 2], True), ([1, 2], True)], "for validity, keys and values"
    assert pinned == [[0, 2], [[1], [2]]]
    assert session.batch == 2
    with Copies() as copies:
        session.reorder(torch.tensor([0, 1, 1, 0]))  # more than the memory holds
    assert [how for _, how in copies.seen] == [True, True]
