"""What is assumed of torch's FSDP, and of modules that wrap a language model.

A wrapper is told by its shape: it is no language model itself, and holds one as a child under one
of a few names. FSDP is told by the flag that it leaves on the modules it manages, which
transformers reads too. Nothing of ``torch.distributed`` is imported. Tried on torch 2.11 and 2.13.
"""

from __future__ import annotations

from typing import Any

from torch import nn

#: Child -> the attribute that is public: of DistributedDataParallel and DataParallel, of
#: FullyShardedDataParallel, of torch.compile, of value heads.
_CHILDREN = {
    "module": "module",
    "_fsdp_wrapped_module": "module",
    "_orig_mod": "_orig_mod",
    "pretrained_model": "pretrained_model",
}


def is_language_model(model: Any) -> bool:
    """Whether ``model`` is one that transformers generates from, or a PeftModel around one."""
    kind = type(model)
    if not hasattr(kind, "generate"):
        return False  # a wrapper may answer for the attributes of what it holds
    base = model.get_base_model() if hasattr(kind, "get_base_model") else model
    able = getattr(base, "can_generate", None)
    return able is not None and bool(able())


def wrapped(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The language model inside a wrapper and the attributes that lead to it, or None."""
    path, inner = "", model
    while not is_language_model(inner):
        held = vars(inner).get("_modules", {})
        name = next((name for name in _CHILDREN if held.get(name) is not None), None)
        if name is None:
            return None
        path, inner = f"{path}.{_CHILDREN[name]}", held[name]
    return (path, inner) if path else None


def sharding(module: nn.Module) -> str | None:
    """What keeps the weights of ``module`` itself in parts, one a process, or None."""
    if vars(module).get("_is_fsdp_managed_module"):
        if _is_a("FSDPModule", module):
            return "is sharded by FSDP (fully_shard)"
        return "is sharded by FullyShardedDataParallel, which generates in summon_full_params()"
    for parameter in module._parameters.values():
        if _is_a("DTensor", parameter):
            return "has DTensors as parameters (FSDP, or tensor parallelism)"
    return None


def _is_a(name: str, value: object) -> bool:
    return any(kind.__name__ == name for kind in type(value).__mro__)
