"""What a legal graph is, as rules that are checked after every pass.

A rule takes a node and returns a complaint, or ``None``. The stages differ in one thing: the
captured graph holds ``attention``, a threaded graph ``attend``; :data:`THREADED` adds that rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from .effects import bases
from .graph import name_of
from .operators import IN_PLACE, operator_name
from .show import neighbourhood

Rule = Callable[[fx.Node], str | None]


class IllegalGraphError(ValueError):
    """A graph breaks the specification.

    The first line of the message names the pass, the node and its place, and what is wrong; the
    lines below it show the graph around the node.
    """


def known_kind(node: fx.Node) -> str | None:
    """Only placeholders, calls of functions and the output."""
    if node.op not in ("placeholder", "call_function", "output"):
        return f"a {node.op} node is not legal; calls must be functions of the operator table"
    return None


def known_operator(node: fx.Node) -> str | None:
    """Every call is of the operator table."""
    if node.op == "call_function" and operator_name(node.target) is None:
        return f"{node.target} is not in the operator table"
    return None


def bound_placeholder(node: fx.Node) -> str | None:
    """A placeholder says what it stands for."""
    if node.op == "placeholder" and not {"weight", "input", "prepared"} & node.meta.keys():
        return "the placeholder stands for no weight, prepared tensor or input"
    return None


def placed(node: fx.Node) -> str | None:
    """Every call says in which module it stands."""
    if node.op == "call_function" and "path" not in node.meta:
        return "the node has no module path"
    return None


def plain_arguments(node: fx.Node) -> str | None:
    """Constants are of the kinds that generated source can spell."""
    plain = (str, int, float, bool, type(None), type(...), torch.dtype, torch.device, fx.Node)
    memory = (torch.layout, torch.memory_format)

    def check(value: object) -> str | None:
        if isinstance(value, tuple | list):
            return next((c for c in map(check, value) if c), None)
        if isinstance(value, slice):
            return check((value.start, value.stop, value.step))
        if isinstance(value, plain) or isinstance(value, memory):
            return None
        return f"an argument of type {type(value).__name__} cannot be written as source"

    return check((*node.args, *node.kwargs.values())) if node.op == "call_function" else None


def weights_unwritten(node: fx.Node) -> str | None:
    """No in-place operator writes a parameter, or a view of one."""
    if name_of(node) in IN_PLACE and isinstance(node.args[0], fx.Node):
        for base in bases(node.args[0]):
            if base.meta.get("parameter"):
                return f"it writes the parameter {base.meta.get('weight')}"
    return None


def no_hidden_write(node: fx.Node) -> str | None:
    """What writes says so in its name, not in a keyword."""
    if node.kwargs.get("inplace") or node.kwargs.get("out") is not None:
        keyword = "inplace" if node.kwargs.get("inplace") else "out"
        return f"the keyword {keyword} makes {name_of(node)} write into memory of others"
    return None


def attends(node: fx.Node) -> str | None:
    """No attention without the workspace is left."""
    if name_of(node) == "attention":
        return "this attention was not threaded through the workspace; a decode would not see it"
    return None


def known_addition(node: fx.Node) -> str | None:
    """What a pass added to a working copy is a call of the operator table."""
    return None if "origin" in node.meta else known_kind(node) or known_operator(node)


RULES: tuple[Rule, ...] = (
    known_kind,
    known_operator,
    bound_placeholder,
    placed,
    plain_arguments,
    weights_unwritten,
    no_hidden_write,
)

#: The rules of a prefill or decode graph.
THREADED: tuple[Rule, ...] = (*RULES, attends)

#: The rules of a graph that Dynamo handed over: what the table lacks may stand in it.
PARTIAL: tuple[Rule, ...] = (known_addition, bound_placeholder, placed)


def check_graph(graph: fx.Graph, *, stage: str, rules: Sequence[Rule] = RULES) -> None:
    """Check every node of a graph.

    Raises:
        IllegalGraphError: naming ``stage``, the node and what is wrong, with its neighbours.
    """
    before: set[fx.Node] = set()
    for node in graph.nodes:
        for source in node.all_input_nodes:
            if source not in before:
                raise refused(stage, node, f"it reads {source.name} {_too_early(node, source)}")
        before.add(node)
        for rule in rules:
            if complaint := rule(node):
                raise refused(stage, node, complaint)
    try:
        graph.lint()
    except RuntimeError as error:
        raise IllegalGraphError(f"after {stage}: {str(error).splitlines()[0]}") from error


def _too_early(node: fx.Node, source: fx.Node) -> str:
    there = source.graph is node.graph and any(n is source for n in node.graph.nodes)
    return "before it has been defined" if there else "which is not a node of this graph"


def refused(stage: str, node: fx.Node, complaint: str) -> IllegalGraphError:
    """The error that says what is wrong with a node behind the pass ``stage``, and shows it."""
    return IllegalGraphError(
        f"after {stage}: node {node.name} in {node.meta.get('path', '?')!r}: {complaint}\n"
        f"{neighbourhood(node)}"
    )
