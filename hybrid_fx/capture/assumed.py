"""The seam to what Dynamo assumes and leaves out of a graph, read while it hands the graph over.

A branch on a size becomes a condition on its symbol; what the code writes into Python objects
would be done by code around the graph, which is not kept. Tried on torch 2.11 and 2.13.
"""

from __future__ import annotations

import re
from typing import Any

from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import TracingContext

#: Where a forward of transformers leaves something that no later call reads.
_NO_MATTER = ("transformers", "torch")


def conditions() -> tuple[str, ...]:
    """What the traced code asked of a size, beside that inputs of one call are alike."""
    mode = TracingContext.get().fake_mode
    sizes = None if mode is None else mode.shape_env
    if sizes is None:
        return ()
    return tuple(str(guard.expr) for guard in sizes.guards if not _holds(sizes, guard.expr))


def decides(sizes: Any, condition: Any) -> bool:
    """Whether a condition asked in the middle of a trace stays one to its end.

    What holds where the inputs of one call are alike does not: the trace may still come to where
    it finds that they are. Sizes of a value are taken as alike; without upstream's table of
    values, nothing is said to decide.

    Args:
        sizes: The ``ShapeEnv`` of the trace.
        condition: One of its guards, an expression of sympy.
    """
    if _holds(sizes, condition):
        return False
    values = getattr(sizes, "backed_var_to_val", {})
    if any(symbol not in values for symbol in condition.free_symbols):
        return False
    first: dict[Any, Any] = {}
    for symbol in sorted(condition.free_symbols, key=str):
        first.setdefault(values[symbol], symbol)
    alike = {symbol: first[values[symbol]] for symbol in condition.free_symbols}
    return not _holds(sizes, condition.xreplace(alike))


def _holds(sizes: Any, condition: Any) -> bool:
    """Whether it holds of all sizes, by what the trace has found of them."""
    return str(sizes.simplify(condition)) == "True"


def writes() -> tuple[str, ...]:
    """The Python objects, by how they are reached, that the traced code changes at each call."""
    effects = InstructionTranslator.current_tx().output.side_effects
    changed = [v for v in effects.id_to_variable.values() if effects.is_modified(v)]
    sources = (source for v in changed if (source := getattr(v, "source", None)) is not None)
    return tuple(name for name in map(_name, sources) if not _is_library(name))


def _name(source: Any) -> str:
    """As a reader writes it: ``model.layers.0`` for what Dynamo reaches through dictionaries."""
    name = str(source.name() if callable(source.name) else source.name)
    name = re.sub(r"(_hooks)\[list\(dict\.keys\(.*?\)\)\[(\d+)\]\]", r"\1[\2]", name)
    return re.sub(r"\._modules\['(\w+)'\]", r".\1", name)


def _is_library(name: str) -> bool:
    # As Dynamo names an imported module: G['__import_transformers_dot_models'].
    return any(re.match(rf"G\['__import_{one}(_dot_|'\])", name) for one in _NO_MATTER)
