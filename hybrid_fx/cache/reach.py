"""What code of a user's may read when it runs: all that it names.

A function reads its closure, its defaults, and the globals and attributes whose names stand in its
byte code. From there on this follows functions, classes, objects and containers of a user's
wherever they lie; of a library's it takes the name alone, as their versions stand for them.
Key and stamp read the same list, so that what one follows the other follows.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import os
import re
import sys
import weakref
from collections import UserList, deque
from collections.abc import Iterable, Mapping
from decimal import Decimal
from fractions import Fraction
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
)
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CaptureError
from .fingerprint import class_items, nested_code
from .roots import Root, home_of, is_own_kind
from .tree import MODULE_STATE, is_code
from .users import is_record, is_users

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_TORCH_VALUES = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_BY_REPR = (range, slice, re.Pattern, Fraction, Decimal)
_SEQUENCES = (list, tuple, set, frozenset, deque, UserList)

# Where these are named, any attribute may be read.
_ANY_NAME = frozenset(("getattr", "vars", "__dict__", "globals", "eval", "exec", "asdict"))

#: Values that the code of one model may read; more of them are data, and not followed one by one.
MOST = 100_000

# What Python calls by itself and no trace does.
_NEVER_RUN = frozenset(
    "__repr__ __str__ __format__ __dir__ __hash__ __del__ __getstate__ __reduce__".split()
)

#: Bytes of one array of numpy's that is taken whole.
MOST_BYTES = 2**26


class Reach:
    """One reading; :attr:`atoms` are plain values, code objects and classes, in order.

    Args:
        tree: The modules of the model, which hooks are handed; by their ids.
        names: What the code names, as far as it is known; :attr:`found` is what this reading saw.
    """

    def __init__(self, tree: Mapping[int, nn.Module], names: frozenset[str]) -> None:
        self.atoms: list[Any] = []
        self.found: set[str] = set()
        self._tree = tree
        self._names = names
        self._seen: set[tuple[int, Any]] = set()
        self._kept: list[Any] = []  # so that no other object gets the address of one that was seen
        self._work: deque[Any] = deque()

    def follow(self, roots: Iterable[Root]) -> None:
        """Read all that code of these may read.

        Raises:
            CaptureError: where that is more than :data:`MOST` values.
        """
        self._work.extend(roots)
        for module in self._tree.values():
            own = vars(module)
            self._work += [
                own[n] for n in sorted(self._names & own.keys()) if n not in MODULE_STATE
            ]
        while self._work:
            self._value(self._work.popleft())
            if len(self.atoms) > MOST:
                raise CaptureError(
                    f"code of yours in the forward may read more than {MOST} values; let it "
                    "name its settings, and not what holds data beside them"
                )

    def _first(self, value: Any, name: Any = None) -> bool:
        """Whether a value, or an attribute of it, is met for the first time."""
        if (id(value), name) in self._seen:
            return False
        self._seen.add((id(value), name))
        self._kept.append(value)
        return True

    def _value(self, value: Any) -> None:
        if isinstance(value, enum.Enum):
            self.atoms += (type(value), value.name)
        elif isinstance(value, _PLAIN):
            self.atoms.append(value)
        elif isinstance(value, _TORCH_VALUES):
            self.atoms.append(str(value))
        elif isinstance(value, _BY_REPR):
            self.atoms += (type(value), repr(value))
        elif isinstance(value, weakref.ref):
            self._work.append(value())
        elif isinstance(value, functools._lru_cache_wrapper):
            self._work.append(value.__wrapped__)
        elif isinstance(value, os._Environ):
            self._work += [value.get(name) for name in sorted(self._names)]
        elif isinstance(value, Tensor):
            self.atoms += (str(value.dtype), tuple(value.shape))
        elif isinstance(value, type):
            self.atoms.append(value)
            self._class(value)
        elif isinstance(value, (*_SEQUENCES, Mapping)):
            self._container(value)
        elif isinstance(value, ModuleType):
            self._python_module(value)
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, MethodType):
            self._work += (value.__self__, value.__func__)
        elif isinstance(value, functools.partial):
            self._work += (value.func, value.args, value.keywords)
        elif isinstance(value, staticmethod | classmethod):
            self._work.append(value.__func__)
        elif _is_array(value):
            self._array(value)
        elif not isinstance(value, BuiltinFunctionType):
            self._object(value)

    def _container(self, value: Any) -> None:
        if not self._first(value):
            return
        self.atoms.append(len(value))
        if isinstance(value, Mapping):
            for key, item in list(value.items()):
                self._work += (key, item)
        else:
            self._work += sorted(value, key=_place) if isinstance(value, set | frozenset) else value

    def _array(self, value: Any) -> None:
        """An array of numpy's: a trace takes what it holds."""
        if value.dtype.hasobject:
            self._work.append(value.tolist())
            return
        if value.nbytes > MOST_BYTES:
            raise CaptureError(
                f"code of yours in the forward may read an array of {value.nbytes} bytes, more "
                f"than {MOST_BYTES}; make it a buffer of the model"
            )
        self.atoms += (value.dtype.str, value.shape, hashlib.sha256(value.tobytes()).hexdigest())

    def _python_module(self, module: ModuleType) -> None:
        """What of a user's module is named."""
        if is_users(module.__name__):
            there = vars(module)
            for name in sorted(self._names & there.keys()):
                if self._first(module, name):
                    self._work.append(there[name])

    def _function(self, function: FunctionType) -> None:
        if not self._first(function):
            return
        self.atoms.append(function.__code__)
        cells = []
        for cell in function.__closure__ or ():
            try:
                cells.append(cell.cell_contents)
            except ValueError:  # the variable has no value yet
                continue
        if not is_users(home_of(function)):
            self._work += [cell for cell in cells if is_code(cell)]  # decorators of libraries
            return
        self._work += (*cells, function.__defaults__, function.__kwdefaults__)
        names = _names_in(function.__code__)
        self.found |= names
        self._work += [v for n, v in sorted(vars(function).items()) if n in self._names]
        space = function.__globals__
        for name in sorted(names):
            if name in space:
                self._work.append(space[name])
                continue
            for module in (name, f"{space.get('__package__')}.{name}"):  # imported inside
                if module in sys.modules and is_users(module):
                    self._work.append(sys.modules[module])

    def _object(self, value: Any) -> None:
        """What of an object is named: in itself, and in a class of a user's."""
        if not self._first(value):
            return
        kind = type(value)
        self.atoms.append(kind)
        held = vars(value) if hasattr(value, "__dict__") else {}
        if isinstance(value, nn.Module):
            if id(value) in self._tree and not is_own_kind(kind):
                return
            held = {n: v for n, v in held.items() if n not in MODULE_STATE} | value._modules
        there = {*held, *(name for base in kind.__mro__ for name in _slots(base))}
        every = self._names & _ANY_NAME and is_record(value)
        for name in sorted(there if every else there & self._names):
            self.atoms.append(name)
            self._work.append(held[name] if name in held else getattr(value, name, None))
        self._class(kind)

    def _class(self, kind: type) -> None:
        """What stands in a class of a user's and is named; special methods need no name."""
        for base in kind.__mro__:
            if not is_users(base.__module__):
                continue
            for name, item in class_items(base):
                special = name == "forward" or (name.startswith("__") and name not in _NEVER_RUN)
                special &= isinstance(item, FunctionType)
                if not (special or name in self._names or self._names & _ANY_NAME):
                    continue
                if self._first(base, name):
                    self._work.append(item.fget if isinstance(item, property) else item)


@functools.lru_cache(maxsize=4096)
def _names_in(code: CodeType) -> frozenset[str]:
    """The names in a function's code, and the strings that may be names."""
    found: set[str] = set()
    for inner in nested_code(code):
        found.update(inner.co_names)
        found.update(c for c in inner.co_consts if isinstance(c, str) and c.isidentifier())
    return frozenset(found)


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    private = kind.__name__.lstrip("_")
    return tuple(
        f"_{private}{n}" if n.startswith("__") and not n.endswith("__") else n for n in names
    )


def _place(value: Any) -> str:
    """Where a member of a set stands: what has an address in its repr, by its class."""
    return repr(value) if isinstance(value, (*_PLAIN, tuple)) else type(value).__qualname__


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic))


def atoms_of(roots: list[Root], modules: Iterable[nn.Module]) -> list[Any]:
    """All that code of a user's in a forward may read, see :class:`Reach`.

    Args:
        roots: Of :func:`own_roots`.
        modules: Of the model.
    """
    if not roots:
        return []
    tree = {id(module): module for module in modules}
    names: frozenset[str] = frozenset()
    while True:  # what is found may name more, of what was passed by
        reach = Reach(tree, names)
        reach.follow(roots)
        if reach.found <= names:
            return reach.atoms
        names |= reach.found
