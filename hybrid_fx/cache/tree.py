"""Reading a module tree: its modules, their own attributes and their hooks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

# What every module carries, hooks and children included; read by name where it matters.
MODULE_STATE = frozenset(nn.Module().__dict__)

# Attributes that trainers, loaders and torch.compile write, and no forward reads.
NOT_STRUCTURE = frozenset(
    "name_or_path generation_config model_tags warnings_issued _is_hf_initialized "
    "_is_torch_compile".split()
)

# Of a model's config: where it came from, what save_pretrained writes into it, and what the capture
# passes as an argument.
NOT_CONFIG = frozenset(
    "_name_or_path name_or_path transformers_version architectures dtype torch_dtype "
    "use_cache".split()
)

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = tuple(hook.replace("_", "_global_", 1) for hook in HOOKS)


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each module of ``model`` once, parents first, with its path and a dot ("" for the root)."""
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        for name, child in reversed(module._modules.items()):
            if child is not None:
                stack.append((f"{path}{name}.", child))


def is_code(value: object) -> bool:
    """Whether ``value`` is something to call, modules and classes apart."""
    if isinstance(value, FunctionType | MethodType | functools.partial):
        return True
    return callable(value) and not isinstance(value, nn.Module | type)


def is_config(value: object) -> bool:
    """Whether ``value`` is a model config: something that is no module and has ``to_dict``."""
    return hasattr(type(value), "to_dict") and not isinstance(value, nn.Module)


def own_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What stands in ``module`` itself and may steer its forward; parameters and hooks apart."""
    for name, value in module.__dict__.items():
        if name not in MODULE_STATE and name not in NOT_STRUCTURE:
            yield name, value


def own_hooks(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(kind, hook) of every forward and backward hook of ``module``, in the order they run."""
    for kind in HOOKS:
        hooks = module.__dict__[kind]
        if hooks:
            with_kwargs = module.__dict__.get(f"{kind}_with_kwargs") or {}
            always = module.__dict__.get(f"{kind}_always_called") or {}
            for number, hook in hooks.items():
                flags = " with kwargs" * (number in with_kwargs) + " always" * (number in always)
                yield kind + flags, hook


def is_part(kind: str, training: bool) -> bool:
    """Whether a hook of this kind is part of a graph: the eval graph has no backward."""
    return training or "forward" in kind


class View:
    """What of a module tree is the model's own: here everything.

    A framework that wraps a model leaves hooks and attributes on its modules, and may keep the
    values of its parameters elsewhere; its view leaves out the former and finds the latter.
    """

    def foreign_attribute(self, name: str) -> bool:
        """Whether an attribute of this name on a module is the framework's."""
        return False

    def foreign_hook(self, hook: Any) -> bool:
        """Whether a forward or backward hook is the framework's."""
        return False

    def shape(self, tensor: Tensor) -> torch.Size:
        """The shape of the whole tensor."""
        return tensor.shape

    def held(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        """The tensor in whose memory the values of ``tensor`` lie in this process, and a name."""
        return name, tensor


def global_hooks() -> Iterator[tuple[str, Any]]:
    """(kind, hook) of the hooks that torch runs on every module of the process."""
    for kind in _GLOBAL_HOOKS:
        for hook in getattr(torch_module, kind, {}).values():
            yield kind, hook
