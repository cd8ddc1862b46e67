"""Run a pipeline over a graph; the specification and the contract are checked behind each pass.

A pipeline that fails leaves the graph that it was given as it found it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from .bounds import bounded
from .contract import Context, Pass, PassError, PassResult, Pipeline
from .graph import name_of
from .snapshot import Snapshot
from .spec import RULES, IllegalGraphError, Rule, check_graph, refused

logger = logging.getLogger("hybrid_fx")


@dataclass(frozen=True)
class PassRecord:
    """One line of a pipeline's log: what a pass changed, in operation counts and seconds."""

    name: str
    result: PassResult
    added: Mapping[str, int]
    removed: Mapping[str, int]
    seconds: float


def _kind(node: fx.Node) -> str:
    return name_of(node) or node.op


def _kinds(graph: fx.Graph) -> Counter[str]:
    return Counter(map(_kind, graph.nodes))


def run_passes(
    graph: fx.Graph, pipeline: Pipeline, context: Context, *, rules: Sequence[Rule] = RULES
) -> tuple[PassRecord, ...]:
    """Run a pipeline over ``graph`` in place; where it fails, the graph is what it was before.

    Args:
        rules: What a legal graph is, see :mod:`.spec`.

    Raises:
        IllegalGraphError: where a pass leaves a graph that ``rules`` refuse, or more calls of an
            operator than its contract allows.
        PassError: where a pass creates nodes without end, or returns no :class:`PassResult`.
    """
    snapshot = Snapshot(graph)
    records = []
    for one in pipeline:
        try:
            records.append(_run(graph, one, context, rules))
        except BaseException as error:
            snapshot.restore()
            if not isinstance(error, IllegalGraphError | PassError):
                error.add_note(f"raised in pass {one.name}; the graph is as it was before")
            raise
    return tuple(records)


def _run(graph: fx.Graph, one: Pass, context: Context, rules: Sequence[Rule]) -> PassRecord:
    before = _kinds(graph)
    start = time.perf_counter()
    with bounded(graph, one.name):
        result = one.run(graph, context)
    if not isinstance(result, PassResult):
        raise PassError(f"pass {one.name} returned {result!r}; let it return PassResult(count)")
    check_graph(graph, stage=one.name, rules=rules)
    after = _kinds(graph)
    added = after - before
    if odd := one.undeclared(added):
        last = next(node for node in reversed(graph.nodes) if _kind(node) == odd[0])
        raise refused(
            one.name,
            last,
            f"{added[odd[0]]} more {odd[0]} than before; where that is meant, name {odd[0]!r} "
            f"in the pass's {'inputs' if odd[0] == 'placeholder' else 'may_add'}",
        )
    seconds = time.perf_counter() - start
    logger.debug("pass %s: %d rewritten in %.3f s", one.name, result.count, seconds)
    return PassRecord(one.name, result, added, before - after, seconds)
