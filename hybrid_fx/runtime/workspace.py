"""The KV workspace: memory for keys and values, reserved once and reused from call to call.

Each attention layer has one key and one value memory [R, K, P, D]: the heads of a row lie one
after the other, so that products over rows and heads read it in place. A position is known by its
slot, ``r * P + p``; the graphs find it in a table, so that rows can stand anywhere.
Legend: B batch, S positions in use, K key-value heads, D head size, R rows, P positions a row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..plan.records import KVLayer
from .moving import to_device

#: Keys and values of one layer, [B, K, T, D] each.
KeyValue = tuple[Tensor, Tensor]

#: Where steps are recorded a row has a multiple of so many positions: few recordings serve all
#: lengths, and a mask over them is aligned as kernels want it.
STRIDE = 256


class Workspace:
    """Memory for the keys and values of up to ``rows`` rows of ``pitch`` positions.

    The memory only grows; :meth:`release` gives it back.

    Args:
        layers: Of the plan.
        device: Where the model lives.
        recorded: Whether graphs read all positions of a row, used or not. Then what no session
            has written is zero, and ``pitch`` is rounded up.

    Attributes:
        generation: Counts how often the memory was made anew.
    """

    def __init__(
        self, layers: Sequence[KVLayer], device: torch.device, *, recorded: bool = False
    ) -> None:
        self._layers = tuple(layers)
        self._recorded = recorded
        self.generation = 0
        self._device = device
        self._slots = 0
        self._memory: list[tuple[Tensor, Tensor]] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.rows = 0
        self.pitch = 0

    @property
    def nbytes(self) -> int:
        """Bytes held, used or not."""
        return sum(t.untyped_storage().nbytes() for t in (*self.keys, *self.values))

    def reserve(self, rows: int, pitch: int) -> None:
        """Lay the memory out for ``rows`` rows of ``pitch`` positions; contents are lost."""
        pitch = self._rounded(pitch)
        if rows * pitch > self._slots:
            self.release()
            # Counted as ours only when all of it is there: an allocation may fail or be stopped.
            self._memory = [self._allocate(layer, rows * pitch) for layer in self._layers]
            self._slots = rows * pitch
            self.generation += 1
        elif self._recorded:
            for memory in itertools.chain(*self._memory):
                memory.zero_()  # what is masked still enters products, and weights may be NaN
        self._lay_out(rows, pitch)

    def _lay_out(self, rows: int, pitch: int) -> None:
        self.rows, self.pitch = rows, pitch
        self.keys, self.values = self.first(rows)

    def first(self, rows: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of the first rows, living or not, [rows, K, P, D] a layer.

        Of at most :attr:`most_rows`.
        """
        keys, values = [], []
        for layer, (key, value) in zip(self._layers, self._memory, strict=True):
            shape = (rows, layer.kv_heads, self.pitch)
            keys.append(_laid_out(key, *shape, layer.head_size))
            values.append(_laid_out(value, *shape, layer.value_head_size))
        return keys, values

    @property
    def most_rows(self) -> int:
        """How many rows of this pitch the memory has."""
        return self._slots // self.pitch

    def _rounded(self, pitch: int) -> int:
        return -(-pitch // STRIDE) * STRIDE if self._recorded else pitch

    def _allocate(self, layer: KVLayer, slots: int) -> tuple[Tensor, Tensor]:
        # Zeros: a slot that is masked out still enters products, and memory may hold NaN.
        dtype = getattr(torch, layer.dtype)
        return tuple(  # type: ignore[return-value]
            torch.zeros(slots * layer.kv_heads * size, dtype=dtype, device=self._device)
            for size in (layer.head_size, layer.value_head_size)
        )

    def relay(self, rows: Tensor, pitch: int, length: int) -> None:
        """Move contents: new row i takes the first ``length`` positions of old row ``rows[i]``.

        At an unchanged pitch only rows that change their place are copied, layer by layer.

        Args:
            rows: [B'] int64, the old row of each new one; a row may be taken more than once. Where
                they lie on the host, nobody waits for the device.
            pitch: Positions a row has from now on.
            length: Positions to keep.
        """
        pitch = self._rounded(pitch)
        if pitch == self.pitch and rows.shape[0] * pitch <= self._slots:
            self._move(rows, length)
            return
        rows = to_device(rows, self._device)
        kept = [
            (key[rows, :, :length], value[rows, :, :length])
            for key, value in zip(self.keys, self.values, strict=True)
        ]
        self.reserve(rows.shape[0], pitch)
        for (key, value), new_key, new_value in zip(kept, self.keys, self.values, strict=True):
            new_key[:, :, :length] = key
            new_value[:, :, :length] = value

    def _move(self, rows: Tensor, length: int) -> None:
        """:meth:`relay` within the memory and at the pitch there is."""
        count, pitch = rows.shape[0], self.pitch
        moved = (rows != torch.arange(count, device=rows.device)).nonzero().squeeze(1)
        places = to_device(torch.stack((moved, rows[moved])), self._device)
        self._lay_out(max(count, self.rows), pitch)
        for memory in (*self.keys, *self.values) if len(moved) else ():
            memory[places[0], :, :length] = memory[places[1], :, :length]
        self._lay_out(count, pitch)

    def clear(self, rows: slice, end: int) -> None:
        """Zero the first ``end`` positions of some rows: what is masked still enters products."""
        for memory in (*self.keys, *self.values):
            memory[rows, :, :end] = 0

    def forget(self, start: int, end: int) -> None:
        """These positions of all rows are as if they had not been written."""
        if self._recorded:
            for memory in itertools.chain(*self.first(self.most_rows)):
                memory[:, :, start:end] = 0

    def check(self, pairs: Sequence[KeyValue], batch: int) -> None:
        """Raise a ValueError where ``pairs`` are not keys and values of these layers."""
        wanted = [
            (str(t.dtype), batch, t.shape[1], t.shape[3])
            for t in itertools.chain(*zip(self.keys, self.values, strict=True))
        ]
        given = [(str(t.dtype), *t.shape[:2], t.shape[3]) for pair in pairs for t in pair]
        if given != wanted:
            odd = [f"{g} for {w}" for g, w in zip(given, wanted, strict=False) if g != w]
            counts = f"{len(given) // 2} layers for {len(wanted) // 2}"
            raise ValueError(f"(dtype, rows, heads, size) {odd[0]}" if odd else counts)

    def write(self, layer: int, pair: KeyValue, end: int) -> None:
        """Put keys and values [B, K, T, D] into the columns that end before ``end``."""
        for memory, new in zip((self.keys[layer], self.values[layer]), pair, strict=True):
            batch, _, tokens, _ = new.shape
            memory[:batch, :, end - tokens : end] = new

    def read(self, batch: int, start: int, end: int) -> list[KeyValue]:
        """Copies of the columns ``start`` to ``end``, one pair [B, K, T, D] a layer."""
        return [
            (key[:batch, :, start:end].clone(), value[:batch, :, start:end].clone())
            for key, value in zip(self.keys, self.values, strict=True)
        ]

    def release(self) -> None:
        """Give the memory back, also where the frames of a caught error still hold the lists."""
        for held in (self._memory, self.keys, self.values):
            held.clear()
        self._slots = self.rows = self.pitch = 0


def _laid_out(memory: Tensor, *shape: int) -> Tensor:
    """The beginning of a memory in a shape."""
    return memory[: math.prod(shape)].view(shape)
