"""Parameters that lie in one buffer: what is stacked without a copy, and what is left alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from hybrid_fx.plan.records import Prepared
from hybrid_fx.runtime.prepared import PreparedTensors
from hybrid_fx.runtime.shared_rows import SharedRows, writes_in_place

ROWS, WIDTH = (16, 8, 8), 16


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """Three weights [n, 16] with random values."""
    return {
        name: nn.Parameter(torch.randn(rows, WIDTH).to(dtype))
        for name, rows in zip("qkv", ROWS, strict=True)
    }


def stacked(rows: SharedRows, weights: dict[str, Any], order: str = "qkv") -> Tensor:
    """One run of a prepare graph that stacks ``order``."""
    with rows.laying_out(weights, lambda: None), torch.no_grad():
        return rows.concat_rows(*(weights[name] for name in order))


def reason(rows: SharedRows, order: str = "qkv") -> str:
    return rows.copied[tuple(order)]


def test_a_stack_is_the_memory_of_its_parameters() -> None:
    rows, weights = SharedRows(), parameters()
    before = {name: (id(w), w._version, w.detach().clone()) for name, w in weights.items()}
    whole = stacked(rows, weights)
    assert torch.equal(whole, torch.cat(list(weights.values())))
    assert [w.data_ptr() for w in weights.values()] == [
        whole.data_ptr() + start * WIDTH * 4 for start in (0, 16, 24)
    ]
    for name, weight in weights.items():
        assert (id(weight), weight._version) == before[name][:2]
        assert torch.equal(weight, before[name][2])
        assert weight.is_leaf
        assert weight.requires_grad
        assert weight.untyped_storage().nbytes() == weight.nbytes
    assert rows.lent(whole)
    assert rows.copied == {}
    with torch.no_grad():
        weights["k"].fill_(3.0)
    assert whole[16:24].eq(3).all()
    assert stacked(rows, weights) is whole
    assert rows.moved == 3


def test_nothing_is_laid_out_outside_of_the_block() -> None:
    rows, weights = SharedRows(), parameters()
    copy = rows.concat_rows(*weights.values())
    assert torch.equal(copy, torch.cat(list(weights.values())))
    assert rows.moved == 0
    assert not rows.lent(copy)


@pytest.mark.parametrize("how", ["data", "parameter", "resized", "shared memory"])
def test_a_parameter_that_was_put_elsewhere_is_copied_from_then_on(how: str) -> None:
    rows, weights = SharedRows(), parameters()
    whole = stacked(rows, weights)
    if how == "data":
        weights["k"].data = torch.ones(8, WIDTH)
    elif how == "parameter":
        weights["k"] = nn.Parameter(torch.ones(8, WIDTH))
    elif how == "resized":
        weights["k"].data = torch.ones(4, WIDTH)
    else:
        weights["k"].share_memory_()
    for _ in range(2):
        copy = stacked(rows, weights)
        assert torch.equal(copy, torch.cat(list(weights.values())))
        assert not rows.lent(copy)
        assert "put elsewhere since" in reason(rows)
    assert rows.moved == 3
    assert not rows.lent(whole)
    rows.begin()
    stacked(rows, weights)
    assert (rows.moved == 6) == (how != "shared memory")


@pytest.mark.parametrize("name", "qkv")
def test_outside_of_the_block_too_a_stack_is_only_that_of_its_parameters(name: str) -> None:
    rows, weights = SharedRows(), parameters()
    whole = stacked(rows, weights)
    assert rows.concat_rows(*weights.values()) is whole
    others = {**weights, name: weights[name].detach() + 1}  # as while a plan is proven
    assert torch.equal(rows.concat_rows(*others.values()), torch.cat(list(others.values())))
    weights[name].share_memory_()  # its storage stays, with other memory
    weights[name].data.fill_(7.0)
    assert torch.equal(rows.concat_rows(*weights.values()), torch.cat(list(weights.values())))


def test_a_buffer_is_given_up_with_the_last_of_its_parameters() -> None:
    rows, weights = SharedRows(), parameters()
    first = StorageWeakRef(stacked(rows, weights).untyped_storage())
    for weight in weights.values():
        weight.data = weight.detach().clone()
    stacked(rows, weights)
    assert first.expired()


def tied(weights: dict[str, Any]) -> None:
    weights["k"].data = weights["v"].data


def tied_elsewhere(weights: dict[str, Any]) -> None:
    weights["head"] = nn.Parameter(weights["q"].data)


def a_view(weights: dict[str, Any]) -> None:
    weights["k"].data = torch.randn(16, WIDTH)[:8]


def flattened(weights: dict[str, Any]) -> None:
    flat = torch.cat([weight.detach().flatten() for weight in weights.values()])
    sizes = [weight.numel() for weight in weights.values()]
    for weight, piece in zip(weights.values(), flat.split(sizes), strict=True):
        weight.data = piece.view(weight.shape)


def a_column_view(weights: dict[str, Any]) -> None:
    weights["v"].data = torch.randn(WIDTH, 8).t()


def of_another_dtype(weights: dict[str, Any]) -> None:
    weights["v"].data = weights["v"].data.double()


def a_buffer(weights: dict[str, Any]) -> None:
    weights["q"] = weights["q"].detach()


def a_subclass(weights: dict[str, Any]) -> None:
    kind = type("Quantized", (nn.Parameter,), {})
    weights["q"] = kind(weights["q"].detach().clone())


def shared(weights: dict[str, Any]) -> None:
    weights["q"].share_memory_()


def inference(weights: dict[str, Any]) -> None:
    with torch.inference_mode():
        weights["q"] = nn.Parameter(torch.randn(16, WIDTH), requires_grad=False)


def off_a_boundary(weights: dict[str, Any]) -> None:
    storage: Any = torch.empty(8 * WIDTH * 4 + 64, dtype=torch.uint8).untyped_storage()
    place = torch.empty(0).set_(storage[16 : 16 + 8 * WIDTH * 4])
    weights["k"].data = place.view(8, WIDTH).normal_()


ODD = {
    tied: "k shares its memory with v",
    tied_elsewhere: "q shares its memory with head",
    a_view: "k is a view",
    flattened: "q is a view",
    a_column_view: "v is not dense",
    of_another_dtype: "v is torch.float64",
    a_buffer: "q is a Tensor",
    a_subclass: "q is a Quantized",
    shared: "q lies in shared",
    inference: "q was made in inference mode",
    off_a_boundary: "k would stand otherwise",
}


@pytest.mark.parametrize("change", ODD, ids=lambda change: change.__name__)
def test_what_is_not_ours_to_move_is_copied_and_said(change: Any) -> None:
    rows, weights = SharedRows(), parameters()
    change(weights)
    before = {name: weight.data_ptr() for name, weight in weights.items()}
    copy = stacked(rows, weights)
    assert torch.equal(copy, torch.cat([weights[name] for name in "qkv"]))
    assert reason(rows).startswith(ODD[change])
    assert {name: weight.data_ptr() for name, weight in weights.items()} == before
    assert rows.moved == 0
    assert not rows.lent(copy)


def test_a_parameter_lies_in_one_stack_once() -> None:
    rows, weights = SharedRows(), parameters()
    stacked(rows, weights, "qq")
    assert "stands in it twice" in reason(rows, "qq")
    whole = stacked(rows, weights, "qk")
    stacked(rows, weights, "kv")
    assert "k lies in another stack" in reason(rows, "kv")
    assert stacked(rows, weights, "qk") is whole


def test_memory_that_something_else_holds_stays_where_it_is() -> None:
    rows, weights = SharedRows(), parameters()
    view = weights["v"].data
    stacked(rows, weights)
    assert reason(rows).startswith("something else holds the memory of v")
    del view
    assert rows.lent(stacked(rows, weights))


def test_a_live_graph_has_the_gradients_it_would_have_had() -> None:
    weights = parameters()
    x = torch.randn(3, WIDTH, requires_grad=True)
    want = torch.autograd.grad(sum((x @ w.t()).sin().sum() for w in weights.values()), [x])[0]
    for product in (lambda w: x @ w.t(), lambda w: (x[:, None] * w).sum(-1)):
        rows = SharedRows()
        loss = sum(product(w).sin().sum() for w in weights.values())
        stacked(rows, weights)
        torch.testing.assert_close(torch.autograd.grad(loss, [x])[0], want)


def test_a_piece_is_as_far_from_a_boundary_as_the_memory_it_replaces() -> None:
    weights = parameters()
    for weight in weights.values():  # as safetensors maps a file
        storage: Any = torch.empty(weight.nbytes + 128, dtype=torch.uint8).untyped_storage()
        start = (48 - storage.data_ptr()) % 64
        place = torch.empty(0).set_(storage[start : start + weight.nbytes]).view(weight.shape)
        weight.data = place.copy_(weight.detach())
        del place
    rows = SharedRows()
    assert rows.lent(stacked(rows, weights))
    assert {weight.data_ptr() % 64 for weight in weights.values()} == {48}
    rows.undo(weights)
    assert {weight.data_ptr() % 64 for weight in weights.values()} == {48}


def test_undone_parameters_have_memory_of_their_own_and_the_same_values() -> None:
    rows, weights = SharedRows(), parameters()
    whole = stacked(rows, weights)
    values = whole.clone()
    held = weights["v"].data  # something of the user's lies there now
    rows.undo({**weights, "tied": weights["q"]})
    assert torch.equal(torch.cat(list(weights.values())), values)
    whole.zero_()
    assert torch.equal(weights["q"], values[:16])
    assert torch.equal(weights["k"], values[16:24])
    assert held.data_ptr() == weights["v"].data_ptr()
    assert not rows.lent(whole)


def test_the_last_engine_to_lay_out_has_the_stack() -> None:
    weights = parameters()
    one, other = SharedRows(), SharedRows()
    stacked(one, weights)
    whole = stacked(other, weights)
    assert other.lent(whole)
    copy = stacked(one, weights)
    assert "put elsewhere since" in reason(one)
    assert torch.equal(copy, whole)
    assert stacked(other, weights) is whole, "engines do not take a stack from one another for ever"


def test_a_graph_that_writes_into_what_it_computed_is_found() -> None:
    assert writes_in_place("    a = op.concat_rows(b, c)\n    op.mul_(a, 2)\n")
    assert not writes_in_place("    a = op.concat_rows(b, c)\n    d = op.mul(a, 2)\n")


WANTED = (
    Prepared(name="x", recipe="", shape=(32, WIDTH), dtype="float32", owns_memory=True),
    Prepared(name="y", recipe="", shape=(16, WIDTH), dtype="float32", owns_memory=False),
)
STEPS = st.lists(
    st.sampled_from(["prepare", "edit q", "edit v", "replace k", "replace q", "begin", "release"]),
    min_size=2,
    max_size=9,
)


@example(["prepare", "replace k", "prepare", "begin"])
@given(STEPS)
def test_a_refill_never_reaches_a_parameter(steps: list[str]) -> None:
    rows, weights = SharedRows(), parameters()
    held = PreparedTensors(WANTED, rows=rows)
    seen = {name: weight.detach().clone() for name, weight in weights.items()}
    for step, number in zip((*steps, "prepare"), itertools.count(), strict=False):
        what, _, name = step.partition(" ")
        if what == "edit":
            with torch.no_grad():
                weights[name].fill_(number)
            seen[name] = weights[name].detach().clone()
        elif what == "replace":
            weights[name].data = torch.full_like(weights[name], number)
            seen[name] = weights[name].detach().clone()
        elif what == "begin":
            rows.begin()
        elif what == "release":
            held.release()
        else:
            held.begin()
            whole = stacked(rows, weights)
            held.store(0, whole)
            held.store(1, weights["q"])
            held.finish()
            assert torch.equal(held.tensors[0], torch.cat(list(weights.values())))
            ours = rows.lent(whole)
            assert held.nbytes == (0 if ours else whole.nbytes)
            assert held.shared_nbytes == (whole.nbytes if ours else 0)
            assert [nbytes for _, nbytes, _ in held.copies] == ([] if ours else [whole.nbytes])
        for name, weight in weights.items():
            assert torch.equal(weight, seen[name]), step
