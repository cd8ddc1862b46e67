"""Rules: a pattern, and a function that builds the replacement from a match or declines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass

from torch import fx

from .effects import written_memory
from .graph import inside, sweep
from .pattern import Match, Pattern, match


@dataclass(frozen=True)
class Rule:
    """Where ``pattern`` fits, ``build`` gives the node that stands for the match's root."""

    pattern: Pattern
    build: Callable[[fx.Graph, Match], fx.Node | None]


def safe_to_replace(found: Match, outputs: Iterable[fx.Node] = ()) -> bool:
    """Whether only the match's root (and ``outputs``) are used outside of the match."""
    members = set(found.nodes)
    free = {found.root, *outputs}
    return all(user in members for node in found.nodes if node not in free for user in node.users)


def reads_written(found: Match, written: Set[fx.Node]) -> bool:
    """Whether a match reads memory that is written in place: then its calls keep their order."""
    values = (*found.nodes, *found.bindings.values())
    return any(isinstance(value, fx.Node) and value in written for value in values)


def apply_rule(graph: fx.Graph, rule: Rule, *, within: str = "") -> int:
    """Rewrite every place in the module ``within`` where ``rule`` fits; returns how many.

    What else uses a node of a match keeps it: only the uses of the root are replaced.
    """
    count = 0
    written = written_memory(graph)
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or not inside(node, within) or node.graph is not graph:
            continue
        if not node.users:
            continue
        found = match(rule.pattern, node)
        if not found or reads_written(found, written):
            continue
        with graph.inserting_before(node):
            new = rule.build(graph, found)
        if new is None or new is node:
            continue
        node.replace_all_uses_with(new)
        count += 1
    if count:
        sweep(graph)
    return count
