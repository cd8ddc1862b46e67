"""Where a model computes, and whether its weights can be read here: asked of this module alone.

A model may be offloaded, spread over devices, or sharded over processes, before or after an engine
took it; its first parameter then says nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .accelerate import execution_device, offloading, placing
from .wrappers import sharding


def device_of(model: nn.Module) -> torch.device:
    """Where ``model`` computes; the CPU where nothing says."""
    first = next(model.parameters(), None)
    if first is not None and not first.is_meta:
        return first.device
    for module in model.modules():
        if (device := execution_device(module)) is not None and device.type != "meta":
            return device
    there = (tensor.device for tensor in _tensors(model) if not tensor.is_meta)
    return next(there, torch.device("cpu"))


def unreadable(model: nn.Module) -> str | None:
    """Why the weights of ``model`` do not lie here, whole and to stay, or None where they do."""
    for ask in (offloading, sharding, placing):
        for path, module in model.named_modules():
            if (fault := ask(module)) is not None:
                return f"{path or 'the model'} {fault}"
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            return f"{name} is on the meta device; it holds no values"
    return None


def holds_values(tensor: Tensor) -> bool:
    """Whether a plain tensor has memory: one that is offloaded or sharded may have none."""
    if tensor.is_meta:
        return False
    if tensor.layout is not torch.strided or not tensor.numel():
        return True
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return tensor.untyped_storage().nbytes() >= needed


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
