"""Weights in the layout that the kernel of a device wants, and the linear layer that reads them.

On a CPU, oneDNN's products run on reordered weights: with 2 threads of an AMD EPYC and torch 2.13,
all linear layers of a model of 494 M parameters, for 1 to 32 rows, took 1.3 to 1.4 times as long on
plain ones in bfloat16, and 1.9 to 3.9 times in float32. One layout serves any number of rows.
Elsewhere a weight stays as it is, so that a graph is the same on every device.

A packed weight is opaque: it has a shape and a dtype, but no storage. Shapes: B batch, T tokens,
E inputs, F outputs.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: What oneDNN reorders, where its layout was measured to pay.
_DTYPES = (torch.bfloat16, torch.float32)

#: The largest block of a layout, along either side.
_BLOCK = 64

#: Rows that a layout is made for. Those of 8 to 64 perform alike; that of 1 is bad for more.
_ROWS = 16


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights have another layout there."""
    if device.type != "cpu" or dtype not in _DTYPES or not torch.backends.mkldnn.is_available():
        return False
    # oneDNN refuses bfloat16 on processors without the vector instructions for it.
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(weight: Tensor) -> Tensor:
    """A weight [F, E] in the layout of its device: memory of its own, or the weight as it is."""
    plain = type(weight) in (Tensor, torch.nn.Parameter) and weight.layout is torch.strided
    if not (plain and weight.numel() and packs(weight.device, weight.dtype)):
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
    return packed


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear(x, weight, bias)`` of x [B, T, E] and a weight [F, E] that :func:`pack` gave."""
    if not weight.is_mkldnn:
        return torch._C._nn.linear(x, weight, bias)
    if not x.numel():
        return x.new_empty(*x.shape[:-1], weight.shape[0])
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def most_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """The most that a packed weight of this shape takes: oneDNN fills its blocks up."""
    return math.prod(-(-size // _BLOCK) * _BLOCK for size in shape) * dtype.itemsize


def packed_bytes(weight: Tensor) -> int:
    """Bytes of a packed weight."""
    return int(torch.ops.mkldnn._nbytes(weight))


def refill(kept: Tensor, new: Tensor) -> bool:
    """Copy a packed weight into the memory of another; False where the layouts differ."""
    ops = torch.ops.mkldnn
    layout = ops._get_mkldnn_serialized_md  # shape and dtype are part of it
    if not (kept.is_mkldnn and torch.equal(layout(kept), layout(new))):
        return False
    ctypes.memmove(ops.data_ptr(kept), ops.data_ptr(new), packed_bytes(new))
    return True
