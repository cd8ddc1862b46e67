"""Rules, passes and the driver that runs a pipeline of them.

A *rule* is a pattern and a function that builds the replacement from a match, or declines with
``None``. A *pass* is a named function ``(graph, context) -> PassResult``. A *pipeline* is an
ordered tuple of passes; the specification is checked behind each one.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from .functionalize import written_memory
from .graph import inside, name_of, sweep
from .pattern import Match, NoMatch, Pattern, match
from .spec import check_graph

logger = logging.getLogger("hybrid_fx")


@dataclass(frozen=True)
class Rule:
    """Where ``pattern`` fits, ``build`` gives the node that stands for the match's root."""

    pattern: Pattern
    build: Callable[[fx.Graph, Match], fx.Node | None]


@dataclass(frozen=True)
class PassResult:
    """What one pass did: how many places it rewrote, and where it declined and why."""

    count: int
    misses: tuple[tuple[str, NoMatch], ...] = ()


@dataclass
class Context:
    """What passes are told beside the graph.

    Attributes:
        layers: Module path of each decoder layer and the policy that describes it.
        fusions: ``"all"`` of them, or those with a ``"measured"`` gain on the layer's family.
        side: Suffixes of module paths whose LoRA stays a branch, e.g. ``"self_attn.q_proj"``.
    """

    layers: Mapping[str, Any] = field(default_factory=dict)
    side: frozenset[str] = frozenset()
    fusions: str = "all"

    def wants(self, fusion: str, layer: Any) -> bool:
        """Whether ``fusion`` is to be made in a layer that matched as ``layer`` says."""
        return self.fusions == "all" or fusion in layer.policy.gains


Pass = Callable[[fx.Graph, Context], PassResult]


@dataclass(frozen=True)
class PassRecord:
    """One line of a pipeline's log: what a pass changed, in operation counts and seconds."""

    name: str
    result: PassResult
    added: Mapping[str, int]
    removed: Mapping[str, int]
    seconds: float


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


def run_passes(
    graph: fx.Graph, passes: Sequence[tuple[str, Pass]], context: Context
) -> tuple[PassRecord, ...]:
    """Run a pipeline over ``graph`` in place.

    Raises:
        IllegalGraphError: where a pass leaves a graph that the specification refuses.
    """
    records = []
    for name, function in passes:
        before = Counter(name_of(node) or node.op for node in graph.nodes)
        start = time.perf_counter()
        result = function(graph, context)
        check_graph(graph, stage=name)
        after = Counter(name_of(node) or node.op for node in graph.nodes)
        seconds = time.perf_counter() - start
        records.append(PassRecord(name, result, after - before, before - after, seconds))
        logger.debug("pass %s: %d rewritten in %.3f s", name, result.count, seconds)
    return tuple(records)
