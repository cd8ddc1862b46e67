"""Prepared tensors: what the prepare graph made of the weights, of exactly one weight version."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from ..passes.kernels import concat_rows
from ..passes.packing import (
    PLAIN,
    FewRows,
    Forms,
    PackForm,
    is_plain,
    lend,
    pack,
    packed_bytes,
    refill,
    usual_forms,
)
from ..plan.records import Prepared
from .huge_pages import block
from .placing import lay_out, place
from .shared_rows import SharedRows, storage_of

#: A tensor in memory that is this many times its own is a slice; what was gathered is padded.
_PADDED = 1.25


class Gather(Protocol):
    """The ``gather`` operator of one runner, where weights are sharded."""

    def begin(
        self, weights: Sequence[Tensor], timer: Callable[[str], AbstractContextManager[Any]]
    ) -> None:
        """A function begins to run on ``weights``; it gathers them in about this order."""

    def __call__(self, weight: Tensor) -> Tensor:
        """The whole of a shard, in memory of its own; a weight that is whole as it is."""

    def end(self) -> None:
        """The function has run; drop what was gathered and not asked for."""

    def lent(self, tensor: Tensor) -> bool:
        """Whether the memory is the model's, so that it is neither kept nor refilled."""


class PreparedTensors:
    """The list that prefill and decode take; its memory is refilled from version to version.

    A tensor with memory of its own is copied into what the last version left, so that memory is
    not returned and faulted in again; a weight, a view of one or a stack in which weights lie is
    taken as it is, and never refilled. What was gathered is never a weight. A slice of what was
    made does not keep the rest of it.

    Args:
        wanted: What there is to be, in order.
        gather: Makes sharded weights whole; ``None`` where all are.
        rows: Where weights that are stacked lie in one buffer.
        join: The operator ``concat_rows``, for what is not packed.
        forms: What is packed, and how; ``None`` is :func:`~hybrid_fx.passes.packing.usual_forms`.
    """

    def __init__(
        self,
        wanted: tuple[Prepared, ...],
        gather: Gather | None = None,
        rows: SharedRows | None = None,
        join: Callable[..., Tensor] = concat_rows,
        forms: Forms | None = None,
    ) -> None:
        self._wanted = wanted
        self._gather = gather
        self._rows = rows
        self._join = join
        self._forms = forms
        self._lent: frozenset[int] = frozenset()
        self.tensors: list[Tensor] = []
        self._kept: list[Tensor | None] = [None] * len(wanted)
        self._next: list[Tensor | None] = []

    @property
    def nbytes(self) -> int:
        """Bytes held beside the model's own weights."""
        kept = [tensor for tensor in self._kept if tensor is not None]
        packed = sum(packed_bytes(tensor) for tensor in kept if tensor.is_mkldnn)
        storages = (tensor.untyped_storage() for tensor in kept if not tensor.is_mkldnn)
        return packed + sum({s._cdata: s.nbytes() for s in storages}.values())

    @property
    def copies(self) -> list[tuple[Prepared, int, torch.dtype | None]]:
        """The tensors that have memory of their own, its bytes, and what they are packed in."""
        return [
            (wanted, packed_bytes(kept), kept.dtype)
            if kept.is_mkldnn
            else (wanted, kept.nbytes, None)
            for wanted, kept in zip(self._wanted, self._kept, strict=True)
            if kept is not None
        ]

    @property
    def shared_nbytes(self) -> int:
        """Bytes of the weights that are read as the stacks in which they lie."""
        rows = self._rows
        plain = [t for t in self.tensors if not t.is_mkldnn]
        return sum(t.nbytes for t in plain if rows is not None and rows.lent(t))

    def begin(self, weights: Sequence[Tensor] = ()) -> None:
        """Start a new version: nothing is valid until every tensor was stored.

        Args:
            weights: The model's own, which are held anyway.
        """
        self._lent = frozenset(map(storage_of, weights)) - {0}
        self.tensors = []
        self._next = [None] * len(self._wanted)

    def store(self, index: int, value: Tensor) -> None:
        """Take tensor ``index`` of the new version."""
        value = value.detach()
        if not self._owned(index, value):
            self._kept[index] = None  # what was ours is not held beside what is lent
        elif value.is_mkldnn:
            value = self._kept[index] = _in_huge_pages(value)
        else:
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
            elif value.untyped_storage().nbytes() > _PADDED * value.nbytes:
                value = value.clone()
            self._kept[index] = value
        self._next[index] = value

    def store_packed(self, index: int, *weights: Tensor) -> None:
        """Take tensor ``index`` of the new version: weights [n_i, E], to be stacked and packed."""
        form = self._form(weights)
        if form.dtype is None:
            # Where weights lie as a stack is known by the parameters themselves.
            self.store(index, self._stacked(weights, self._join))
            return
        kept, plain = self._kept[index], tuple(weight.detach() for weight in weights)
        if kept is None:
            kept = self._like_another(plain, form.dtype)
        if kept is not None and refill(kept, *plain, dtype=form.dtype):
            self._kept[index] = self._next[index] = kept
        else:
            if kept is not None and kept.is_mkldnn:
                self._kept[index] = kept = None  # not held beside what takes its place
            # Nobody else holds a stack or a cast, so that each is gone when the next is made.
            self.store(index, pack(self._stacked(plain, concat_rows).to(form.dtype)))
        self._lend(index, FewRows(form.plain_rows, plain))

    def _form(self, weights: Sequence[Tensor]) -> PackForm:
        """How a stack of weights is held."""
        first = weights[0]
        forms = usual_forms(first.device) if self._forms is None else self._forms
        return forms.get(first.dtype, PLAIN) if all(map(is_plain, weights)) else PLAIN

    def _stacked(self, weights: Sequence[Tensor], join: Callable[..., Tensor]) -> Tensor:
        return weights[0] if len(weights) == 1 else join(*weights)

    def _lend(self, index: int, few: FewRows) -> None:
        """Let few rows read the weights that a packed tensor is of, where those are the model's."""
        packed = self._next[index]
        assert packed is not None
        if packed.is_mkldnn:
            ours = few.rows and all(t.is_contiguous() and self._is_lent(t) for t in few.parts)
            lend(packed, few if ours else None)

    def _is_lent(self, tensor: Tensor) -> bool:
        """Whether a tensor is memory of the model's."""
        if self._gather is not None:
            return self._gather.lent(tensor)
        return storage_of(tensor) in self._lent

    def _like_another(self, weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
        """Memory to pack into, laid out as what another layer has packed in this version."""
        rows = sum(weight.shape[0] for weight in weights)
        wanted = (rows, *weights[0].shape[1:]), dtype
        packed = (tensor for tensor in self._next if tensor is not None and tensor.is_mkldnn)
        other = next((t for t in packed if (tuple(t.shape), t.dtype) == wanted), None)
        memory = None if other is None else block(packed_bytes(other))
        return None if other is None or memory is None else lay_out(other, memory)

    def _owned(self, index: int, value: Tensor) -> bool:
        wanted = self._wanted[index]
        if wanted.packed and value.is_mkldnn:  # else its device has no layout for it
            return True
        if self._rows is not None and self._rows.lent(value):
            return False
        if self._gather is None:
            return wanted.owns_memory
        return not self._gather.lent(value)

    def finish(self) -> None:
        """The new version is whole."""
        missing = [w.name for w, t in zip(self._wanted, self._next, strict=True) if t is None]
        if missing:
            raise RuntimeError(f"the prepare graph left out {', '.join(missing)}")
        self.tensors = [t for t in self._next if t is not None]
        self._next = []

    def release(self) -> None:
        """Give all memory back, also where the frames of a caught error still hold the list."""
        self.tensors.clear()
        self._next = []
        self._kept = [None] * len(self._wanted)


def _in_huge_pages(packed: Tensor) -> Tensor:
    """A packed weight that is kept and refilled: a copy in such pages, where there are some."""
    memory = block(packed_bytes(packed))
    return packed if memory is None else place(packed, memory)


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
