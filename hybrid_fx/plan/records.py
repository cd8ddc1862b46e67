"""The tensors that a manifest names: what a plan takes, makes and keeps.

Shapes are those of the tensors named (legend: K key-value heads, D head size).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .plain import need_bool, need_positive, need_text, odd, set_shape, set_tuple
from .source_check import TORCH_CONSTANTS

_DTYPES = frozenset(name for name, value in TORCH_CONSTANTS.items() if type(value) is torch.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One argument of the prepare graph: a parameter or buffer of the model.

    Attributes:
        name: fully qualified name in the model.
        shape: of the whole tensor.
        dtype: canonical name without ``torch.``, e.g. ``"bfloat16"``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        _need_tensor(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """One tensor that the prepare graph returns and prefill and decode take.

    Attributes:
        name: of the tensor in the sources.
        recipe: how its values are made, for a person: ``"concat_rows(…q_proj.weight, …)"``.
        shape, dtype: as in :class:`Weight`.
        owns_memory: False where it is a parameter itself or a view of one, but for packing.
        packed: whether it is laid out for the kernel of its device, which is memory of its own
            on a device that has a layout for it.
        folded: whether adapters are folded into it.
        stacked: the recipes of what is stacked to it, in order; empty where it is no stack.
    """

    name: str
    recipe: str
    shape: tuple[int, ...]
    dtype: str
    owns_memory: bool
    packed: bool = False
    folded: bool = False
    stacked: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        need_text(self, "recipe")
        _need_tensor(self)
        need_bool(self, "owns_memory")
        need_bool(self, "packed")
        need_bool(self, "folded")
        set_tuple(self, "stacked", str)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayer:
    """What one attention layer keeps in the workspace.

    Attributes:
        path: module path of the attention.
        kv_heads: K.
        head_size: D of the keys.
        value_head_size: D of the values.
        window: positions a query sees, itself included; None sees all.
        dtype: of keys and values.
    """

    path: str
    kv_heads: int
    head_size: int
    value_head_size: int
    window: int | None
    dtype: str

    def __post_init__(self) -> None:
        need_text(self, "path")
        _need_dtype(self)
        need_positive(self, "kv_heads", "head_size", "value_head_size")
        if self.window is not None:
            need_positive(self, "window")


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed:
    """One weight that prefill and decode make whole themselves, where its layer runs.

    Attributes:
        layer: number of the gather, in the order in which they are issued.
        name, shape, dtype: as in :class:`Weight`.
    """

    layer: int
    name: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        _need_tensor(self)
        if type(self.layer) is not int or self.layer < 0:
            odd(self, "layer", "an int, not negative")


def _need_tensor(record: Weight | Prepared | Streamed) -> None:
    """Refuse a record whose ``name``, ``shape`` and ``dtype`` are not those of a tensor."""
    need_text(record, "name")
    set_shape(record)
    _need_dtype(record)


def _need_dtype(record: Weight | Prepared | Streamed | KVLayer) -> None:
    need_text(record, "dtype")
    if record.dtype not in _DTYPES:
        odd(record, "dtype", "the name of a torch dtype such as 'float32'")
