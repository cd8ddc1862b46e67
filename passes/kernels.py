"""The operators that passes put into a graph, each written with plain torch calls.

They are the meaning of a rewritten graph: eager execution runs them as they stand, a lowering
traces through them. Shapes: B batch, T tokens, E hidden size, F MLP size, R LoRA rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import packed_linear
from .row_buckets import by_rows


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Root-mean-square norm over the last axis, computed in float32 (Zhang & Sennrich 2019).

    The result is rounded to x's dtype before the weight is applied, as the Llama family does.
    """
    if x.device.type == "cpu" and x.dtype != torch.float64:
        # The very same operators, in one call; other devices have a kernel that sums differently.
        normed = F.rms_norm(x, x.shape[-1:], None, eps)
    else:
        normed = _normed(x, eps)
    return normed * (weight + offset) if offset else normed * weight


def _normed(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(x + residual, rms_norm(x + residual))``."""
    total = x + residual
    return total, rms_norm(total, weight, eps)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``(x + residual, layer_norm(x + residual))``."""
    total = x + residual
    return total, F.layer_norm(total, shape, weight, bias, eps)


_ACTIVATIONS: dict[str, Any] = {
    "silu": lambda x: F.silu(x, inplace=True),
    "relu": lambda x: F.relu(x, inplace=True),
    "gelu": lambda x: F.gelu(x),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def activate(x: Tensor, kind: str) -> Tensor:
    """One of silu, relu, gelu, gelu_tanh, applied to a tensor the caller gives up."""
    return _ACTIVATIONS[kind](x)


def gated_mlp(
    x: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    kind: str,
) -> Tensor:
    """``down(act(gate(x)) * up(x))`` with gate and up as one [2F, E] weight."""

    def product(x: Tensor) -> Tensor:
        gate, up = packed_linear(x, gate_up, gate_up_bias).chunk(2, -1)
        return packed_linear(activate(gate, kind).mul_(up), down, down_bias)

    return _of_rows(product, x, gate_up)


def split_gated_mlp(
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    kind: str,
) -> Tensor:
    """``down(act(gate(x)) * up(x))`` with gate and up as weights of their own, [F, E] each."""

    def product(x: Tensor) -> Tensor:
        gated = activate(packed_linear(x, gate, gate_bias), kind)
        return packed_linear(gated.mul_(packed_linear(x, up, up_bias)), down, down_bias)

    return _of_rows(product, x, gate)


def plain_mlp(
    x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, kind: str
) -> Tensor:
    """``down(act(up(x)))``: up [F, E], down [E, F]."""

    def product(x: Tensor) -> Tensor:
        return packed_linear(activate(packed_linear(x, up, up_bias), kind), down, down_bias)

    return _of_rows(product, x, up)


def _of_rows(product: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
    """``product(x)``; where its weights are packed, rows are counted once, not at each of them."""
    return by_rows(product, x) if weight.is_mkldnn and x.numel() else product(x)


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of x times the matrix of their group, as the experts of a mixture want it.

    Args:
        x: [S, E], rows of one group one behind the other.
        weight: [G, E, F].
        ends: int32 [G], where each group ends; what is behind the last of them is undefined.

    Returns:
        [S, F].
    """
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) >= (8, 0):
        return F.grouped_mm(x, weight, offs=ends)
    out, begin = x.new_zeros(x.shape[0], weight.shape[2]), 0
    for matrix, end in zip(weight, ends.tolist(), strict=True):
        out[begin:end] = x[begin:end] @ matrix
        begin = end
    return out


def gather(weight: Tensor) -> Tensor:
    """Make a sharded parameter whole. On one process it is whole already."""
    return weight


def issue_gather(shards: Sequence[Tensor]) -> Any:
    """Begin to make the weights of one layer whole. On one process they are whole already."""
    return shards


def wait_gather(pending: Any) -> Sequence[Tensor]:
    """The whole weights of the layer whose gather was issued, in the same order."""
    weights: Sequence[Tensor] = pending
    return weights


def concat_rows(*weights: Tensor) -> Tensor:
    """Stack weights [n_i, E] or biases [n_i] along their first axis."""
    return torch.cat(weights, 0)


def given(embeds: Tensor | None, computed: Tensor) -> Tensor:
    """Embeddings [B, T, E] from the caller where there are any, else what the ids gave."""
    return computed if embeds is None else embeds


def last_tokens(x: Tensor, keep: int) -> Tensor:
    """The last ``keep`` tokens of x [B, T, E]: [B, keep, E]."""
    # Contiguous: over a strided input, the head's product copies its weight once a row.
    return x[:, x.shape[1] - keep :].contiguous()


def select_tokens(x: Tensor, keep: int | Tensor) -> Tensor:
    """The last ``keep`` tokens of x [B, T, E], all for 0; or those at the positions ``keep`` [N].

    The very slice that a model takes before its vocabulary projection, so that its backward is
    the same too.
    """
    return x[:, slice(-keep, None) if isinstance(keep, int) else keep, :]


def track_gradient(x: Tensor) -> Tensor:
    """Let gradients reach x, though it depends on nothing that is trained; returns x."""
    return x.requires_grad_()


class Store(Protocol):
    """Where the prepare graph leaves its results."""

    def store(self, index: int, value: Tensor) -> None: ...


class PackedStore(Store, Protocol):
    """One that lays weights out for the kernel of their device."""

    def store_packed(self, index: int, *weights: Tensor) -> None: ...


def store(target: Store, index: int, value: Tensor) -> None:
    """Hand prepared tensor number ``index`` to ``target``."""
    target.store(index, value)


def store_packed(target: PackedStore, index: int, *weights: Tensor) -> None:
    """Hand prepared tensor number ``index`` to ``target`` as the weights [n_i, E] it is packed of.

    It is ``pack(concat_rows(*weights))``, or ``pack(weight)`` of a single one.
    """
    target.store_packed(index, *weights)
