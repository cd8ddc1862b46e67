"""Operators that merge adapters into weights, and say what rounding takes of them.

A weight is folded in pieces, each of which stays in the cache from its first sum to its last, in
memory that the next one uses again: fresh pages cost more than the sums. Who folds many weights
hands in where that memory, and the results, come from. Per piece of W, with the adapter's change
D, in float32 (float64 where W is):

    D = sum(scale * B @ A),   folded = round(W + D),   lost = (folded - W) - D

``folded - W`` lies on the grid of W itself. So what rounding takes can be seen at any size of D,
also where W + D has lost all of it already, and no wider dtype is needed. DoRA multiplies row i of
W + D by m_i: it changes W by ``m * D + (m - 1) * W``.

Shapes: W [out, in], A [R, in], B [out, R], m [1, out]; R LoRA rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

#: Elements of a weight that are folded at once. On a CPU a few copies of them are to stay in the
#: cache: with 2 threads of an AMD EPYC, 2**16 took 1.6 times as long. Elsewhere a piece is a dozen
#: launches, and the size bounds the memory.
_ON_CPU, _ELSEWHERE = 2**19, 2**24

#: How many copies of a piece there are.
_COPIES = 3


class Empty(Protocol):
    """Where memory comes from: a contiguous tensor of that kind, its contents undefined."""

    def __call__(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor: ...


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that nobody had before."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def fold_lora(weight: Tensor, *deltas: Any) -> Tensor:
    """``W + sum(scale * B @ A)`` in float32, rounded once to W's dtype (Hu et al. 2021).

    Weights in float64 are folded in float64.

    Args:
        weight: [out, in].
        deltas: A [R, in], B [out, R], scale, repeated once for each active adapter.
    """
    return _fold(weight, deltas)[0]


def fold_dora(weight: Tensor, magnitude: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``m * (W + scale * B @ A)``, m one factor a row; float32, rounded once (Liu et al. 2024).

    Args:
        weight: [out, in]; magnitude: [1, out]; a: [R, in]; b: [out, R].
    """
    return _fold(weight, (a, b, scale), magnitude)[0]


def measured_lora(weight: Tensor, *deltas: Any, empty: Empty = fresh) -> tuple[Tensor, Tensor]:
    """What :func:`fold_lora` gives, and how much of it rounding takes: ``|lost| / |D|``, a scalar.

    This is the relative error of the adapter's output for inputs without a preferred direction.
    No change at all has error 0.
    """
    return _fold(weight, deltas, measured=True, empty=empty)


def measured_dora(
    weight: Tensor,
    magnitude: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    *,
    empty: Empty = fresh,
) -> tuple[Tensor, Tensor]:
    """What :func:`fold_dora` gives, and its error as in :func:`measured_lora`."""
    return _fold(weight, (a, b, scale), magnitude, measured=True, empty=empty)


def unmeasured_lora(weight: Tensor, *deltas: Any, empty: Empty = fresh) -> tuple[Tensor, Tensor]:
    """In place of :func:`measured_lora` where nobody asks for the error: it is 0."""
    return _fold(weight, deltas, empty=empty)


def unmeasured_dora(
    weight: Tensor,
    magnitude: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    *,
    empty: Empty = fresh,
) -> tuple[Tensor, Tensor]:
    """In place of :func:`measured_dora` where nobody asks for the error: it is 0."""
    return _fold(weight, (a, b, scale), magnitude, empty=empty)


def piece_bytes(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> int:
    """An upper bound of the memory that a fold of such a weight takes beside its result."""
    return _COPIES * _held(shape, device) * _wide(dtype).itemsize


def _held(shape: Sequence[int], device: torch.device) -> int:
    """Elements of a piece at most; of all larger weights it is the same, but for huge rows."""
    return min(math.prod(shape), max(_at_once(device), *shape))


def _at_once(device: torch.device) -> int:
    return _ON_CPU if device.type == "cpu" else _ELSEWHERE


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where the weight is: for sums that are not to be rounded."""
    return torch.promote_types(dtype, torch.float32)


def _fold(
    weight: Tensor,
    deltas: tuple[Any, ...],
    magnitude: Tensor | None = None,
    *,
    measured: bool = False,
    empty: Empty = fresh,
) -> tuple[Tensor, Tensor]:
    dtype = _wide(weight.dtype)
    pairs = [
        (b.to(dtype), a.to(dtype), scale)
        for a, b, scale in zip(deltas[::3], deltas[1::3], deltas[2::3], strict=True)
    ]
    factor = None
    if magnitude is not None:
        factor = magnitude.to(dtype).reshape(-1, 1).expand_as(weight)
    tensors = [weight, *(tensor for pair in pairs for tensor in pair[:2])]
    if not measured and _followed(*tensors):
        total = sum((b @ a * scale for b, a, scale in pairs), start=weight.to(dtype))
        return (total if factor is None else total * factor).to(weight.dtype), total.new_zeros(())
    if weight.stride(0) >= weight.stride(1):
        return _in_pieces(weight, pairs, factor, measured, empty)
    # Rows that lie across memory: fold the transpose, along which pieces are whole again.
    pairs = [(a.t(), b.t(), scale) for b, a, scale in pairs]
    factor = None if factor is None else factor.t()
    folded, error = _in_pieces(weight.t(), pairs, factor, measured, empty)
    return folded.t(), error


def _followed(*tensors: Tensor) -> bool:
    """Whether somebody records what is computed, and must see sums in place of memory."""
    if any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors):
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _in_pieces(
    weight: Tensor,
    pairs: Sequence[tuple[Tensor, Tensor, float]],
    factor: Tensor | None,
    measured: bool,
    empty: Empty,
) -> tuple[Tensor, Tensor]:
    """The sum of ``weight`` [N, M] and the products of each pair [N, R] @ [R, M], times ``factor``.

    The result lies in memory as the weight does. Its error is 0 where not ``measured``.
    """
    folded = empty(weight.shape, weight.dtype, weight.device)
    columns = weight.shape[1]
    rows = min(weight.shape[0], max(1, _at_once(weight.device) // max(1, columns)))
    dtype = _wide(weight.dtype)
    memory = empty((_COPIES, _held(weight.shape, weight.device)), dtype, weight.device)
    memory = memory[:, : rows * columns].view(_COPIES, rows, columns)
    changed, lost = [weight.new_zeros(1, dtype=dtype)], [weight.new_zeros(1, dtype=dtype)]
    for begin in range(0, weight.shape[0], max(1, rows)):
        here = slice(begin, begin + rows)
        part, result = weight[here], folded[here]
        change, base, total = memory[:, : part.shape[0]]
        for number, (left, right, scale) in enumerate(pairs):
            # the first of them overwrites what was there
            change.addmm_(left[here], right, beta=min(number, 1), alpha=scale)
        base = part if part.dtype == dtype else base.copy_(part)
        torch.add(base, change, out=total)
        if factor is not None:
            total.mul_(factor[here])
        result.copy_(total)
        if measured:
            if factor is not None:
                change.mul_(factor[here]).addcmul_(base, factor[here] - 1)
            total.copy_(result).sub_(base).sub_(change)
            # Row by row: each thread reads what it wrote, where one number is of one thread's.
            changed.append(torch.linalg.vector_norm(change, dim=1))
            lost.append(torch.linalg.vector_norm(total, dim=1))
    change, total = (torch.linalg.vector_norm(torch.cat(norms)) for norms in (changed, lost))
    return folded, torch.where(change > 0, total / change, torch.zeros_like(total))
