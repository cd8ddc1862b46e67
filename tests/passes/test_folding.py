"""Folds in pieces, against sums in float64: results, where they lie, and what rounding takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hybrid_fx.passes import folding

RANK = 3


@pytest.fixture(params=[7, 64, 2**19], ids=["row by row", "some rows", "whole"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(folding, "_ON_CPU", request.param)
    return int(request.param)


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=rng, dtype=torch.float64) * size).to(dtype)


def weight_of(dtype: torch.dtype, *, turned: bool = False) -> Tensor:
    """[13, 20], its rows or its columns in one piece of memory."""
    if turned:
        return drawn(20, 13, seed=1, dtype=dtype).t()
    return drawn(13, 20, seed=1, dtype=dtype)


def adapter(size: float = 0.1, seed: int = 2) -> tuple[Tensor, Tensor, float]:
    return drawn(RANK, 20, seed=seed), drawn(13, RANK, seed=seed + 1, size=size), 1.5


def exact_sum(weight: Tensor, *deltas: Any) -> Tensor:
    total = weight.double()
    for a, b, scale in zip(deltas[::3], deltas[1::3], deltas[2::3], strict=True):
        total = total + scale * (b.double() @ a.double())
    return total


def lost_share(weight: Tensor, total: Tensor) -> float:
    """What rounding takes of ``total - weight``, all of it in float64."""
    rounded = total.to(weight.dtype).double()
    return float((rounded - total).norm() / (total - weight.double()).norm())


LAYOUTS = pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def close(got: Tensor, wanted: Tensor) -> None:
    """Rounded once: within half a step of the grid, and what float32 sums may differ."""
    assert got.dtype in (torch.float64, torch.float32, torch.bfloat16)
    step = torch.finfo(got.dtype).eps / 2
    slack = 1e-6 if got.dtype != torch.float64 else 1e-14
    torch.testing.assert_close(got.double(), wanted, rtol=step + slack, atol=slack)


@LAYOUTS
@DTYPES
def test_a_fold_in_pieces_is_the_sum_rounded_once(
    dtype: torch.dtype, turned: bool, pieces: int
) -> None:
    weight = weight_of(dtype, turned=turned)
    before = weight.clone()
    deltas = (*adapter(), *adapter(0.2, seed=7))
    for given in (deltas[:3], deltas):
        folded = folding.fold_lora(weight, *given)
        assert folded.dtype == dtype
        assert folded.stride() == weight.stride(), "it lies in memory as its weight does"
        close(folded, exact_sum(weight, *given))
    assert torch.equal(weight, before)


@LAYOUTS
@DTYPES
def test_a_fold_of_dora_in_pieces_scales_each_row_of_the_sum(
    dtype: torch.dtype, turned: bool, pieces: int
) -> None:
    weight, delta = weight_of(dtype, turned=turned), adapter()
    magnitude = drawn(1, 13, seed=5).abs() + 0.5
    wanted = magnitude.double().t() * exact_sum(weight, *delta)
    folded = folding.fold_dora(weight, magnitude, *delta)
    close(folded, wanted)
    again, error = folding.measured_dora(weight, magnitude, *delta)
    assert torch.equal(again, folded)
    if dtype == torch.bfloat16:
        assert float(error) == pytest.approx(lost_share(weight, wanted), rel=1e-3)


@LAYOUTS
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.bfloat16, 0.1), (torch.bfloat16, 1e-3), (torch.float32, 1e-5), (torch.float32, 1e-7)],
)
def test_a_measured_fold_is_the_fold_and_says_what_rounding_takes(
    dtype: torch.dtype, size: float, turned: bool, pieces: int
) -> None:
    weight, deltas = weight_of(dtype, turned=turned), (*adapter(size), *adapter(size, seed=7))
    folded, error = folding.measured_lora(weight, *deltas)
    assert torch.equal(folded, folding.fold_lora(weight, *deltas))
    assert float(error) == pytest.approx(lost_share(weight, exact_sum(weight, *deltas)), rel=1e-3)


def test_one_changed_row_among_many_is_measured(pieces: int) -> None:
    weight, (a, b, scale) = weight_of(torch.bfloat16), adapter(1e-3)
    b[:-1] = 0
    error = folding.measured_lora(weight, a, b, scale)[1]
    assert float(error) == pytest.approx(lost_share(weight, exact_sum(weight, a, b, scale)), 1e-3)
    assert error > 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_an_adapter_beyond_the_digits_of_float32_is_lost_whole(dtype: torch.dtype) -> None:
    weight = weight_of(dtype) + weight_of(dtype).sign()
    for size in (1e-9, 1e-12):
        assert float(folding.measured_lora(weight, *adapter(size))[1]) == pytest.approx(1, 1e-2)


def test_an_adapter_that_changes_nothing_has_no_error() -> None:
    weight, ones = weight_of(torch.bfloat16), torch.ones(1, 13)
    assert float(folding.measured_lora(weight, *adapter(0.0))[1]) == 0
    assert float(folding.measured_dora(weight, ones, *adapter(0.0))[1]) == 0
    folded, error = folding.measured_lora(weight[:0], *(adapter()[0], torch.ones(0, RANK), 1.0))
    assert folded.shape == (0, 20)
    assert float(error) == 0


def test_gradients_pass_through_a_fold() -> None:
    a, b, scale = adapter()
    a.requires_grad_()
    folding.fold_lora(weight_of(torch.float32), a, b, scale).sum().backward()
    assert a.grad is not None
    torch.testing.assert_close(a.grad, scale * b.sum(0)[:, None].expand_as(a))


def test_a_fold_of_fake_tensors_has_the_shape_and_dtype_of_the_weight() -> None:
    with FakeTensorMode():
        weight = torch.empty(13, 20, dtype=torch.bfloat16)
        folded = folding.fold_lora(weight, torch.empty(RANK, 20), torch.empty(13, RANK), 2.0)
    assert (folded.shape, folded.dtype) == (weight.shape, weight.dtype)


def test_a_fold_holds_its_result_and_the_pieces_that_it_states(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(folding, "_ON_CPU", 64)
    made: list[int] = []

    def counted(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        made.append((memory := folding.fresh(shape, dtype, device)).nbytes)
        return memory

    for weight in (weight_of(torch.bfloat16), weight_of(torch.bfloat16, turned=True)):
        made.clear()
        folding.measured_lora(weight, *adapter(), empty=counted)
        stated = folding.piece_bytes(weight.shape, weight.dtype, weight.device)
        assert made == [weight.nbytes, stated]
        assert stated < 12 * weight.numel()


@LAYOUTS
@DTYPES
def test_a_fold_in_memory_that_was_used_before_is_the_fold(
    dtype: torch.dtype, turned: bool, pieces: int
) -> None:
    def used(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return folding.fresh(shape, dtype, device).fill_(torch.nan)

    weight, deltas, rows = weight_of(dtype, turned=turned), adapter(), torch.rand(1, 13)
    wanted = folding.measured_lora(weight, *deltas), folding.measured_dora(weight, rows, *deltas)
    for whole, again in (
        (wanted[0], folding.measured_lora(weight, *deltas, empty=used)),
        (wanted[0][:1], folding.unmeasured_lora(weight, *deltas, empty=used)),
        (wanted[1], folding.measured_dora(weight, rows, *deltas, empty=used)),
        (wanted[1][:1], folding.unmeasured_dora(weight, rows, *deltas, empty=used)),
    ):
        assert all(torch.equal(*pair) for pair in zip(whole, again, strict=False))
