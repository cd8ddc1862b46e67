"""Names and lines of one generated function: how a value and a call are spelled as source."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from keyword import iskeyword

import torch
from torch import fx

from .operators import operator_name

#: Names that the source uses for something else.
_RESERVED = frozenset(
    "op slice inf nan Ellipsis weights prepared errors keys values implementations shards".split()
)

#: Lines are broken behind commas at this width.
_WIDTH = 100


@dataclass
class Writer:
    """Names and lines of one function body; no value is called what a function is called."""

    names: dict[fx.Node, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    lines: list[str] = field(default_factory=list)
    functions: frozenset[str] = frozenset()

    def name(self, node: fx.Node, wish: str) -> str:
        base = re.sub(r"\W", "_", wish, flags=re.ASCII)
        base = re.sub(r"_\d+$", "", base) or "value"
        if base[0].isdigit() or base.startswith("_") or base in _RESERVED or iskeyword(base):
            base = f"x_{base}"
        name, number = base, 1
        while name in self.taken or name in self.functions:
            number += 1
            name = f"{base}_{number}"
        self.taken.add(name)
        self.names[node] = name
        return name

    def text(self) -> str:
        """The body, its long lines broken between arguments."""
        return "".join(f"{wrapped(line, '    ')}\n" for line in self.lines)

    def spell(self, value: object) -> str:
        """A value as source."""
        if isinstance(value, fx.Node):
            return self.names[value]
        if isinstance(value, tuple):
            inner = ", ".join(map(self.spell, value))
            return f"({inner},)" if len(value) == 1 else f"({inner})"
        if isinstance(value, list):
            return f"[{', '.join(map(self.spell, value))}]"
        if isinstance(value, slice):
            return f"slice({', '.join(map(self.spell, (value.start, value.stop, value.step)))})"
        if isinstance(value, torch.dtype):
            return f"op.{str(value).removeprefix('torch.')}"
        if isinstance(value, torch.device):
            return repr(str(value))
        if value is ...:
            return "..."
        if isinstance(value, torch.memory_format | torch.layout):
            return f"op.{str(value).removeprefix('torch.')}"
        if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
            return {"nan": "nan", "inf": "inf", "-inf": "-inf"}[str(value)]
        return repr(value)

    def call(self, node: fx.Node) -> str:
        args = [self.spell(arg) for arg in node.args]
        args += [f"{key}={self.spell(value)}" for key, value in node.kwargs.items()]
        return f"op.{operator_name(node.target)}({', '.join(args)})"

    def forget(self, done: Sequence[fx.Node], live: Callable[[fx.Node], bool]) -> None:
        """Drop names that nothing reads any more, so that memory goes back at once."""
        gone = [self.names[node] for node in dict.fromkeys(done) if not live(node)]
        if gone:
            self.lines.append(f"del {', '.join(gone)}")


def wrapped(line: str, indent: str = "") -> str:
    """``line`` indented and broken at ``, `` where it is longer than the width.

    A line that holds text beyond single words is left whole: a break must not fall inside it.
    """
    if len(indent) + len(line) <= _WIDTH or {"'", '"'} & set(re.sub(r"'\w+'", "", line)):
        return indent + line
    targets, equals, value = line.partition(" = ")
    if line.startswith("return ") and "(" not in line:
        line = f"return ({line.removeprefix('return ')})"
    elif equals and len(targets) > _WIDTH // 2:
        line = f"({targets}) = {value}"
    elif "(" not in line:
        return indent + line
    head, _, rest = line.partition("(")
    deeper, pieces = indent + "    ", rest.split(", ")
    rows = [f"{indent}{head}("]
    if len(rows[0]) + len(pieces[0]) < _WIDTH:
        rows[0] += pieces.pop(0)
    else:
        rows.append(deeper + pieces.pop(0))
    for piece in pieces:
        if len(rows[-1]) + len(piece) + 3 <= _WIDTH:
            rows[-1] += f", {piece}"
        else:
            rows[-1] += ","
            rows.append(deeper + piece)
    return "\n".join(rows)
