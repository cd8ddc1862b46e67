"""Run a pipeline over a graph; the specification and the contract are checked behind each pass."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from .contract import Context, PassResult, Pipeline
from .graph import name_of
from .spec import RULES, IllegalGraphError, Rule, check_graph

logger = logging.getLogger("hybrid_fx")


@dataclass(frozen=True)
class PassRecord:
    """One line of a pipeline's log: what a pass changed, in operation counts and seconds."""

    name: str
    result: PassResult
    added: Mapping[str, int]
    removed: Mapping[str, int]
    seconds: float


def _kinds(graph: fx.Graph) -> Counter[str]:
    return Counter(name_of(node) or node.op for node in graph.nodes)


def run_passes(
    graph: fx.Graph, pipeline: Pipeline, context: Context, *, rules: Sequence[Rule] = RULES
) -> tuple[PassRecord, ...]:
    """Run a pipeline over ``graph`` in place.

    Args:
        rules: What a legal graph is, see :mod:`.spec`.

    Raises:
        IllegalGraphError: where a pass leaves a graph that ``rules`` refuse, or more calls of an
            operator than its contract allows.
    """
    records = []
    for one in pipeline:
        before = _kinds(graph)
        start = time.perf_counter()
        result = one.run(graph, context)
        check_graph(graph, stage=one.name, rules=rules)
        after = _kinds(graph)
        added = after - before
        if odd := one.undeclared(added):
            raise IllegalGraphError(
                f"after {one.name}: {added[odd[0]]} more {odd[0]} than before; where that is "
                f"meant, name {odd[0]!r} in the pass's may_add"
            )
        seconds = time.perf_counter() - start
        records.append(PassRecord(one.name, result, added, before - after, seconds))
        logger.debug("pass %s: %d rewritten in %.3f s", one.name, result.count, seconds)
    return tuple(records)
