"""What a generated source may contain. Anything else is refused before a line of it runs.

A plan read from the disk is text that somebody wrote, so its syntax tree is held against this
list, and what is compiled afterwards is the very tree that was checked:

    module      a docstring, then functions; each name once, plain positional parameters
    statement   name = expr      a, b = expr      del a, b      return expr      a call
    expr        a bound name, inf, nan, Ellipsis, a constant, -number, -name, (…), […],
                {constant: …}, name[1], name[1][2], op.<torch constant>, a call
    call        op.<operator>(expr, *name[1], key=expr)      slice(expr, …)
                <a function defined above>(expr, *name[1])

There is no loop, no branch and no way to call anything but the operator table, and a function
calls only functions above it: the number of calls is known without running them, and bounded.
"""

from __future__ import annotations

import ast
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import EllipsisType, MappingProxyType, NoneType
from typing import NoReturn

import torch

from ..errors import CacheError

#: Held while trees are made and compiled: CPython 3.11 counts the depth of those of all threads in
#: one place, and fails where they mix.
PARSING = threading.Lock()

MAX_CHARACTERS = 2**23
"""Longest accepted source. A shared layer needs some 10 KB; 80 unshared ones about 1.5 MB."""
MAX_CALLS = 4_000_000
"""Most operator calls of one function; 61 layers of 256 unrolled experts make 0.3 million."""
MAX_DEPTH = 40
"""Deepest nesting of one expression."""
_VALUE_NAMES = frozenset({"inf", "nan", "Ellipsis"})
RESERVED = frozenset({"op", "slice"}) | _VALUE_NAMES
"""Names a source finds in its namespace and may not bind."""

_CONSTANT_TYPES = (torch.dtype, torch.memory_format, torch.layout)
TORCH_CONSTANTS: Mapping[str, object] = MappingProxyType(
    {
        str(value).removeprefix("torch."): value
        for value in vars(torch).values()
        if isinstance(value, _CONSTANT_TYPES) and not str(value).startswith("torch._")
    }
)
"""``op.float32``, ``op.bool``, ``op.contiguous_format``, ``op.strided``: canonical name to value.

Aliases (``torch.float``, ``torch.long``) are left out: those names belong to operators."""

_LITERALS = (NoneType, bool, int, float, str, EllipsisType)


@dataclass(frozen=True, slots=True)
class _Function:
    """A checked function: how many arguments it takes, how many calls one run of it makes."""

    arity: int
    calls: int


def check_source(source: str, operator_names: Collection[str]) -> ast.Module:
    """Return the syntax tree of ``source`` after holding all of it against the grammar above.

    Args:
        source: text of a generated module.
        operator_names: what may be called as ``op.<name>``.

    Raises:
        CacheError: naming the line and the construct, for anything the grammar does not hold.
    """
    if len(source) > MAX_CHARACTERS:
        raise CacheError(
            f"generated source of {len(source)} characters is refused; the limit is "
            f"{MAX_CHARACTERS}; capture the model again"
        )
    try:
        with PARSING:
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or 0
        raise CacheError(
            f"generated source, line {line}: not readable as Python ({error})"
        ) from None
    body = tree.body[1:] if tree.body and _is_text(tree.body[0]) else tree.body
    if not body:
        raise CacheError("generated source, line 1: no function is defined")
    named = frozenset(node.name for node in body if isinstance(node, ast.FunctionDef))
    operators = frozenset(operator_names)
    above: dict[str, _Function] = {}
    for node in body:
        if not isinstance(node, ast.FunctionDef):
            _refuse(node, f"{_kind(node)} outside a function")
        if node.name in above:
            _refuse(node, f"function {node.name!r} is defined twice")
        above[node.name] = _check_function(node, operators, named, above)
    return tree


def _check_function(
    node: ast.FunctionDef,
    operators: frozenset[str],
    named: frozenset[str],
    above: Mapping[str, _Function],
) -> _Function:
    _check_name(node, node.name)
    if node.decorator_list:
        _refuse(node, f"a decorator on {node.name!r}")
    if node.returns is not None or getattr(node, "type_params", None):
        _refuse(node, f"an annotation on {node.name!r}")
    given = node.args
    if given.posonlyargs or given.kwonlyargs or given.vararg or given.kwarg or given.defaults:
        _refuse(node, f"parameters of {node.name!r} that are not plain positional ones")
    body = _Body(operators=operators, named=named, above=above)
    for argument in given.args:
        if argument.annotation is not None:
            _refuse(argument, f"an annotation on {argument.arg!r}")
        if argument.arg in body.bound:
            _refuse(argument, f"parameter {argument.arg!r} twice")
        body.bind(argument, argument.arg)
    for statement in node.body[1:] if _is_text(node.body[0]) else node.body:
        body.statement(statement)
    if body.calls > MAX_CALLS:
        _refuse(node, f"{body.calls} calls in one run of {node.name!r}, above {MAX_CALLS},")
    return _Function(arity=len(given.args), calls=body.calls)


@dataclass(slots=True)
class _Body:
    """Walks one function from the first statement to the last, as it would run."""

    operators: frozenset[str]
    named: frozenset[str]
    above: Mapping[str, _Function]
    bound: set[str] = field(default_factory=set)
    calls: int = 0

    def bind(self, node: ast.AST, name: str) -> None:
        _check_name(node, name)
        if name in self.named:
            _refuse(node, f"binding {name!r}, which is a function,")
        self.bound.add(name)

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                self.expression(value)
                self.bind(node, name)
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=value) if targets:
                self.expression(value)
                for target in targets:
                    if not isinstance(target, ast.Name):
                        _refuse(target, f"{_kind(target)} as a target")
                    self.bind(target, target.id)
            case ast.Delete(targets=targets):
                for target in targets:
                    if not isinstance(target, ast.Name):
                        _refuse(target, f"{_kind(target)} as a target")
                    self.variable(target)
                    self.bound.discard(target.id)
            case ast.Return(value=ast.expr() as value):
                self.expression(value)
            case ast.Expr(value=ast.Call() as value):
                self.expression(value)
            case ast.Assign(targets=targets):
                _refuse(node, f"assignment to {', '.join(map(_kind, targets))}")
            case _:
                _refuse(node, f"{_kind(node)} as a statement")

    def expression(self, node: ast.expr, depth: int = 0) -> None:
        if depth > MAX_DEPTH:
            _refuse(node, f"an expression nested deeper than {MAX_DEPTH}")
        match node:
            case ast.Name():
                self.name(node)
            case ast.Constant(value=value):
                _check_constant(node, value)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Name() as operand):
                self.name(operand)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)):
                if type(value) not in (int, float):
                    _refuse(node, f"minus {value!r}")
                _check_constant(node, value)
            case ast.Tuple(elts=items) | ast.List(elts=items):
                for item in items:
                    self.expression(item, depth + 1)
            case ast.Dict(keys=keys, values=values):
                for key, entry in zip(keys, values, strict=True):
                    if not isinstance(key, ast.Constant):
                        _refuse(node, "a dict key that is not a constant")
                    _check_constant(key, key.value)
                    self.expression(entry, depth + 1)
            case ast.Subscript():
                self.subscript(node)
            case ast.Attribute(value=ast.Name(id="op"), attr=name):
                if name not in TORCH_CONSTANTS:
                    _refuse(node, f"op.{name} as a value")
            case ast.Attribute(attr=name):
                _refuse(node, f"attribute {name!r}")
            case ast.Call():
                self.call(node, depth)
            case _:
                _refuse(node, _kind(node))

    def name(self, node: ast.Name) -> None:
        if node.id not in _VALUE_NAMES:
            self.variable(node)

    def variable(self, node: ast.Name) -> None:
        if node.id not in self.bound:
            _refuse(node, f"{node.id!r} used as a value where it is not a bound variable")

    def subscript(self, node: ast.Subscript) -> None:
        """``name[1]`` or ``name[1][2]``."""
        inner = node.value if isinstance(node.value, ast.Subscript) else node
        for index in (inner.slice, node.slice):
            if not isinstance(index, ast.Constant) or type(index.value) is not int:
                _refuse(index, "an index that is not a plain int")
            _check_constant(index, index.value)
        if not isinstance(inner.value, ast.Name):
            _refuse(node, f"an index into {_kind(inner.value)}")
        self.variable(inner.value)

    def call(self, node: ast.Call, depth: int) -> None:
        starred = [arg for arg in node.args if isinstance(arg, ast.Starred)]
        match node.func:
            case ast.Attribute(value=ast.Name(id="op"), attr=name):
                if name not in self.operators or name.startswith("__"):
                    _refuse(node, f"op.{name}, which is no operator,")
                self.calls += 1
            case ast.Name(id="slice"):
                if starred or node.keywords or not 1 <= len(node.args) <= 3:
                    _refuse(node, "slice() without one to three plain arguments")
            case ast.Name(id=name) if name in self.above:
                function = self.above[name]
                if node.keywords:
                    _refuse(node, f"{name}() with keywords")
                if not starred and len(node.args) != function.arity:
                    _refuse(node, f"{name}() with {len(node.args)} of {function.arity} arguments")
                self.calls += function.calls + 1
            case ast.Name(id=name):
                _refuse(node, f"a call of {name!r}, which is not a function defined above,")
            case callee:
                _refuse(node, f"a call of {_kind(callee)}")
        for argument in node.args:
            if isinstance(argument, ast.Starred):
                argument = argument.value
                if not isinstance(argument, ast.Name | ast.Subscript):
                    _refuse(argument, f"a star before {_kind(argument)}")
            self.expression(argument, depth + 1)
        seen: set[str] = set()
        for keyword in node.keywords:
            if keyword.arg is None or keyword.arg in seen or keyword.arg.startswith("__"):
                _refuse(keyword, f"keyword argument {keyword.arg or '**'!r}")
            seen.add(keyword.arg)
            self.expression(keyword.value, depth + 1)


def _check_name(node: ast.AST, name: str) -> None:
    if name in RESERVED:
        _refuse(node, f"binding {name!r}, which is reserved,")
    if name.startswith("__") or not name.isascii():
        _refuse(node, f"the name {name!r}")


def _check_constant(node: ast.AST, value: object) -> None:
    if type(value) not in _LITERALS:
        _refuse(node, f"a constant of type {type(value).__name__}")
    if isinstance(value, int) and value > 2**63:
        _refuse(node, "an int beyond 64 bits")


def _is_text(node: ast.stmt) -> bool:
    """A docstring."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _kind(node: ast.AST) -> str:
    return type(node).__name__


def _refuse(node: ast.AST, what: str) -> NoReturn:
    line = getattr(node, "lineno", 0)
    raise CacheError(f"generated source, line {line}: {what} is not in the grammar")
