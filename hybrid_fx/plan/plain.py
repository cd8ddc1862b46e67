"""Strict checks for records that travel as JSON. Anything odd is a CacheError naming the field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NoReturn, TypeAlias

from ..errors import CacheError

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

MAX_DEPTH = 32
"""Deepest nesting of a JSON value."""


def odd(record: object, name: str, wanted: str) -> NoReturn:
    """Refuse field ``name`` of ``record``."""
    value = getattr(record, name)
    raise CacheError(f"{type(record).__name__}.{name}={value!r:.80} must be {wanted}")


def need_text(record: object, *names: str) -> None:
    for name in names:
        if type(getattr(record, name)) is not str:
            odd(record, name, "a str")


def need_bool(record: object, name: str) -> None:
    if type(getattr(record, name)) is not bool:
        odd(record, name, "a bool")


def need_positive(record: object, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if type(value) is not int or value < 1:
            odd(record, name, "a positive int")


def set_shape(record: object, name: str = "shape") -> None:
    """Turn the shape (a tuple, a ``torch.Size``, a list) into a tuple of plain ints."""
    value = set_tuple(record, name)
    if not all(type(size) is int and size >= 0 for size in value):
        odd(record, name, "a tuple of ints, none negative")


def set_tuple(record: object, name: str, kind: type | None = None) -> tuple[Any, ...]:
    """Turn a list or tuple field of a frozen record into a tuple, of ``kind`` if given."""
    value = getattr(record, name)
    if not isinstance(value, tuple | list):
        odd(record, name, "a tuple")
    if kind is not None and not all(type(entry) is kind for entry in value):
        odd(record, name, f"a tuple of {kind.__name__}")
    object.__setattr__(record, name, tuple(value))
    return tuple(value)


def plain(value: object, where: str, depth: int = 0) -> JSON:
    """Return a copy of ``value`` in plain JSON values; tuples become lists.

    Raises:
        CacheError: for what JSON cannot give back as it was: another type, a key that is not a
            str, a float that is not finite, an int beyond 64 bits, or nesting beyond
            :data:`MAX_DEPTH`.
    """
    if depth > MAX_DEPTH:
        raise CacheError(f"{where} is nested deeper than {MAX_DEPTH}")
    if value is None or type(value) in (bool, str):
        return value  # type: ignore[return-value]
    if type(value) is int and abs(value) < 2**64:
        return value
    if type(value) is float and math.isfinite(value):
        return value
    if type(value) in (list, tuple):
        return [plain(entry, where, depth + 1) for entry in value]  # type: ignore[attr-defined]
    if isinstance(value, Mapping):
        if not all(type(key) is str for key in value):
            raise CacheError(f"{where} holds a key that is not a str: {list(value)!r:.80}")
        return {key: plain(entry, where, depth + 1) for key, entry in value.items()}
    raise CacheError(f"{where} holds {value!r:.80} of type {type(value).__name__}, no JSON value")


def record_fields(kind: type, value: object) -> dict[str, Any]:
    """Return ``value`` as constructor arguments of dataclass ``kind``: its fields, no others."""
    names = {entry.name for entry in fields(kind)}
    if type(value) is not dict:
        raise CacheError(f"{kind.__name__}: {value!r:.80} must be an object")
    if wrong := names ^ set(value):
        raise CacheError(
            f"{kind.__name__}: missing or unknown fields {sorted(map(str, wrong))!r:.80}"
        )
    return dict(value)
