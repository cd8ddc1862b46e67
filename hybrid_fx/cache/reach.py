"""What code of a user's may read when it runs: all that it names.

A function reads its closure, its defaults, and the globals and attributes whose names stand in its
byte code. From there on this follows functions, classes, objects and containers of a user's
wherever they lie; of a library's it takes the name alone, as their versions stand for them.
Key and stamp read the same list, so that what one follows the other follows.
"""

from __future__ import annotations

import enum
import functools
import sys
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
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
from .helpers import functions_in
from .tree import (
    MODULE_STATE,
    View,
    global_hooks,
    is_code,
    is_ours,
    own_attributes,
    own_hooks,
    walk,
)
from .users import is_record, is_users

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_TORCH_VALUES = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_SEQUENCES = (list, tuple, set, frozenset, deque)

# Where these are named, any attribute may be read.
_ANY_NAME = frozenset(("getattr", "vars", "__dict__", "globals", "eval", "exec", "asdict"))

#: Values that the code of one model may read; more of them are data, and not followed one by one.
MOST = 100_000

#: A user's callable, or a module of a user's class whose ``forward`` runs.
Root = Any


def own_roots(model: nn.Module, view: View | None = None) -> list[Root]:
    """Where a forward of ``model`` enters code of a user's, in an order that two processes share.

    Hooks, what can be called in a module's own ``__dict__``, forwards of own classes, and what a
    user put into the classes and Python modules of libraries.
    """
    view = view or View()
    modules = [module for _, module in walk(model)]
    called = [hook for kind, hook in global_hooks() if "forward" in kind]
    for module in modules:
        hooks = (hook for kind, hook in own_hooks(module) if "forward" in kind)
        called += [hook for hook in hooks if not view.foreign_hook(hook)]
        own = own_attributes(module)
        called += [v for name, v in own if is_code(v) and not view.foreign_attribute(name)]
    return roots_among(modules, called)


def roots_among(modules: Iterable[nn.Module], called: Iterable[Any]) -> list[Root]:
    """See :func:`own_roots`.

    Args:
        called: Hooks and what can be called in a module's own ``__dict__``.
    """
    own: dict[type, bool] = {}
    roots: list[Root] = []
    for module in modules:
        kind = type(module)
        if kind not in own:
            own[kind] = is_own_kind(kind)
        if own[kind]:
            roots.append(module)
    roots += [value for value in called if _is_own(value)]
    return roots + list(_patched(own))


def is_own_kind(kind: type) -> bool:
    """Whether a class, or one that it is made from, is a user's."""
    return any(is_users(base.__module__) for base in kind.__mro__)


def _is_own(value: Any) -> bool:
    return not is_ours(value) and any(is_users(_home(f)) for f in functions_in(value))


def _home(function: FunctionType) -> str:
    return str(function.__globals__.get("__name__", ""))


def _patched(kinds: Iterable[type]) -> Iterator[FunctionType]:
    """Functions of a user's in the classes of libraries, and in the files that these stand in."""
    kinds = [kind for kind in kinds if not is_users(kind.__module__)]
    bases = dict.fromkeys(base for kind in kinds for base in kind.__mro__ if base is not object)
    places: list[tuple[str, Mapping[str, Any]]] = [
        (base.__module__, vars(base)) for base in bases if not is_users(base.__module__)
    ]
    files = dict.fromkeys(kind.__module__ for kind in kinds)
    places += [(name, vars(sys.modules[name])) for name in files if name in sys.modules]
    for name, there in places:
        home = vars(sys.modules[name]) if name in sys.modules else {}
        for value in list(there.values()):
            if type(value) is FunctionType:
                if value.__globals__ is not home or value.__closure__:
                    yield from (f for f in functions_in(value) if _is_own(f))
            elif isinstance(value, property | classmethod | staticmethod):
                yield from (f for f in functions_in(value) if _is_own(f))


class Reach:
    """One reading; :attr:`atoms` are plain values, code objects and classes, in order.

    Args:
        tree: The modules of the model: their own attributes are read elsewhere.
        names: What the code names, as far as it is known; :attr:`found` is what this reading saw.
    """

    def __init__(self, tree: Collection[int], names: frozenset[str]) -> None:
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
        elif hasattr(value, "__array_interface__"):  # numpy's: a trace takes what they hold
            self.atoms += (value.dtype.str, value.shape, value.tobytes())
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
            self._work += sorted(value, key=repr) if isinstance(value, set | frozenset) else value

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
        if not is_users(_home(function)):
            self._work += [cell for cell in cells if is_code(cell)]  # decorators of libraries
            return
        self._work += (*cells, function.__defaults__, function.__kwdefaults__)
        names = _names_in(function.__code__)
        self.found |= names
        space = function.__globals__
        for name in sorted(names):
            if name in space:
                self._work.append(space[name])
            elif name in sys.modules and is_users(name):  # imported inside
                self._work.append(sys.modules[name])

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
                special = isinstance(item, FunctionType) and (
                    name == "forward" or name.startswith("__")
                )
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
    return (slots,) if isinstance(slots, str) else tuple(slots)


def atoms_of(roots: list[Root], modules: Iterable[nn.Module]) -> list[Any]:
    """All that code of a user's in a forward may read, see :class:`Reach`.

    Args:
        roots: Of :func:`own_roots`.
        modules: Of the model.
    """
    if not roots:
        return []
    tree = {id(module) for module in modules}
    names: frozenset[str] = frozenset()
    while True:  # what is found may name more, of what was passed by
        reach = Reach(tree, names)
        reach.follow(roots)
        if reach.found <= names:
            return reach.atoms
        names |= reach.found
