"""Weights in the layout that the kernel of a device wants, and the linear layer that reads them.

On a CPU, oneDNN's products run on reordered weights: with 2 threads of an AMD EPYC and torch 2.13,
all linear layers of a model of 494 M parameters, for 1 to 32 rows, took 1.3 to 1.4 times as long on
plain ones in bfloat16, and 1.9 to 3.9 times in float32. One layout serves any number of rows.
Elsewhere a weight stays as it is, so that a graph is the same on every device.

oneDNN packs bfloat16 only for processors with vector instructions for it, and without them torch
multiplies with plain weights of it row by row. So what is packed may be a copy in float32, twice as
large: a product then casts its input, its bias and its result. A :class:`PackForm` says which of
these it is, and a product sees it by the weight that it is given.

A packed weight is opaque: it has a shape and a dtype, but no storage. oneDNN makes a new one each
time. So memory that is there already is refilled in pieces, small enough to come from the cache
and not from fresh pages: blocks of rows lie one behind the other in both. Shapes: B batch,
T tokens, E inputs, F outputs.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .row_buckets import by_rows

#: What oneDNN reorders, where its layout was measured to pay.
_DTYPES = (torch.bfloat16, torch.float32)

#: The blocks of rows in a layout; the largest is that along the other side too.
_BLOCKS = (16, 32, 64)
_BLOCK = 64

#: Rows that a layout is made for. Those of 8 to 64 perform alike; that of 1 is bad for more.
_ROWS = 16

#: Elements that are packed at once into memory that is there. With 2 threads of an AMD EPYC and
#: 32 MB of cache, 2**19 took 1.5 times as long, 2**23 2.5 times: more calls, or out of the cache.
_AT_ONCE = 2**21


@dataclass(frozen=True, slots=True)
class PackForm:
    """What products with the weights of one dtype read.

    Attributes:
        dtype: Of a packed copy; ``None``: the weight as it is.
        plain_rows: Products of at most so many rows read the weight as it is all the same, where
            that is held anyway.
    """

    dtype: torch.dtype | None
    plain_rows: int = 0


#: Of each dtype of weights on one device; one that is not named stays as it is.
Forms: TypeAlias = Mapping[torch.dtype, PackForm]

PLAIN = PackForm(None)


@dataclass(frozen=True, slots=True)
class FewRows:
    """What a packed weight is of, for products of few rows; see :func:`lend`.

    Attributes:
        rows: The most of them.
        parts: The weights [n_i, E] that it stacks.
    """

    rows: int
    parts: tuple[Tensor, ...]


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights have another layout there."""
    if device.type != "cpu" or dtype not in _DTYPES or not torch.backends.mkldnn.is_available():
        return False
    # oneDNN refuses bfloat16 on processors without the vector instructions for it.
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def usual_forms(device: torch.device) -> Forms:
    """The forms that were best on the processors tried, of each dtype that can be packed there.

    That is a packed copy of the same dtype. Where bfloat16 has none it is one in float32, and one
    row reads the weight itself: that takes half as long, as it is half as large.
    """
    if not packs(device, torch.float32):
        return {}
    own = packs(device, torch.bfloat16)
    bfloat16 = PackForm(torch.bfloat16) if own else PackForm(torch.float32, plain_rows=1)
    return {torch.float32: PackForm(torch.float32), torch.bfloat16: bfloat16}


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is nothing but numbers in memory, at least one."""
    plain = type(weight) in (Tensor, torch.nn.Parameter) and weight.layout is torch.strided
    return plain and weight.numel() > 0


def pack(weight: Tensor) -> Tensor:
    """A weight [F, E] in the layout of its device: memory of its own, or the weight as it is."""
    if not (is_plain(weight) and packs(weight.device, weight.dtype)):
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
    return packed


def lend(packed: Tensor, few: FewRows | None) -> None:
    """Let products of few rows with a packed weight read what it is of; ``None``: none of them.

    What is lent is read, and kept alive, until something else is lent.
    """
    packed._few = few  # type: ignore[attr-defined]


def lent(packed: Tensor) -> FewRows | None:
    """What was lent to a packed weight."""
    few: FewRows | None = getattr(packed, "_few", None)
    return few


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear(x, weight, bias)`` of x [B, T, E] and a weight [F, E] that :func:`pack` gave.

    The result has the dtype of x. A packed weight of another dtype is multiplied with in its own.
    """
    if not weight.is_mkldnn:
        return torch._C._nn.linear(x, weight, bias)
    if not x.numel():
        return x.new_empty(*x.shape[:-1], weight.shape[0])
    few = lent(weight)
    if few is not None and x.numel() <= few.rows * x.shape[-1]:
        return _linear_by_parts(x, few.parts, bias)
    return by_rows(lambda rows: _product(rows, weight, bias), x)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype, inside = x.dtype, weight.dtype
    if inside != dtype:
        x, bias = x.to(inside), None if bias is None else bias.to(inside)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out.to(dtype)


def _linear_by_parts(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """``linear`` with the stack of ``parts``, which is not there as one tensor."""
    if len(parts) == 1:
        return torch._C._nn.linear(x, parts[0], bias)
    sizes = [part.shape[0] for part in parts]
    biases = [None] * len(parts) if bias is None else bias.split(sizes)
    products = map(torch._C._nn.linear, [x] * len(parts), parts, biases)
    return torch.cat(tuple(products), -1)


def most_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """The most that a weight of this shape takes, packed in ``dtype``: blocks are filled up."""
    return math.prod(-(-size // _BLOCK) * _BLOCK for size in shape) * dtype.itemsize


def packed_bytes(weight: Tensor) -> int:
    """Bytes of a packed weight."""
    return int(torch.ops.mkldnn._nbytes(weight))


def piece_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """An upper bound of what :func:`refill` takes for weights that stack to this shape.

    Each piece is packed apart, in ``dtype``, and copied before where its rows are no rows of memory
    or of another dtype.
    """
    held = min(most_bytes(shape, dtype) // dtype.itemsize, max(_AT_ONCE, _BLOCK * shape[-1]))
    return 2 * held * dtype.itemsize


def refill(kept: Tensor, *weights: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Lay weights [n_i, E], stacked, out in the memory of a packed one [sum of n_i, E].

    Args:
        dtype: What they are packed in; ``None`` is their own. They are cast piece by piece.

    Returns:
        Whether they fit there. Where not, what was kept may be lost.
    """
    first, rows = weights[0], sum(weight.shape[0] for weight in weights)
    wanted = (rows, *first.shape[1:]), dtype or first.dtype
    fits = kept.is_mkldnn and (tuple(kept.shape), kept.dtype) == wanted
    fits = fits and all(weight.layout is torch.strided for weight in weights)
    if not fits:
        return False
    if _refilled(kept, weights, _at_once(first)):
        return True
    # A layout whose blocks of rows do not lie one behind the other is filled in one piece, if that
    # takes no copy: a stack, or a cast, is not tried again.
    return len(weights) == 1 and kept.dtype == first.dtype and _refilled(kept, weights, rows)


def _at_once(weight: Tensor) -> int:
    """Rows that are packed at once."""
    return max(_BLOCK, _AT_ONCE // weight.shape[1] // _BLOCK * _BLOCK)


def _refilled(kept: Tensor, weights: Sequence[Tensor], size: int) -> bool:
    ops = torch.ops.mkldnn
    at, rows = ops.data_ptr(kept), 0
    end = at + packed_bytes(kept)
    for piece in _pieces(weights, size, kept.dtype):
        new = pack(piece)
        if not new.is_mkldnn or (piece.shape[0] != rows and not _lies_in(new, kept)):
            return False
        rows, length = piece.shape[0], packed_bytes(new)
        if at + length > end:
            return False
        ctypes.memmove(at, ops.data_ptr(new), length)
        at += length
        del piece, new  # not held beside the next one
    return bool(at == end)


def _pieces(weights: Sequence[Tensor], size: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The rows of a stack, at most ``size`` at once; a piece begins where a block does.

    Rows are copied only where a piece has those of several weights, or is cast.
    """
    group: list[Tensor] = []
    count = 0
    for weight in weights:
        while weight.shape[0]:
            room = size - count
            group.append(weight[:room])
            count += group[-1].shape[0]
            weight = weight[room:]
            if count % _BLOCK == 0:
                yield _stacked(group, dtype)
                group, count = [], 0
    if group:
        yield _stacked(group, dtype)


def _stacked(group: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return (group[0] if len(group) == 1 else torch.cat(tuple(group), 0)).to(dtype)


def _lies_in(piece: Tensor, whole: Tensor) -> bool:
    """Whether a packed weight lies in memory as some of the rows of another do.

    It does where oneDNN's descriptions of both differ in the number of rows alone, which they name
    twice: as it is and filled up to whole blocks. No distance depends on it then.
    """
    described = torch.ops.mkldnn._get_mkldnn_serialized_md  # shape and dtype are part of it
    words = (described(tensor).view(torch.int32).tolist() for tensor in (piece, whole))
    other = [pair for pair in zip(*words, strict=True) if pair[0] != pair[1]]
    rows = piece.shape[0], whole.shape[0]
    filled = [tuple(-(-count // block) * block for count in rows) for block in _BLOCKS]
    return len(other) <= 2 and any(set(other) <= {rows, one} for one in filled)
