"""A cheap stamp of a model's structure, to know when its key must be computed again."""

from __future__ import annotations

import enum
import operator
import sys
from collections.abc import Hashable
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from ..ours import is_ours
from .fingerprint import class_items
from .helpers import functions_in
from .reach import atoms_of
from .roots import is_own_kind, roots_among
from .tree import (
    NOT_CONFIG,
    View,
    global_hooks,
    is_code,
    is_config,
    is_part,
    own_attributes,
    own_hooks,
    walk,
)
from .users import is_by_version

_PLAIN = frozenset((bool, int, float, str, bytes, type(None), torch.dtype, torch.device))
_DEPTH = 8  # as deep as the key reads


class Stamp(Hashable):
    """What was seen: plain values, compared with their types, and objects, compared by identity.

    Holds the functions and classes it compares, so that their addresses stay theirs; modules,
    tensors and other objects it holds not.
    """

    __slots__ = ("_held", "_plain", "_types")

    def __init__(self, plain: list[Any], held: list[Any]) -> None:
        self._plain = tuple(plain)
        self._types = tuple(map(type, plain))  # 1, 1.0 and True are equal
        self._held = tuple(held)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stamp) and (
            len(self._held) == len(other._held)
            and all(map(operator.is_, self._held, other._held))
            and self._types == other._types
            and self._plain == other._plain
        )

    def __hash__(self) -> int:
        return hash((self._plain, tuple(map(id, self._held))))


def _parts(function: FunctionType) -> tuple[object, ...]:
    # Each part of a function can be replaced by itself; a closure's cells are read by _Look.code.
    return (function, function.__code__, function.__defaults__, function.__kwdefaults__)


class _Look:
    """One reading of a model."""

    def __init__(self, view: View) -> None:
        self._view = view
        self.plain: list[Any] = []
        self.held: list[Any] = []
        self._configs: set[int] = set()
        self._classes: set[type] = set()
        self._spaces: set[int] = set()
        self._modules: list[nn.Module] = []
        self._called: list[Any] = []
        self._functions: set[int] = set()
        self._containers: set[tuple[int, int]] = set()
        self._tensors: dict[int, int] = {}

    def module(self, module: nn.Module, training: bool) -> None:
        plain = self.plain
        self._modules.append(module)
        kind = type(module)
        plain += (id(module), *module._modules)
        if training:
            plain.append(module.training)
        if kind not in self._classes:
            self.one_class(kind)
        self.held.append(kind)
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    plain += (name, None)
                else:
                    first = self._tensors.setdefault(id(tensor), len(self._tensors))
                    shape = self._view.shape(tensor)
                    plain += (name, first, shape, tensor.dtype, tensor.device.type)
                    plain.append(id(type(tensor)))
        for name, value in own_attributes(module):
            if self._view.foreign_attribute(name):
                continue
            plain.append(name)
            if type(value) in _PLAIN:
                plain.append(value)
                continue
            self.value(value)
            if is_code(value):
                self._called.append(value)
        for kind_of_hook, hook in own_hooks(module):
            if is_part(kind_of_hook, training) and not self._view.foreign_hook(hook):
                self.hook(kind_of_hook, hook)

    def hook(self, kind: str, hook: Any) -> None:
        if not is_ours(hook):
            self.plain.append(kind)
            self.code(hook)
            if "forward" in kind:
                self._called.append(hook)

    def one_class(self, kind: type) -> None:
        """What stands in a class and its bases, and in the Python modules they come from."""
        self._classes.add(kind)
        for base in kind.__mro__:
            if base is object or (base is not kind and base in self._classes):
                continue
            self._classes.add(base)
            values = [value for _, value in class_items(base)]
            self.held += values
            for value in values:
                if type(value) is FunctionType:
                    self.held += _parts(value)
            source = None if is_by_version(base.__module__) else sys.modules.get(base.__module__)
            if source is not None:
                self.space(vars(source))

    def space(self, space: dict[str, Any]) -> None:
        """The functions, classes and constants of one Python module."""
        if id(space) in self._spaces:
            return
        self._spaces.add(id(space))
        for value in space.values():
            if type(value) is FunctionType:
                self.held += _parts(value)
            elif type(value) in _PLAIN or isinstance(value, type):
                self.held.append(value)

    def value(self, value: Any, depth: int = 0) -> None:
        """Anything a module or config carries."""
        kind = type(value)
        if kind in _PLAIN:
            self.plain.append(value)
        elif isinstance(value, enum.Enum):
            self.held.append(value)
        elif isinstance(value, list | tuple | set | frozenset | dict):
            self.container(value, depth)
        elif isinstance(value, torch.Tensor):
            self.plain += (value.dtype, value.shape)
        elif isinstance(value, nn.Module):
            self.held.append(kind)
        elif is_config(value):
            self.config(value)
        elif is_code(value):
            if not is_ours(value):
                self.code(value)
        else:
            self.held.append(kind)
            self.carried(value)

    def container(self, value: Any, depth: int) -> None:
        """A list, tuple, set or dictionary."""
        self.plain.append(len(value))
        if depth == _DEPTH or (id(value), depth) in self._containers:
            return
        self._containers.add((id(value), depth))
        if not isinstance(value, dict):
            # The order of a set holds as long as nobody changes it, or costs one more key.
            for item in value:
                self.value(item, depth + 1)
            return
        for key, item in value.items():
            self.value(key, depth + 1)
            self.value(item, depth + 1)

    def carried(self, value: Any) -> None:
        """The plain values in an object's own ``__dict__``."""
        for name, item in getattr(value, "__dict__", {}).items():
            if type(item) in _PLAIN:
                self.plain += (name, item)

    def code(self, value: Any) -> None:
        """Something to call: itself, and what its functions close over."""
        if isinstance(value, MethodType):
            self.plain.append(id(value.__self__))
            if not is_own_kind(type(value.__self__)):
                self.carried(value.__self__)
            value = value.__func__
        self.held.append(value)
        if type(value) is not FunctionType:
            self.carried(value)
        for function in functions_in(value):
            self.held += _parts(function)
            if id(function) in self._functions:
                continue  # what closes over itself comes back here
            self._functions.add(id(function))
            for cell in function.__closure__ or ():
                try:
                    self.value(cell.cell_contents)
                except ValueError:  # the variable has no value yet
                    continue
            space = function.__globals__
            if not is_by_version(str(space.get("__name__", ""))):
                self.space(space)

    def own(self) -> None:
        """What code of a user's may read, in the modules that were looked at."""
        for atom in atoms_of(roots_among(self._modules, self._called), self._modules):
            (self.held if isinstance(atom, CodeType | type) else self.plain).append(atom)

    def config(self, config: Any) -> None:
        """A model config and the configs inside it."""
        if id(config) in self._configs:
            return
        self._configs.add(id(config))
        for name, value in vars(config).items():
            if name not in NOT_CONFIG:
                self.plain.append(name)
                self.value(value)


def structure_stamp(model: nn.Module, *, training: bool = False, view: View | None = None) -> Stamp:
    """Return a stamp that differs, in this process, whenever the structure key may differ.

    Equal stamps: the key computed before still holds. Different stamps: compute the key; it may
    turn out the same. Not in the stamp: the :class:`HybridConfig`, source files, versions.

    Args:
        model: The model as it stands. No tensor's memory is read.
        training: Also look at each module's training flag, for the key of a training graph.
        view: What of the modules is the model's own.
    """
    look = _Look(view or View())
    for path, module in walk(model):
        look.plain.append(path)
        look.module(module, training)
    for kind, hook in global_hooks():
        look.hook(kind, hook)  # those of backward too: with one there is no capture
    look.own()
    return Stamp(look.plain, look.held)
