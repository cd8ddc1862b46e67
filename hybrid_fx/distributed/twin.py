"""A twin of a module tree: the same modules without what a framework put on them.

Modules are copied one level deep. Configs, functions and other values are shared with the
original; the parameters are those that the caller chooses. What refers to a module of the tree,
such as a method bound to it, refers to its twin.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..cache.tree import HOOKS, MODULE_STATE, View, walk

_OWN = frozenset(("_parameters", "_buffers", "_modules"))


def twin(
    model: nn.Module, view: View, parameter: Callable[[nn.Parameter], nn.Parameter]
) -> nn.Module:
    """Return the twin of ``model``; the original is only read.

    Args:
        model: The root of the tree.
        view: Which attributes and hooks are the model's own; the others have no twin.
        parameter: The twin's parameter for one of the model's, asked once for each.
    """
    modules = [module for _, module in walk(model)]
    made: dict[int, nn.Module] = {id(m): object.__new__(type(m)) for m in modules}
    chosen: dict[int, nn.Parameter] = {}
    for module in modules:
        state = made[id(module)].__dict__
        for name in MODULE_STATE - _OWN:
            value = module.__dict__.get(name)
            state[name] = value.copy() if isinstance(value, dict | set) else value
        state["_buffers"] = dict(module._buffers)
        children = module._modules.items()  # an empty container among them is false
        state["_modules"] = {n: None if c is None else made[id(c)] for n, c in children}
        state["_parameters"] = {}
        for name, own in module._parameters.items():
            if own is not None and id(own) not in chosen:
                chosen[id(own)] = parameter(own)
            state["_parameters"][name] = None if own is None else chosen[id(own)]
        for kind in HOOKS:
            hooks = {n: h for n, h in state[kind].items() if not view.foreign_hook(h)}
            state[kind] = OrderedDict((n, _turned(hook, made)) for n, hook in hooks.items())
        for name, value in module.__dict__.items():
            if name not in MODULE_STATE and not view.foreign_attribute(name):
                state[name] = _turned(value, made)
    return made[id(model)]


def _turned(value: Any, made: dict[int, nn.Module]) -> Any:
    """``value``, where it is or holds a module of the tree with the twin in its place."""
    if isinstance(value, nn.Module):
        return made.get(id(value), value)
    if isinstance(value, MethodType) and id(value.__self__) in made:
        return MethodType(value.__func__, made[id(value.__self__)])
    if type(value) is functools.partial:
        args = [_turned(item, made) for item in value.args]
        keywords = {name: _turned(item, made) for name, item in value.keywords.items()}
        return functools.partial(_turned(value.func, made), *args, **keywords)
    if type(value) in (list, tuple, dict):
        items = list(value.values()) if type(value) is dict else list(value)
        new = [_turned(item, made) for item in items]
        if any(a is not b for a, b in zip(items, new, strict=True)):
            return dict(zip(value, new, strict=True)) if type(value) is dict else type(value)(new)
    return value


def outline(shape: torch.Size, like: nn.Parameter) -> nn.Parameter:
    """A parameter of ``shape`` without memory: it can be traced, and must never be computed with.

    The rest is as of ``like``: dtype, device, and whether it requires gradients.
    """
    tensor = torch.empty(shape, dtype=like.dtype, device=like.device)
    tensor.untyped_storage().resize_(0)
    return nn.Parameter(tensor, requires_grad=like.requires_grad)
