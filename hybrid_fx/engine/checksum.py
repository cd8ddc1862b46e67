"""A fast checksum of tensors, for writes that no version counter shows.

Method. The memory of a tensor is read as 8-byte words and cut into rows of 1021 words. Each row is
multiplied with one fixed vector of odd 64-bit weights and summed modulo 2**64; each row's sum is
mixed (``s ^ (s >>> 32)``), multiplied with a weight of the row's position and summed again. Words
that fill no row are treated one by one like row sums, and bytes that fill no word are padded with
zeros. So every word has a weight of its own: a single changed word is always noticed, and so is a
permutation, whose effect would have to cancel modulo 2**64. The width 1021 is prime, so that rows
of the checksum and rows of a matrix do not line up.

Blind spots. Changes whose weighted sums cancel (2**-64 for unrelated changes). Within one row,
an even number of edits that touch nothing but the topmost bit of a word: for float32 that is the
sign of elements at odd indices, for float64 any sign. Negating a whole tensor is noticed. Memory
that is not strided (sparse, packed by oneDNN) or absent (meta) reads as 0.

Cost on the CPU: one pass by one thread, about 60 ms per GB; temporaries of a thousandth of the
largest tensor. The same numbers come out on every device.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_ROW = 1021
_CHUNK = 1 << 14  # rows (8 KB) whose products stand in memory at once, off the CPU
_STEP = 0x1E3779B97F4A7C15  # odd; consecutive multiples spread over all 64 bits
_LOW_32 = 0xFFFFFFFF


def _weights(count: int, device: torch.device) -> Tensor:
    """``count`` odd int64 weights, a function of the position alone. [count]"""
    spread = torch.arange(1, count + 1, dtype=torch.int64, device=device) * _STEP
    return (spread ^ ((spread >> 29) & _LOW_32)) | 1


def _mix(sums: Tensor) -> Tensor:
    # Brings the high bits down before the next product, which would otherwise push them out.
    return sums ^ ((sums >> 32) & _LOW_32)


def _row_sums(rows: Tensor, weights: Tensor) -> Tensor:
    """[rows, _ROW] int64 times [_ROW] int64 modulo 2**64 -> [rows] int64."""
    if rows.device.type == "cpu":
        return torch.mv(rows, weights)
    return _weighted_rows(rows, weights)


def _weighted_rows(rows: Tensor, weights: Tensor) -> Tensor:
    # The same where no integer mv exists.
    parts = torch.split(rows, _CHUNK)
    return torch.cat([(part * weights).sum(1) for part in parts])


def _words(tensor: Tensor) -> Tensor:
    """The memory of ``tensor`` in logical order as int64 words. [bytes / 8 rounded up]"""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    flat = tensor.resolve_neg().contiguous().reshape(-1)
    size = flat.element_size()
    whole = flat.numel() * size // 8 * 8 // size
    aligned = flat.storage_offset() * size % 8 == 0
    body = flat[:whole] if aligned else flat[:whole].clone()
    words = body.view(torch.int64) if whole else flat.new_empty(0, dtype=torch.int64)
    if whole == flat.numel():
        return words
    rest = flat.new_zeros(8 // size)
    rest[: flat.numel() - whole] = flat[whole:]
    return torch.cat([words, rest.view(torch.int64)])


def _checksum(tensor: Tensor) -> Tensor:
    if tensor.layout is not torch.strided or tensor.device.type == "meta" or not tensor.numel():
        return torch.zeros((), dtype=torch.int64, device="cpu")
    words = _words(tensor)
    full = words.numel() // _ROW * _ROW
    parts = [words[full:]]
    if full:
        parts.append(_row_sums(words[:full].view(-1, _ROW), _weights(_ROW, words.device)))
    sums = _mix(torch.cat(parts))
    return (sums * _weights(sums.numel(), words.device)).sum()


def checksums(tensors: Iterable[Tensor]) -> list[int]:
    """Return one checksum for each tensor, of any dtype, shape and device, each read once.

    Plain tensors only; a tensor subclass is given as the tensors it is made of.
    """
    with torch.no_grad():
        sums = [_checksum(tensor.detach()) for tensor in tensors]
        by_device: dict[torch.device, list[int]] = {}
        for index, value in enumerate(sums):
            by_device.setdefault(value.device, []).append(index)
        result = [0] * len(sums)
        for indices in by_device.values():  # one synchronisation for each device
            values = torch.stack([sums[index] for index in indices]).tolist()
            for index, value in zip(indices, values, strict=True):
                result[index] = value
    return result
