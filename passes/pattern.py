"""Patterns over a graph, as data, and the matcher.

A pattern is built of five pieces::

    Call("mul", Any("weight"), P, commutes=True)   a call of an operator
    Any("x")                                       any value; a name binds it
    Const("eps", float)                            a plain value of a type
    Either(P, Q)                                   the first that fits
    Opt("to", P)                                   P under a call, to(P, ...), or bare

The same name binds the same value everywhere in one match. A failed match is a value too: falsy,
with the node, what was expected and what stood there, taken from the attempt that got furthest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import permutations
from types import MappingProxyType
from typing import Any as Value

from torch import fx

from .graph import name_of, weight_name


class Pattern(ABC):
    """Base of the pieces; ``describe`` is what a failed match prints as expected."""

    @abstractmethod
    def describe(self) -> str: ...


@dataclass(frozen=True)
class Any(Pattern):
    """Any value; with ``node``, one that the graph computes or reads, no plain value."""

    name: str = ""
    node: bool = False

    def describe(self) -> str:
        return f"any {'node' if self.node else 'value'} {self.name}".strip()


@dataclass(frozen=True)
class Const(Pattern):
    """A plain value of one of ``types``; with ``equals``, that value."""

    name: str = ""
    types: type | tuple[type, ...] = (int, float, bool, str, type(None))
    equals: Value = ...

    def describe(self) -> str:
        return repr(self.equals) if self.equals is not ... else f"a constant {self.name}".strip()


@dataclass(frozen=True, init=False)
class Call(Pattern):
    """A call of ``operator`` (or one of several) whose leading arguments match ``args``.

    Arguments beyond ``args`` and ``named`` must be absent or ``None``, unless ``more`` is set.
    ``named`` are plain values given by name, ``users`` is the exact number of users, where it
    matters.
    """

    operators: tuple[str, ...]
    args: tuple[Pattern, ...]
    name: str
    commutes: bool
    more: bool
    users: int | None
    named: tuple[tuple[str, Value], ...]

    def __init__(
        self,
        operator: str | tuple[str, ...],
        *args: Pattern,
        name: str = "",
        commutes: bool = False,
        more: bool = False,
        users: int | None = None,
        named: Mapping[str, Value] = MappingProxyType({}),
    ) -> None:
        names = (operator,) if isinstance(operator, str) else operator
        values = (names, args, name, commutes, more, users, tuple(named.items()))
        for entry, value in zip(fields(self), values, strict=True):
            object.__setattr__(self, entry.name, value)

    def describe(self) -> str:
        users = "" if self.users is None else f" and {self.users} users"
        named = "".join(f", {name}={value!r}" for name, value in self.named)
        return " or ".join(self.operators) + f" with {len(self.args)} arguments{named}{users}"


@dataclass(frozen=True, init=False)
class Either(Pattern):
    """The first of several patterns that fits."""

    options: tuple[Pattern, ...]

    def __init__(self, *options: Pattern) -> None:
        object.__setattr__(self, "options", options)

    def describe(self) -> str:
        return "one of: " + "; ".join(option.describe() for option in self.options)


@dataclass(frozen=True)
class Opt(Pattern):
    """``inner`` as the first argument of ``operator``, or bare."""

    operator: str
    inner: Pattern

    def describe(self) -> str:
        return f"{self.inner.describe()}, maybe under {self.operator}"


@dataclass(frozen=True)
class Match:
    """A successful match: what each name stands for, and the calls that were matched."""

    root: fx.Node
    bindings: Mapping[str, Value]
    nodes: tuple[fx.Node, ...]

    def __getitem__(self, name: str) -> Value:
        return self.bindings[name]

    def get(self, name: str, default: Value = None) -> Value:
        return self.bindings.get(name, default)


@dataclass(frozen=True)
class NoMatch:
    """A failed match: falsy; ``str`` gives the reason in one line.

    ``depth`` is the number of calls that had matched when it failed: how far the attempt got.
    """

    node: str
    expected: str
    found: str
    depth: int = 0

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"at {self.node}: expected {self.expected}, found {self.found}"


@dataclass
class _Search:
    """One attempt: keeps the failure that got furthest."""

    depth: int = -1
    failure: NoMatch | None = None
    budget: int = 20_000

    def fail(self, depth: int, at: str, pattern: Pattern, value: object) -> None:
        if depth > self.depth:
            self.depth = depth
            self.failure = NoMatch(at, pattern.describe(), _found(value, pattern), depth)


def _found(value: object, pattern: Pattern | None = None) -> str:
    if not isinstance(value, fx.Node):
        return f"the value {value!r}"
    if value.op == "placeholder":
        return f"the weight {weight_name(value)}" if weight_name(value) else f"input {value.name}"
    name = name_of(value) or value.target
    if isinstance(pattern, Call) and name in pattern.operators:  # what else was in the way
        arguments = len(value.args) + len(value.kwargs)
        return f"{name} ({value.name}) with {arguments} arguments and {len(value.users)} users"
    return f"{name} ({value.name})"


_Taken = tuple[dict[str, Value], tuple[fx.Node, ...]]


def match(pattern: Pattern, node: fx.Node, *, budget: int = 20_000) -> Match | NoMatch:
    """Match ``pattern`` with ``node`` as its root, in at most ``budget`` steps."""
    search = _Search(budget=budget)
    for bindings, nodes in _try(pattern, node, {}, (), search, node.name):
        return Match(node, bindings, tuple(dict.fromkeys(nodes)))
    if search.budget < 0:
        return NoMatch(node.name, f"a match within {budget} steps", "more to try")
    assert search.failure is not None
    return search.failure


def _equal(a: Value, b: Value) -> bool:
    """Equality of plain values; unlike ``==``, it tells True from 1 and 1 from 1.0."""
    return not isinstance(a, fx.Node) and type(a) is type(b) and bool(a == b)


def _bind(name: str, value: Value, bound: dict[str, Value]) -> dict[str, Value] | None:
    if not name:
        return bound
    if name in bound:
        return bound if bound[name] is value or _equal(bound[name], value) else None
    return {**bound, name: value}


def _try(
    pattern: Pattern,
    value: Value,
    bound: dict[str, Value],
    nodes: tuple[fx.Node, ...],
    search: _Search,
    at: str,
) -> Iterator[_Taken]:
    """Yield every way ``pattern`` fits ``value``, given what is bound already."""
    search.budget -= 1
    if search.budget < 0:
        return
    if isinstance(pattern, Either):
        for option in pattern.options:
            yield from _try(option, value, bound, nodes, search, at)
        return
    if isinstance(pattern, Opt):
        if name_of(value) == pattern.operator:
            inner = value.args[0]
            yield from _try(pattern.inner, inner, bound, (*nodes, value), search, value.name)
        yield from _try(pattern.inner, value, bound, nodes, search, at)
        return
    if isinstance(pattern, Call):
        yield from _try_call(pattern, value, bound, nodes, search, at)
        return
    if isinstance(pattern, Const):
        if pattern.equals is ...:
            right = isinstance(value, pattern.types)
        else:
            numbers = {type(value), type(pattern.equals)} <= {int, float}
            right = (numbers and value == pattern.equals) or _equal(value, pattern.equals)
    else:
        right = isinstance(value, fx.Node) or not getattr(pattern, "node", False)
    taken = _bind(pattern.name, value, bound) if right else None  # type: ignore[attr-defined]
    if taken is None:
        search.fail(len(nodes), at, pattern, value)
        return
    yield taken, nodes


def _try_call(
    pattern: Call,
    value: Value,
    bound: dict[str, Value],
    nodes: tuple[fx.Node, ...],
    search: _Search,
    at: str,
) -> Iterator[_Taken]:
    taken = _bind(pattern.name, value, bound)
    right = name_of(value) in pattern.operators and taken is not None
    if right and pattern.users is not None:
        right = len(value.users) == pattern.users
    if right:
        named = dict(pattern.named)
        others = (extra for key, extra in value.kwargs.items() if key not in named)
        surplus = (*value.args[len(pattern.args) :], *others)
        right = len(value.args) >= len(pattern.args) and (
            pattern.more or all(extra is None for extra in surplus)
        )
        right = right and all(
            _equal(value.kwargs.get(key, ...), given) for key, given in named.items()
        )
    if not right or taken is None:
        search.fail(len(nodes), at, pattern, value)
        return
    count = len(pattern.args)
    orders = permutations(range(count)) if pattern.commutes else [tuple(range(count))]
    for order in orders:
        yield from _try_args(pattern, value, order, taken, (*nodes, value), search)


def _try_args(
    pattern: Call,
    value: fx.Node,
    order: tuple[int, ...],
    bound: dict[str, Value],
    nodes: tuple[fx.Node, ...],
    search: _Search,
    index: int = 0,
) -> Iterator[_Taken]:
    if index == len(order):
        yield bound, nodes
        return
    piece, arg = pattern.args[index], value.args[order[index]]
    for taken, seen in _try(piece, arg, bound, nodes, search, value.name):
        yield from _try_args(pattern, value, order, taken, seen, search, index + 1)
