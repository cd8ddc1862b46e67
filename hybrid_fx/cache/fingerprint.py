"""What code does and what values are, as canonical text: equal in two processes, or different.

A function is its byte code, constants, names, defaults and closure; a class is everything in its
own dictionary; other objects are their class and the plain values they carry. Addresses, line
numbers, file names and the contents of tensors have no part in it.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import fields
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import torch
from torch import Tensor, nn

from .users import is_users

PLAIN = (bool, int, float, str, bytes, type(None), complex)
_DEPTH = 8
# Of a class: what says nothing about how its objects act. At run time Dynamo replaces __init__ and
# __setstate__ of nn.Module and leaves a mark with three underscores, and transformers puts
# smart_apply there.
_NOT_CODE = frozenset(
    "__init__ __setstate__ ___needs_generation_tag_patch smart_apply "
    "__dict__ __weakref__ __doc__ __module__ __annotations__ __abstractmethods__ _abc_impl "
    "__static_attributes__ __firstlineno__ __annotate__ __annotate_func__ __slotnames__ "
    "__annotations_cache__ __parameters__ __orig_bases__".split()
)
_TORCH_VALUES = (torch.dtype, torch.device, torch.layout, torch.memory_format)


def text(value: Any) -> str:
    """Canonical JSON of what :meth:`Fingerprints.value` returns."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def sha256(*parts: str | bytes) -> str:
    """Hex digest of ``parts``, each with its length, so that no two lists read alike."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(b"%d:" % len(data))
        digest.update(data)
    return digest.hexdigest()


def reference(kind: type) -> str:
    """``module.qualname`` of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def nested_code(code: CodeType) -> Iterable[CodeType]:
    """``code`` and the code of everything defined inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested_code(constant)


def _name(item: tuple[str, Any]) -> str:
    return item[0]


def _is_remembered(name: str, value: Any) -> bool:
    # What a class remembers of its own answers, such as transformers' "_can_..._cached_value".
    return name.startswith("_") and "cache" in name and isinstance(value, PLAIN)


def class_items(kind: type) -> list[tuple[str, Any]]:
    """What stands in ``kind`` itself and may change how its objects act."""
    items = vars(kind).items()
    return [(n, v) for n, v in items if n not in _NOT_CODE and not _is_remembered(n, v)]


def is_frozen_data(value: object) -> bool:
    """Whether a value is an object of a frozen dataclass: a pass, a policy, a pattern."""
    told: Any = getattr(type(value), "__dataclass_params__", None)
    return told is not None and bool(told.frozen)


class Fingerprints:
    """Fingerprints taken at one moment: everything is read once, and nothing is kept after it."""

    def __init__(self) -> None:
        # The object is kept beside its digest, so that no other one can get its address.
        self._known: dict[int, tuple[object, str]] = {}

    def _once(self, subject: Any, compute: Any) -> str:
        entry = self._known.get(id(subject))
        if entry is None:
            # What comes back to itself, as recursive closures do, is told by its name there.
            name = getattr(subject, "__qualname__", type(subject).__qualname__)
            self._known[id(subject)] = (subject, f"recursive {name}")
            entry = (subject, compute(subject))
            self._known[id(subject)] = entry
        return entry[1]

    def code(self, code: CodeType) -> str:
        """Digest of a code object."""
        return self._once(code, self._code)

    def _code(self, code: CodeType) -> str:
        constants = [self._constant(constant) for constant in code.co_consts]
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        return sha256(code.co_code, text(constants), text(names), text(counts))

    def _constant(self, value: Any) -> Any:
        if isinstance(value, CodeType):
            return {"code": self.code(value)}
        return self.value(value)

    def function(self, function: FunctionType) -> str:
        """Digest of a function as it stands: code, defaults and what its closure holds."""
        return self._once(function, self._function)

    def _function(self, function: FunctionType) -> str:
        cells = []
        for cell in function.__closure__ or ():
            try:
                cells.append(self.value(cell.cell_contents))
            except ValueError:  # the variable has no value yet
                cells.append({"empty": True})
        defaults = self.value([function.__defaults__, function.__kwdefaults__])
        return sha256(self.code(function.__code__), text(defaults), text(cells))

    def one_class(self, kind: type) -> str:
        """Digest of what stands in ``kind`` itself, patched methods included."""
        return self._once(kind, self._one_class)

    def _one_class(self, kind: type) -> str:
        items = [(name, self.value(value)) for name, value in sorted(class_items(kind), key=_name)]
        return sha256(reference(kind), text(items))

    def whole_class(self, kind: type) -> str:
        """Digest of ``kind`` and all its bases."""
        parts = [self.one_class(base) for base in kind.__mro__ if base is not object]
        return sha256(*parts)

    def value(self, value: Any, depth: int = 0) -> Any:
        """``value`` as plain JSON: two values that act differently differ."""
        if isinstance(value, enum.Enum):  # first: it may be an int or a str as well
            return {"enum": f"{reference(type(value))}.{value.name}"}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, bytes | complex):
            return {"repr": repr(value)}
        if isinstance(value, _TORCH_VALUES):
            return {"torch": str(value)}
        if isinstance(value, Tensor):
            return {"tensor": [str(value.dtype), list(value.shape)]}
        if isinstance(value, nn.Module):
            return {"module": reference(type(value))}
        if isinstance(value, type):
            return {"class": reference(value)}
        if depth >= _DEPTH:
            return {"object": reference(type(value))}
        return self._container(value, depth + 1)

    def _container(self, value: Any, depth: int) -> Any:
        if isinstance(value, list | tuple):
            return [self.value(item, depth) for item in value]
        if isinstance(value, set | frozenset):
            return {"set": sorted((self.value(item, depth) for item in value), key=text)}
        if isinstance(value, dict):
            items = [[self.value(k, depth), self.value(v, depth)] for k, v in value.items()]
            return {"dict": sorted(items, key=text)}
        return self._code_like(value, depth)

    def _code_like(self, value: Any, depth: int) -> Any:
        if isinstance(value, FunctionType):
            return {"function": self.function(value)}
        if isinstance(value, MethodType):
            # What a method of a user's reads of its object is told apart, see reach.py.
            own = is_users(type(value.__self__).__module__)
            bound = [value.__func__, type(value.__self__) if own else value.__self__]
            return {"method": [self.value(part, depth) for part in bound]}
        if isinstance(value, BuiltinFunctionType):
            return {"builtin": f"{value.__module__}.{value.__qualname__}"}
        if isinstance(value, classmethod | staticmethod):
            return {type(value).__name__: self.value(value.__func__, depth)}
        if isinstance(value, property):
            return {"property": [self.value(f, depth) for f in (value.fget, value.fset)]}
        if isinstance(value, functools.partial | functools.partialmethod):
            parts = [value.func, value.args, value.keywords]
            return {"partial": [self.value(part, depth) for part in parts]}
        if isinstance(value, functools.cached_property):
            return {"cached_property": self.value(value.func, depth)}
        if isinstance(value, GetSetDescriptorType | MemberDescriptorType):
            return {"slot": value.__name__}
        if isinstance(value, ModuleType):
            return {"python module": value.__name__}
        if is_frozen_data(value):
            return {"data": self._once(value, self._frozen_data)}
        if isinstance(value, logging.Logger):  # remembers which levels were asked for
            return {"object": reference(type(value))}
        return self._object(value, depth)

    def _frozen_data(self, value: Any) -> str:
        # All of it, however deep: a pattern nests, and nothing in it can change.
        told = {entry.name: self.value(getattr(value, entry.name)) for entry in fields(value)}
        return sha256(reference(type(value)), text(told))

    def _object(self, value: Any, depth: int) -> Any:
        kind = type(value)
        told: dict[str, Any] = {"object": reference(kind)}
        if callable(value) and kind.__module__ != "builtins":
            told["class"] = self.whole_class(kind)
        carried = getattr(value, "__dict__", None)
        if isinstance(carried, dict):
            # One level only: whatever an object points at may point at half of the program.
            shallow = {k: v for k, v in carried.items() if _is_plain(v) or isinstance(v, _CODE)}
            told["carries"] = self.value(shallow, depth)
        return told


_CODE = (FunctionType, MethodType, BuiltinFunctionType, functools.partial)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(_is_plain(k) and _is_plain(v) for k, v in value.items())
    return isinstance(value, (*PLAIN, enum.Enum, *_TORCH_VALUES))
