"""What can be seen of a model's tensors and adapters without reading any weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..cache.adapters import AdapterState, adapter_state
from ..cache.tree import View, walk
from ..compat.placement import holds_values

_PLAIN = (nn.Parameter, Tensor)
# In the order of a record's facts; "storage" is compared by address, which the record's
# StorageWeakRef keeps from being given to another storage.
_FACTS = ("identity", "storage", "offset", "shape", "stride", "dtype", "device", "_version")


@dataclass(slots=True)
class _Record:
    """One tensor as it was seen. Holds neither the tensor nor its memory alive.

    There is no weak reference to the tensor either: ``torch.utils.swap_tensors``, and with it
    ``.to()`` of a tensor subclass, refuses a tensor that has one.
    """

    storage: StorageWeakRef | None
    facts: tuple[Any, ...]


@dataclass(slots=True)
class Snapshot:
    """One look at a model.

    Attributes:
        tensors: Qualified name to record, of each parameter, buffer (non-persistent ones too) and
            tensor attribute; a tied tensor once for each name.
        adapters: Qualified path to adapter state of each module that has one.
        sums: Qualified name to checksum, of the tensors that were read.
    """

    tensors: dict[str, _Record]
    adapters: dict[str, AdapterState]
    sums: dict[str, int]


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters, buffers and tensor attributes of ``module`` itself, without children."""
    yield from ((n, t) for n, t in module._parameters.items() if t is not None)
    yield from ((n, t) for n, t in module._buffers.items() if t is not None)
    for name, value in module.__dict__.items():
        if isinstance(value, Tensor):
            yield name, value


def leaves(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """``tensor``, and where it is a wrapper (DTensor, quantized) the tensors inside it."""
    yield name, tensor
    if type(tensor) not in _PLAIN and is_traceable_wrapper_subclass(tensor):
        for inner in tensor.__tensor_flatten__()[0]:
            value = getattr(tensor, inner)
            if isinstance(value, Tensor):  # a DTensor's mesh is none
                yield from leaves(f"{name}.{inner}", value)


def storage_address(tensor: Tensor) -> int | None:
    """The identity of the tensor's storage; None for sparse and packed tensors."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return None


def _opaque_facts(tensor: Tensor) -> tuple[Any, ...]:
    # Sparse, packed or not yet initialised: ask one by one and take None for what is refused.
    def ask(what: str) -> Any:
        try:
            value = getattr(tensor, what)
            return value() if callable(value) else value
        except (RuntimeError, NotImplementedError, AttributeError):
            return None

    rest = (ask(n) for n in ("storage_offset", "shape", "stride", "dtype", "device", "_version"))
    return (id(tensor), storage_address(tensor), *rest)


def _facts(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.is_meta:
        # Without values none can change: offloading puts another one here behind each forward.
        return (None, None, 0, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, 0)
    try:
        return (
            id(tensor),
            tensor.untyped_storage()._cdata,
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            tensor.device,
            # An inference tensor counts no versions; its checksum is taken instead.
            None if tensor.is_inference() else tensor._version,
        )
    except (RuntimeError, NotImplementedError):
        return _opaque_facts(tensor)


def _record(tensor: Tensor, facts: tuple[Any, ...]) -> _Record:
    storage = None
    if facts[1] is not None:
        storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    return _Record(storage, facts)


def look(
    model: nn.Module, before: Snapshot | None, view: View
) -> tuple[Snapshot, dict[str, Tensor]]:
    """Look at ``model`` now. Records that still hold are taken over from ``before``.

    Returns:
        The snapshot, without checksums, and the tensors by name, each tensor once and wrappers
        as what is inside them.
    """
    known = before.tensors if before else {}
    now = Snapshot({}, {}, {})
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in walk(model):
        for own, outer in own_tensors(module):
            for name, tensor in leaves(*view.held(path + own, outer)):
                facts, old = _facts(tensor), known.get(name)
                same = old is not None and old.facts == facts
                now.tensors[name] = old if same and old else _record(tensor, facts)
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[name] = tensor
        if (state := adapter_state(module)) is not None:
            now.adapters[path.removesuffix(".")] = state
    return now, found


def uncounted(snapshot: Snapshot, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without a version counter, whose edits only a checksum shows."""
    return {name: t for name, t in tensors.items() if snapshot.tensors[name].facts[-1] is None}


def is_readable(tensor: Tensor) -> bool:
    """Whether a checksum can read the memory: wrappers are read through their inner tensors."""
    if type(tensor) not in _PLAIN and is_traceable_wrapper_subclass(tensor):
        return False
    return holds_values(tensor)


def _tensor_change(name: str, old: _Record, new: _Record) -> str:
    for what, was, is_ in zip(_FACTS, old.facts, new.facts, strict=True):
        if was != is_:
            shown = "" if what in ("identity", "storage") else f" {was} -> {is_}"
            return f"{name}: {what} changed{shown}"
    raise AssertionError(f"{name}: two records of the same facts")


def first_change(old: Snapshot, new: Snapshot) -> str | None:
    """Say what differs between two looks, by name; None where nothing does."""
    for name, record in new.tensors.items():
        before = old.tensors.get(name)
        if before is None:
            return f"{name}: new tensor"
        if before is not record:
            return _tensor_change(name, before, record)
    for name in old.tensors.keys() - new.tensors.keys():
        return f"{name}: tensor is gone"
    for path, state in new.adapters.items():
        was = old.adapters.get(path)
        if was is None:
            return f"{path or 'the model'}: adapters added"
        if was != state:
            return f"{path or 'the model'}: adapter state: {was.differs(state)}"
    for path in old.adapters.keys() - new.adapters.keys():
        return f"{path or 'the model'}: adapters removed"
    for name, value in new.sums.items():
        if old.sums.get(name, value) != value:
            return f"{name}: checksum changed"
    return None


def is_tensor_of(model: nn.Module, ids: set[int], storages: set[int], view: View) -> bool:
    """Whether any tensor of ``model`` is among ``ids``, or lies in one of ``storages``."""
    for _, module in walk(model):
        for name, outer in own_tensors(module):
            if id(outer) in ids:
                return True
            for _, tensor in leaves(*view.held(name, outer)):
                if storage_address(tensor) in storages:
                    return True
    return False


def tensors_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """The tensors that ``optimizer`` updates."""
    for group in optimizer.param_groups:
        yield from group["params"]
