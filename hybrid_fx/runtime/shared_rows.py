"""Stacked weights without a copy: the parameters of one stack lie row after row in one buffer.

What the prepare graph stacks (query, key and value; gate and up) are then the rows of a tensor that
is there already, and what training writes into a parameter stands in the stack at once.

Every parameter keeps a storage of its own, which is a piece of the buffer's memory: whoever looks
at storages (pickle, ``torch.save``, safetensors, weak references) sees one like any other. A piece
also stands as far from a vector's boundary as the memory that it replaces, by which kernels choose
how they add up: training stays what it was, bit by bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..passes.operators import IN_PLACE

#: Bytes to the next boundary that kernels look at: vectors on a CPU, cuBLASLt's widest elsewhere.
_CPU_BOUNDARY, _OTHER_BOUNDARY = 64, 256


@dataclass(frozen=True, slots=True)
class _Stack:
    """One buffer, and the pieces of it in which parameters lie: storage and address."""

    whole: Tensor
    pieces: tuple[tuple[StorageWeakRef, int], ...]

    @property
    def places(self) -> set[tuple[int, int]]:
        """The pieces that are still there. Where all are, the buffer holds nothing of its own."""
        return {(-1, 0) if _gone(storage) else (storage.cdata, at) for storage, at in self.pieces}

    def has(self, weight: Tensor, piece: int) -> bool:
        """Whether ``weight`` lies in that piece."""
        storage, address = self.pieces[piece]
        return (
            not _gone(storage)
            and storage_of(weight) == storage.cdata
            and weight.data_ptr() == address
            and weight.is_contiguous()
            and weight.dtype == self.whole.dtype
            and weight.shape[1:] == self.whole.shape[1:]
            and weight.nbytes == weight.untyped_storage().nbytes()
        )

    def is_of(self, weights: Sequence[Tensor]) -> bool:
        """Whether its rows are those of ``weights``, in order."""
        return len(weights) == len(self.pieces) and all(
            self.has(weight, piece) for piece, weight in enumerate(weights)
        )


class SharedRows:
    """Lays the parameters of one model out as rows of the stacks that its graphs read.

    A stack is laid out once, and only while :meth:`laying_out`. Where a parameter has been put
    elsewhere since, by ``param.data = …`` or another engine, its stack is copied from then on.

    Attributes:
        copied: What is stacked by a copy, by the names of the parameters, to the reason.
        moved: How many parameters were given other memory so far.
    """

    def __init__(self) -> None:
        self.copied: dict[tuple[str, ...], str] = {}
        self.moved = 0
        self._stacks: dict[int, _Stack] = {}  # by the storage of the first piece
        self._lent: set[int] = set()  # storages of whole stacks
        self._ours: set[int] = set()  # storages of pieces
        self._done: set[tuple[str, ...]] = set()
        self._names: dict[int, str] = {}
        self._users: dict[int, list[str]] = {}

    def begin(self) -> None:
        """The model has another structure: what was laid out before may be so again."""
        self._done = set()

    @contextmanager
    def laying_out(
        self, tensors: Mapping[str, Tensor], on_move: Callable[[], None]
    ) -> Iterator[None]:
        """Meanwhile, those of ``tensors`` that are stacked may be given other memory.

        Args:
            tensors: Parameters and buffers of the model by their qualified names.
            on_move: Called at the end where some were.
        """
        self.copied, before = {}, self.moved
        places = {(storage_of(t), t.data_ptr()) for t in tensors.values() if _is_plain(t)}
        self._keep([stack for stack in self._stacks.values() if stack.places <= places])
        for name, tensor in tensors.items():
            if self._names.setdefault(id(tensor), name) == name:
                self._users.setdefault(storage_of(tensor), []).append(name)
        try:
            yield
        finally:
            self._names, self._users = {}, {}
            if self.moved > before:
                on_move()

    def concat_rows(self, *weights: Tensor) -> Tensor:
        """The operator of that name: the stack in which ``weights`` lie, or a copy of them."""
        stack = self._stacks.get(storage_of(weights[0]))
        if stack is not None and stack.is_of(weights):
            return stack.whole
        if self._names:
            names = tuple(self._names.get(id(weight), "") for weight in weights)
            reason = self._refusal(names, weights)
            if not reason:
                return self._lay_out(names, weights)
            if all(names):
                self.copied[names] = reason
        return torch.cat(weights, 0)

    def lent(self, tensor: Tensor) -> bool:
        """Whether the memory is the model's, so that it is neither kept nor refilled."""
        return storage_of(tensor) in self._lent

    def undo(self, tensors: Mapping[str, Tensor]) -> None:
        """Give each of ``tensors`` that lies in a stack memory of its own again.

        Not those whose memory something else holds as well: they stay as they are.
        """
        pieces = {
            storage.cdata: (stack, index)
            for stack in self._stacks.values()
            for index, (storage, _) in enumerate(stack.pieces)
        }
        self._keep([])
        for tensor in tensors.values():
            stack, index = pieces.get(storage_of(tensor), (None, 0))
            if stack is not None and stack.has(tensor, index) and is_alone(tensor):
                own = torch.empty_like(tensor.data)
                fits = not (own.data_ptr() - tensor.data_ptr()) % _boundary(tensor)
                self._move((tensor,), [own] if fits else _pieces((tensor,))[1])

    def _keep(self, stacks: Sequence[_Stack]) -> None:
        """Hold these buffers and no other; the parameters in the others hold what they need."""
        self._stacks = {stack.pieces[0][0].cdata: stack for stack in stacks}
        self._lent = {storage_of(stack.whole) for stack in stacks}
        self._ours = {storage.cdata for stack in stacks for storage, _ in stack.pieces}

    def _refusal(self, names: Sequence[str], weights: Sequence[Tensor]) -> str:
        """Why ``weights`` cannot be laid out, or ""."""
        if not all(names):
            return "it is not made of parameters as they are"
        if tuple(names) in self._done:
            return "it was laid out before, and a parameter of it has been put elsewhere since"
        if len({id(weight) for weight in weights}) < len(weights):
            return "one parameter stands in it twice"
        first = weights[0]
        for name, weight in zip(names, weights, strict=True):
            if reason := _odd(weight):
                return f"{name} {reason}"
            if others := [user for user in self._users[storage_of(weight)] if user != name]:
                return f"{name} shares its memory with {others[0]}"
            if storage_of(weight) in self._ours:
                return f"{name} lies in another stack"
            if not is_alone(weight):
                return f"something else holds the memory of {name}, a view or a live graph"
            if (weight.dtype, weight.device) != (first.dtype, first.device):
                return f"{name} is {weight.dtype} on {weight.device}, and not as {names[0]} is"
        boundary = _boundary(first)
        starts = itertools.accumulate((w.nbytes for w in weights), initial=first.data_ptr())
        for name, weight, start in zip(names, weights, starts, strict=False):
            if (weight.data_ptr() - start) % boundary:
                return (
                    f"{name} would stand otherwise to the boundaries of {boundary} bytes, by "
                    "which training may round"
                )
        return ""

    def _lay_out(self, names: tuple[str, ...], weights: Sequence[Tensor]) -> Tensor:
        whole, pieces = _pieces(weights)
        self._move(weights, pieces)
        stack = _Stack(whole, tuple((_weak(w), w.data_ptr()) for w in weights))
        self._stacks[stack.pieces[0][0].cdata] = stack
        self._lent.add(storage_of(whole))
        self._ours |= {storage.cdata for storage, _ in stack.pieces}
        self._done.add(names)
        return whole

    def _move(self, weights: Sequence[Tensor], pieces: Sequence[Tensor]) -> None:
        for weight, piece in zip(weights, pieces, strict=True):
            piece.copy_(weight.detach())
        for weight, piece in zip(weights, pieces, strict=True):
            weight.data = piece
            self.moved += 1


def storage_of(tensor: Tensor) -> int:
    """The identity of the tensor's storage; 0 for sparse and packed tensors."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return 0


def _weak(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _gone(storage: StorageWeakRef) -> bool:
    return bool(storage.expired())  # type: ignore[no-untyped-call]


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is nn.Parameter and tensor.layout == torch.strided


def _boundary(tensor: Tensor) -> int:
    return _CPU_BOUNDARY if tensor.device.type == "cpu" else _OTHER_BOUNDARY


def _odd(weight: Tensor) -> str:
    """Why one tensor cannot be given other memory, or ""."""
    if type(weight) is not nn.Parameter:
        return f"is a {type(weight).__name__} and no plain parameter"
    if weight.layout != torch.strided or weight.is_meta or not weight.is_contiguous():
        return "is not dense and contiguous"
    if weight.is_inference():
        return "was made in inference mode"
    if weight.nbytes != weight.untyped_storage().nbytes() or not weight.nbytes:
        return "is a view of other memory"
    on_host = weight.device.type == "cpu"
    if on_host and (weight.is_shared() or weight.is_pinned()):  # type: ignore[no-untyped-call]
        return "lies in shared or pinned memory"
    return ""


def is_alone(weight: Tensor) -> bool:
    """Whether no other tensor holds the memory of ``weight``."""
    fresh = torch.empty(0, device="cpu")
    counts = [torch._C._storage_Use_Count(storage_of(t)) for t in (fresh, weight)]
    return counts[1] <= counts[0]


def _pieces(weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Memory for ``weights`` in a row, each as far from a boundary as it was.

    Returns:
        All of it, [sum of n_i, …], and the piece of each, [n_i, …]; every one with a storage of
        its own over the same bytes.
    """
    first, size = weights[0], sum(weight.nbytes for weight in weights)
    boundary = _boundary(first)

    def start(memory: Tensor) -> int:
        return (first.data_ptr() - memory.data_ptr()) % boundary

    memory = torch.empty(size, dtype=torch.uint8, device=first.device)
    if start(memory):
        memory = torch.empty(size + boundary, dtype=torch.uint8, device=first.device)
    at = start(memory)
    storage: Any = memory.untyped_storage()

    def piece(begin: int, rows: int) -> Any:
        made: Any = first.new_empty(0)
        length = rows * first.nbytes // first.shape[0]
        # A slice of a storage is a storage over its bytes, which holds the memory of the whole.
        made.set_(storage[begin : begin + length], 0, (rows, *first.shape[1:]))
        return made

    rows = [weight.shape[0] for weight in weights]
    begins = itertools.accumulate((weight.nbytes for weight in weights), initial=at)
    whole = piece(at, sum(rows))
    return whole, [piece(begin, n) for begin, n in zip(begins, rows, strict=False)]


def writes_in_place(source: str) -> bool:
    """Whether generated text writes into what it computed, where a stack would be the weights."""
    return any(f"op.{name}(" in source for name in IN_PLACE)
