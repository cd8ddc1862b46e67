"""Cuts of an axis among ranks, and calls put together from the parts that a rank has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx


@dataclass(frozen=True)
class Cut:
    """The places ``start`` to ``start + length`` of an axis, shared among ranks in whole units."""

    axis: int
    unit: int
    start: int
    length: int

    def scaled(self, axis: int, by: int) -> Cut:
        """The same cut of an axis on which each place is ``by`` places."""
        return Cut(axis, self.unit * by, self.start * by, self.length * by)


@dataclass(frozen=True)
class Part:
    """The value that a rank has of ``of``."""

    of: fx.Node
    cut: Cut


@dataclass(frozen=True)
class Recipe:
    """A call whose arguments hold :class:`Part` where a slice is to stand."""

    operator: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def parts_of(value: Any) -> list[Part]:
    """Every part in the arguments of a recipe."""
    if isinstance(value, Part):
        return [value]
    if isinstance(value, Recipe):
        return parts_of(value.args) + parts_of(list(value.kwargs.values()))
    return [p for item in value for p in parts_of(item)] if isinstance(value, tuple | list) else []


def filled(value: Any, make: Callable[[fx.Node, Cut], fx.Node]) -> Any:
    """Arguments with each part replaced by the slice it asks for."""
    if isinstance(value, Part):
        return make(value.of, value.cut)
    if isinstance(value, dict):
        return {key: filled(item, make) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(filled(item, make) for item in value)
    return value
