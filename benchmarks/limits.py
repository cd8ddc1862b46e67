"""What the machine allows: how fast it reads, multiplies, and runs the linear layers alone.

A decode step reads every weight once and the keys and values so far. On a CPU the linear layers
are those of oneDNN on weights in its own layout, in float32 where the processor has no instructions
for bfloat16; elsewhere they are torch's own.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from measure import Seconds, Timer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hybrid_fx.passes.packing import PLAIN, FewRows, lend, pack, packed_linear, usual_forms

Linear = Callable[[Tensor], Tensor]
_READ = 128 * 2**20  # float32 numbers: 512 MB


def read_seconds(device: str, timer: Timer) -> Seconds:
    """Seconds to read a byte, from one sum over 512 MB of float32."""
    data = torch.ones(_READ, device=device)
    return lambda: timer(data.sum) / data.nbytes


def matrix_rate(device: str, dtype: torch.dtype, timer: Timer) -> float:
    """GFLOP/s of a product of two square matrices: the median of five."""
    size, largest = 256, 2048 if device == "cpu" else 8192
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        a @ b
        # Without instructions for bfloat16, a large one takes a CPU half a minute.
        if size == largest or timer(lambda: a @ b) > 0.05:  # noqa: B023
            break
        size *= 2
    seconds = statistics.median(timer(lambda: a @ b) for _ in range(5))
    return 2 * size**3 / seconds / 1e9


def linear_layers(model: nn.Module) -> list[tuple[Tensor, Tensor | None]]:
    """Weight [out, in] and bias of every linear layer in order, the head's included."""
    found: list[tuple[Tensor, Tensor | None]] = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            found.append((module.weight.detach(), module.bias))
        elif isinstance(module, Conv1D):
            found.append((module.weight.detach().t(), module.bias))
    return found


def _packed(weight: Tensor, bias: Tensor | None) -> Linear:
    form = usual_forms(weight.device)[weight.dtype]
    packed = pack(weight.contiguous().to(form.dtype))
    if form.plain_rows:
        lend(packed, FewRows(form.plain_rows, (weight,)))
    return lambda x: packed_linear(x, packed, bias)


def _plain(weight: Tensor, bias: Tensor | None) -> Linear:
    return lambda x: F.linear(x, weight, bias)


class LinearAlone:
    """The linear layers of ``model``, each on an input of its own size, one after the other.

    Attributes:
        packed: What they run on is packed in, which is a second copy; ``None``: on the weights.
    """

    def __init__(self, model: nn.Module, timer: Timer) -> None:
        layers = linear_layers(model)
        first = layers[0][0]
        self.packed = usual_forms(first.device).get(first.dtype, PLAIN).dtype
        self._timer, self._device, self._dtype = timer, first.device, first.dtype
        make = _packed if self.packed else _plain
        with torch.no_grad():
            self._layers = [(weight.shape[1], make(weight, bias)) for weight, bias in layers]

    def seconds(self, rows: int) -> Seconds:
        """Seconds of all of them at ``rows`` rows."""
        inputs = {
            size: torch.randn(rows, size, device=self._device).to(self._dtype)
            for size in {size for size, _ in self._layers}
        }

        @torch.no_grad()
        def step() -> None:
            for size, linear in self._layers:
                linear(inputs[size])

        return lambda: self._timer(step)


def interpolated(known: Sequence[tuple[int, float]], rows: int) -> float:
    """Seconds at ``rows`` rows, on the line between the nearest two of ``known`` (rows, seconds).

    Beyond the ends, seconds stay those of the first, and grow with the rows from the last.
    """
    if rows <= known[0][0]:
        return known[0][1]
    for (low, a), (high, b) in itertools.pairwise(known):
        if rows <= high:
            return a + (b - a) * (rows - low) / (high - low)
    return known[-1][1] * rows / known[-1][0]


def _heads(config: Any) -> tuple[int, int]:
    """Bytes-deciding sizes: heads of keys and values, and numbers in each."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return getattr(config, "num_key_value_heads", None) or heads, size


def step_bytes(model: nn.Module, *, batch: int, positions: float) -> float:
    """Bytes a decode step has to touch: every weight but the embedding's other rows, and the KV."""
    config: Any = model.config
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    looked_up = {id(table) for table in tables} - linear
    weights = sum(p.nbytes for p in model.parameters() if id(p) not in looked_up)
    weights += sum(batch * table.shape[1] * table.element_size() for table in tables)
    kv_heads, size = _heads(config)
    element = next(iter(model.parameters())).element_size()
    kv = 2 * batch * positions * kv_heads * size * config.num_hidden_layers * element
    return weights + kv


def step_flops(model: nn.Module, *, batch: int, positions: float) -> float:
    """Floating point operations of a decode step: linear layers and attention."""
    config: Any = model.config
    linear = sum(weight.numel() for weight, _ in linear_layers(model))
    heads = config.num_attention_heads * _heads(config)[1]
    return 2 * batch * linear + 4 * batch * positions * heads * config.num_hidden_layers
