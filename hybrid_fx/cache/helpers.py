"""The Python around a model's classes: files, and the functions and constants they use.

A forward calls functions of its modelling file, such as ``apply_rotary_pos_emb``. They change with
the file, and they change when someone patches the module in memory; both are read here.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import fields
from types import CodeType, FunctionType, MethodType
from typing import Any

from .fingerprint import (
    Fingerprints,
    class_items,
    is_frozen_data,
    nested_code,
    reference,
    sha256,
    text,
)
from .users import is_by_version

# What transformers 5.17 notes of each model class it builds, in a plain dict: which outputs can be
# asked for. Later ones have a class for it.
_REGISTRIES = frozenset({("transformers.utils.output_capturing", "_CAN_RECORD_REGISTRY")})

_CONSTANTS = frozenset(
    (type(None), bool, int, float, str, list, tuple, dict, set, frozenset, OrderedDict, defaultdict)
)


def functions_in(value: Any, seen: set[int] | None = None) -> Iterator[FunctionType]:
    """The Python functions that calling (or reading) ``value`` may run, decorated ones too."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    inside: list[Any] = []
    if isinstance(value, FunctionType):
        yield value
        for cell in value.__closure__ or ():
            try:
                inside.append(cell.cell_contents)
            except ValueError:  # the variable has no value yet
                continue
    elif isinstance(value, MethodType | classmethod | staticmethod):
        inside.append(value.__func__)
    elif isinstance(value, property):
        inside += [value.fget, value.fset]
    elif isinstance(value, functools.partial | functools.partialmethod | functools.cached_property):
        inside.append(value.func)
    elif is_frozen_data(value):
        inside += [getattr(value, entry.name) for entry in fields(value)]
    elif isinstance(value, tuple | list):
        inside += [item for item in value if is_frozen_data(item)]
    elif hasattr(value, "__wrapped__") and not isinstance(value, type):
        inside.append(value.__wrapped__)
    elif callable(value) and not isinstance(value, type):
        inside += [vars(kind).get("__call__") for kind in type(value).__mro__]
    for item in inside:
        if item is not None:
            yield from functions_in(item, seen)


def class_functions(kind: type) -> Iterator[FunctionType]:
    """The Python functions that stand in ``kind`` itself."""
    for _, value in class_items(kind):
        if isinstance(value, FunctionType | property | classmethod | staticmethod) or hasattr(
            value, "__wrapped__"
        ):
            yield from functions_in(value)


@functools.lru_cache(maxsize=4096)
def _file_digest(path: str, modified_ns: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digest(path: str | None) -> str:
    """sha256 of a source file's bytes, "" where there is no file. Read again when it changed."""
    try:
        if path is None:
            return ""
        status = os.stat(path)
        return _file_digest(path, status.st_mtime_ns, status.st_size)
    except OSError:
        return ""


def _used(space: dict[str, Any], roots: Iterable[CodeType]) -> dict[str, Any]:
    """The globals of one Python module that ``roots`` use, directly or through its functions."""
    found: dict[str, Any] = {}
    work = deque(roots)
    while work:
        for code in nested_code(work.popleft()):
            for name in code.co_names:
                if name in found or name not in space:
                    continue
                found[name] = value = space[name]
                if isinstance(value, type):
                    inner = (
                        class_functions(value) if value.__module__ == space.get("__name__") else ()
                    )
                else:
                    inner = functions_in(value) if _holds_functions(value) else ()
                work.extend(f.__code__ for f in inner if f.__globals__ is space)
    return found


def _holds_functions(value: Any) -> bool:
    """Functions, and the rules or passes that hold some: what a name may stand for."""
    some = value[0] if isinstance(value, tuple | list) and value else value
    return isinstance(some, FunctionType) or is_frozen_data(some)


def _told(value: Any, prints: Fingerprints, module_name: str) -> Any:
    if isinstance(value, type):
        own = value.__module__ == module_name
        return {"class": [reference(value), prints.one_class(value) if own else ""]}
    if isinstance(value, FunctionType | functools.partial) or hasattr(value, "__wrapped__"):
        return prints.value(value)
    if is_frozen_data(value):
        return prints.value(value)
    # Constants only: a registry (often a dict of a class of its own) fills up with every model that
    # the process builds, and its state is not code.
    if type(value) in _CONSTANTS:
        return prints.value(value)
    return {"object": reference(type(value))}


def helper_modules(
    functions: Iterable[FunctionType], prints: Fingerprints
) -> tuple[tuple[str, str, str], ...]:
    """(module, digest of its file, digest of what is used of it now) around ``functions``."""
    roots: dict[int, list[FunctionType]] = {}
    for function in functions:
        if not is_by_version(str(function.__globals__.get("__name__", ""))):
            roots.setdefault(id(function.__globals__), []).append(function)
    result = []
    for group in roots.values():
        space = group[0].__globals__
        name = str(space.get("__name__", ""))
        used = _used(space, (function.__code__ for function in group))
        keys = sorted(key for key in used if (name, key) not in _REGISTRIES)
        live = [(key, _told(used[key], prints, name)) for key in keys]
        result.append((name, file_digest(space.get("__file__")), sha256(text(live))))
    return tuple(sorted(result))
