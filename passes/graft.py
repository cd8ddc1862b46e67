"""Bring what passes made of a copy back into the graph it was copied from, and nothing else.

Passes work on a copy in the canonical spelling (:func:`working_copy`). Where a value that they
replaced is used, the graph that is handed on uses the new node; every other node keeps its target,
arguments, name, order and meta; what depends on weights only may move in front of a new node that
reads it. Each replacement stands for one value, so each may be left out: those are that would read
memory behind a write to it, or cross a scope such as autocast.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from .binding import weight_only
from .effects import is_opaque, written_memory
from .graph import is_pure, order, path_of
from .pattern import NoMatch

#: Where a replaced node stood, which is where its stand-in stands.
_PLACE_META = ("nn_module_stack", "stack_trace")


@dataclass(frozen=True)
class Snapshot:
    """A working copy as it was before the passes.

    Attributes:
        calls: Target and arguments of each node.
        written: Nodes of the original graph whose memory some call may write.
        fixed: Nodes of the original graph that depend on weights only.
    """

    calls: Mapping[fx.Node, tuple[Any, Any, Any]]
    written: frozenset[fx.Node]
    fixed: frozenset[fx.Node]


@dataclass(frozen=True)
class Grafted:
    """The original graph with what passes replaced in it.

    Attributes:
        graph: A graph of its own; the original is as it was.
        count: How many values others stand for now.
        declined: Module path and reason of each replacement that was left out.
    """

    graph: fx.Graph
    count: int
    declined: tuple[tuple[str, NoMatch], ...] = ()


def working_copy(graph: fx.Graph) -> fx.Graph:
    """A copy whose nodes know, as ``meta["origin"]``, which node they were copied from."""
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copies[node] = new.node_copy(node, lambda n: copies[n])
        copies[node].meta["origin"] = node
    return new


def snapshot(work: fx.Graph) -> Snapshot:
    """What a working copy is like now, in its canonical spelling and before the passes."""
    written = (node.meta.get("origin") for node in written_memory(work))
    calls = {node: (node.target, node.args, node.kwargs) for node in work.nodes}
    fixed = (node.meta.get("origin") for node in weight_only(work))
    return Snapshot(calls, frozenset(filter(None, written)), frozenset(filter(None, fixed)))


def graft(original: fx.Graph, work: fx.Graph, before: Snapshot) -> Grafted:
    """Put into a copy of ``original`` what passes replaced in ``work`` since ``before``."""
    standing = _replacements(work, before)
    declined: dict[fx.Node, NoMatch] = {}
    while True:
        wanted = {old: new for old, new in standing.items() if old not in declined}
        attempt = _Attempt(original, before, wanted)
        if not attempt.refused:
            reasons = tuple((path_of(standing[old]), why) for old, why in declined.items())
            return Grafted(attempt.graph, len(wanted), reasons)
        declined |= attempt.refused


def _replacements(work: fx.Graph, before: Snapshot) -> dict[fx.Node, fx.Node]:
    """Node of the original graph -> the node of the working copy that stands for it now.

    A value that all its readers left for another one is replaced at its place. Where some still
    read it, or the new value is made of it, the readers that changed are replaced themselves.
    """
    found: dict[fx.Node, fx.Node] = {}
    changed: list[fx.Node] = []
    survivors = [node for node in work.nodes if node in before.calls]
    still_read = {source for node in survivors for source in node.all_input_nodes}
    for node in survivors:
        target, args, kwargs = before.calls[node]
        if node.target is not target:
            changed.append(node)
            continue
        for old, new in _changes((args, kwargs), (node.args, node.kwargs)):
            place = None if old is None else old.meta.get("origin")
            local = old in still_read or (old is not None and _made_of(new, old, before))
            if place is None or (local and node.op != "output"):
                changed.append(node)
            else:
                found[place] = new
    for node in changed:
        if "origin" in node.meta:
            found[node.meta["origin"]] = node
        else:  # spelling made it, and no node of the original graph is like it
            changed += [user for user in node.users if user not in changed]
    return found


def _made_of(new: Any, old: fx.Node, before: Snapshot) -> bool:
    """Whether a node that a pass added reads ``old``, maybe through other new ones."""
    if new is old:
        return True
    added = isinstance(new, fx.Node) and new not in before.calls
    return added and any(_made_of(source, old, before) for source in new.all_input_nodes)


def _changes(old: Any, new: Any) -> Iterator[tuple[fx.Node | None, Any]]:
    """Pairs of nodes that differ; ``(None, ...)`` where something else than a node does."""
    if isinstance(old, fx.Node) and isinstance(new, fx.Node):
        if old is not new:
            yield old, new
    elif isinstance(old, tuple | list) and isinstance(new, tuple | list) and len(old) == len(new):
        for one, other in zip(old, new, strict=True):
            yield from _changes(one, other)
    elif isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        for key in old:
            yield from _changes(old[key], new[key])
    elif isinstance(old, slice) and isinstance(new, slice):
        yield from _changes((old.start, old.stop, old.step), (new.start, new.stop, new.step))
    elif isinstance(old, fx.Node) or type(old) is not type(new) or old != new:
        yield None, new


class _Refused(Exception):
    """A replacement that would not be sound; ``reason`` says why."""

    def __init__(self, reason: NoMatch) -> None:
        super().__init__(str(reason))
        self.reason = reason


class _Attempt:
    """One try at all ``wanted`` replacements; what was ``refused`` must be left out of the next."""

    def __init__(
        self, original: fx.Graph, before: Snapshot, wanted: Mapping[fx.Node, fx.Node]
    ) -> None:
        self.graph = fx.Graph()
        self.refused: dict[fx.Node, NoMatch] = {}
        self._before = before
        self._wanted = wanted
        self._place = order(original)
        self._scope = _scopes(original)
        self._copies: dict[fx.Node, fx.Node] = {}
        self._old: dict[fx.Node, fx.Node] = {}
        self._made: dict[fx.Node, fx.Node] = {}
        for node in original.nodes:
            copied = self.graph.node_copy(node, lambda n: self._copies[n])
            for name, value in vars(node).items():  # what Dynamo hung on it: its _dynamo_source
                if name.startswith("_dynamo"):
                    setattr(copied, name, value)
            self._copies[node], self._old[copied] = copied, node
        for node in original.nodes:
            if node not in wanted:
                continue
            try:
                self._replace(node)
            except _Refused as refused:
                self.refused[node] = refused.reason
                return

    def _replace(self, old: fx.Node) -> None:
        if old in self._before.written:
            raise _Refused(NoMatch(old.name, "a value that nothing writes in place", "a write"))
        new = self._value(self._wanted[old], old, frozenset({old}))
        if new not in self._old and "example_value" in old.meta:
            new.meta["example_value"] = old.meta["example_value"]
        copied = self._copies[old]
        copied.replace_all_uses_with(new)
        self._drop(copied, old)

    def _value(self, node: fx.Node, at: fx.Node, standing: frozenset[fx.Node]) -> fx.Node:
        """What gives the value of a node of the working copy in front of ``at``."""
        if node in self._made:
            return self._made[node]
        origin = node.meta.get("origin")
        if origin is not None and self._wanted.get(origin) is not node:
            if origin in standing:
                raise _Refused(NoMatch(at.name, "a value of its own", "one that reads the old"))
            return self._original(origin, at, standing)
        with self.graph.inserting_before(self._copies[at]):
            args, kwargs = fx.map_arg(
                (node.args, node.kwargs), lambda arg: self._value(arg, at, standing)
            )
            new = self.graph.create_node(node.op, node.target, args, kwargs)
        new.meta = {"nn_module_stack": at.meta.get("nn_module_stack", {})}
        new.meta |= {key: node.meta[key] for key in ("path", "val") if key in node.meta}
        new.meta |= {
            "stack_trace": at.meta.get("stack_trace"),
            "example_value": node.meta.get("val"),
        }
        self._made[node] = new
        return new

    def _original(self, origin: fx.Node, at: fx.Node, standing: frozenset[fx.Node]) -> fx.Node:
        if origin in self._before.written:
            reason = NoMatch(origin.name, "a value that nothing writes in place", "a write")
            raise _Refused(reason)
        if origin in self._wanted:
            return self._value(self._wanted[origin], at, standing | {origin})
        if self._place[origin] > self._place[at]:
            self._move(origin, at)
        return self._copies[origin]

    def _move(self, later: fx.Node, at: fx.Node) -> None:
        """Compute what depends on weights only in front of ``at``; nothing else may move."""
        same_scope = self._scope[later] == self._scope[at]
        if not (same_scope and _erasable(later) and self._fixed(later)):
            raise _Refused(NoMatch(later.name, f"a value known before {at.name}", "a later one"))
        for source in later.all_input_nodes:
            self._original(source, at, frozenset())
        self._copies[at].prepend(self._copies[later])
        self._place[later] = self._place[at]

    def _fixed(self, node: fx.Node) -> bool:
        """Whether a value depends on weights only; spelling left some of them out of the copy."""
        sources = node.all_input_nodes
        whole = bool(sources) and _erasable(node) and all(map(self._fixed, sources))
        return node in self._before.fixed or whole

    def _drop(self, node: fx.Node, root: fx.Node) -> None:
        """Erase what only ``root`` needed; it must stand in the same scope."""
        todo = [node]
        while todo:
            node = todo.pop()
            if node.users or node not in self._old or not _erasable(node):
                continue
            if self._scope[self._old[node]] != self._scope[root]:
                where = NoMatch(node.name, f"the scope of {root.name}", "another one")
                raise _Refused(where)
            inputs = node.all_input_nodes
            self.graph.erase_node(node)
            del self._old[node]
            todo += inputs


def _erasable(node: fx.Node) -> bool:
    """Whether a node of a graph as Dynamo hands it over may go where nothing uses it."""
    return node.op in ("call_function", "call_method") and is_pure(node)


def _scopes(graph: fx.Graph) -> dict[fx.Node, int]:
    """A number for each node that changes where a call may change what later calls do."""
    found, number = {}, 0
    for node in graph.nodes:
        number += is_opaque(node)
        found[node] = number
    return found
