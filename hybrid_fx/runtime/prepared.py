"""Prepared tensors: what the prepare graph made of the weights, of exactly one weight version."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan.plan import Prepared


class PreparedTensors:
    """The list that prefill and decode take; its memory is refilled from version to version.

    A tensor with memory of its own is copied into what the last version left, so that memory is
    not returned and faulted in again; a weight or a view of one is taken as it is.
    """

    def __init__(self, wanted: tuple[Prepared, ...]) -> None:
        self._wanted = wanted
        self.tensors: list[Tensor] = []
        self._kept: list[Tensor | None] = [None] * len(wanted)
        self._next: list[Tensor | None] = []

    @property
    def nbytes(self) -> int:
        """Bytes held beside the model's own weights."""
        return sum(t.untyped_storage().nbytes() for t in self._kept if t is not None)

    def begin(self) -> None:
        """Start a new version: nothing is valid until every tensor was stored."""
        self.tensors = []
        self._next = [None] * len(self._wanted)

    def store(self, index: int, value: Tensor) -> None:
        """Take tensor ``index`` of the new version."""
        value = value.detach()
        if self._wanted[index].owns_memory:
            kept = self._kept[index]
            fits = (
                kept is not None
                and kept.shape == value.shape
                and kept.dtype == value.dtype
                and kept.device == value.device
                and kept.stride() == value.stride()
            )
            if fits and kept is not None:
                value = kept.copy_(value)
            self._kept[index] = value
        self._next[index] = value

    def finish(self) -> None:
        """The new version is whole."""
        missing = [w.name for w, t in zip(self._wanted, self._next, strict=True) if t is None]
        if missing:
            raise RuntimeError(f"the prepare graph left out {', '.join(missing)}")
        self.tensors = [t for t in self._next if t is not None]
        self._next = []

    def release(self) -> None:
        """Give all memory back."""
        self.tensors, self._next = [], []
        self._kept = [None] * len(self._wanted)


class Measured:
    """Where a measuring graph leaves its scalars."""

    def __init__(self) -> None:
        self.values: dict[int, Tensor] = {}

    def store(self, index: int, value: Tensor) -> None:
        """Take scalar ``index``."""
        self.values[index] = value

    def floats(self, count: int) -> list[float]:
        """All scalars, in order; one transfer from the device."""
        return torch.stack([self.values[i].float() for i in range(count)]).tolist()
