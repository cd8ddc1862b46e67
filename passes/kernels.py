"""The operators that passes put into a graph, each written with plain torch calls.

They are the meaning of a rewritten graph: eager execution runs them as they stand, a lowering
traces through them. Shapes: B batch, T tokens, E hidden size, F MLP size, R LoRA rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import packed_linear


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Root-mean-square norm over the last axis, computed in float32 (Zhang & Sennrich 2019).

    The result is rounded to x's dtype before the weight is applied, as the Llama family does.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = normed.to(x.dtype)
    return normed * (weight + offset) if offset else normed * weight


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
    gate, up = packed_linear(x, gate_up, gate_up_bias).chunk(2, -1)
    return packed_linear(activate(gate, kind).mul_(up), down, down_bias)


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
    gated = activate(packed_linear(x, gate, gate_bias), kind)
    return packed_linear(gated.mul_(packed_linear(x, up, up_bias)), down, down_bias)


def plain_mlp(
    x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, kind: str
) -> Tensor:
    """``down(act(up(x)))``: up [F, E], down [E, F]."""
    return packed_linear(activate(packed_linear(x, up, up_bias), kind), down, down_bias)


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


def fold_lora(weight: Tensor, *deltas: Any) -> Tensor:
    """``W + sum(scale * B @ A)`` in float32, rounded once to W's dtype (Hu et al. 2021).

    Weights in float64 are folded in float64.

    Args:
        weight: [out, in].
        deltas: A [R, in], B [out, R], scale, repeated once for each active adapter.
    """
    return _folded(weight, deltas).to(weight.dtype)


def _folded(weight: Tensor, deltas: tuple[Any, ...]) -> Tensor:
    total = wide(weight)
    for a, b, scale in zip(deltas[::3], deltas[1::3], deltas[2::3], strict=True):
        total = torch.addmm(total, b.to(total.dtype), a.to(total.dtype), alpha=scale)
    return total


def fold_dora(weight: Tensor, magnitude: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``m * (W + scale * B @ A)``, m one factor a row; float32, rounded once (Liu et al. 2024).

    Args:
        weight: [out, in]; magnitude: [1, out]; a: [R, in]; b: [out, R].
    """
    total = _folded(weight, (a, b, scale))
    return (total * magnitude.to(total.dtype).reshape(-1, 1)).to(weight.dtype)


#: Elements of which a measure makes copies at once: fresh memory costs more than the sums.
_AT_A_TIME = 2**20


def fold_error(weight: Tensor, folded: Tensor) -> Tensor:
    """How much of a fold rounding takes away: ``|rounded - exact| / |exact - W|``, a scalar.

    ``folded`` is the exact sum, of the dtype of :func:`exact`. This is the relative error of the
    adapter's output for inputs without a preferred direction. No change at all has error 0.
    """
    change, lost = (torch.zeros((), dtype=folded.dtype, device=folded.device) for _ in range(2))
    rows = max(1, _AT_A_TIME // max(1, weight[:1].numel()))
    for part, exact_part in zip(weight.split(rows), folded.split(rows), strict=True):
        rounding = exact_part.to(weight.dtype) - exact_part
        change = torch.hypot(change, torch.linalg.vector_norm(exact_part - part))
        lost = torch.hypot(lost, torch.linalg.vector_norm(rounding))
    return torch.where(change > 0, lost / change, torch.zeros_like(lost))


def wide(weight: Tensor) -> Tensor:
    """The weight in float32 (or float64, where it is), for sums that are not to be rounded."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def exact(weight: Tensor) -> Tensor:
    """The weight in a dtype in which what rounding takes of it can be seen.

    float64 for float32, float32 for half precision. A device without float64 stays in float32,
    where the error reads 0.
    """
    half = weight.dtype.itemsize < 4 or weight.device.type == "mps"
    return weight.to(torch.float32 if half else torch.float64)


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


def store(target: Store, index: int, value: Tensor) -> None:
    """Hand prepared tensor number ``index`` to ``target``."""
    target.store(index, value)
