"""What a policy is: the roles of one decoder family, as data.

A *role* is a named place in a layer with a pattern and the submodules in which its root may
stand. A *policy* is the set of roles of a family. Matching a layer gives every role's matches or
the reason why a role was not found; nothing is rewritten here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from .graph import inside
from .layers import nodes_of
from .pattern import Match, NoMatch, Pattern, match


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """A place in a layer.

    Attributes:
        name: What passes call it: ``q``, ``k``, ``v``, ``norm``, ``rotary``, ``mlp``, ...
        pattern: How it looks.
        at: Submodule paths, relative to the layer, in which its root may stand; "" is the layer.
        count: How many of it a layer has.
    """

    name: str
    pattern: Pattern
    at: tuple[str, ...] = ("",)
    count: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """A decoder family.

    Attributes:
        name: What reports call it.
        roles: Its named places.
        gains: The fusions that a recorded benchmark showed to gain 3 % or more on this family;
            the others run where they are asked for.
    """

    name: str
    roles: tuple[Role, ...]
    gains: frozenset[str] = frozenset()

    def role(self, name: str) -> Role | None:
        """The role called ``name``, if the family has it."""
        return next((role for role in self.roles if role.name == name), None)


@dataclass(frozen=True)
class LayerMatch:
    """How one layer fits a policy: the roles that were found, and why others were not."""

    path: str
    policy: Policy
    found: frozenset[str]
    missing: Mapping[str, NoMatch]

    def __bool__(self) -> bool:
        return not self.missing


def tails(policies: Sequence[Policy]) -> frozenset[str]:
    """The module names, relative to a layer, in which roles stand."""
    return frozenset(at for policy in policies for role in policy.roles for at in role.at if at)


def find_role(
    graph: fx.Graph, role: Role, layer: str, nodes: Sequence[fx.Node] | None = None
) -> list[Match] | NoMatch:
    """Every match of a role in one layer, or the failure that got furthest.

    Args:
        nodes: The calls of the layer, where the caller has them at hand.
    """
    places = tuple(f"{layer}.{at}" if at and layer else at or layer for at in role.at)
    found: list[Match] = []
    failure: NoMatch | None = None
    for node in nodes_of(graph, layer) if nodes is None else nodes:
        if not any(inside(node, place) for place in places):
            continue
        result = match(role.pattern, node)
        if isinstance(result, Match):
            found.append(result)
        elif failure is None or result.depth >= failure.depth:  # of equals the last: a root ends
            failure = result
    if len(found) >= role.count:
        return found
    if found:
        return NoMatch(layer, f"{role.count} of {role.name}", f"{len(found)}")
    if failure is not None:  # a failed match is falsy
        return failure
    return NoMatch(layer, f"a call in {' or '.join(role.at)}", "none")


def match_layer(
    graph: fx.Graph,
    layer: str,
    policies: Sequence[Policy],
    nodes: Sequence[fx.Node] | None = None,
) -> LayerMatch:
    """The policy that fits a layer; where none does in full, the one with most roles found.

    Args:
        nodes: The calls of the layer, where the caller has them at hand.
    """
    here = nodes_of(graph, layer) if nodes is None else nodes
    best: LayerMatch | None = None
    for policy in policies:
        results = {role.name: find_role(graph, role, layer, here) for role in policy.roles}
        missing = {name: r for name, r in results.items() if isinstance(r, NoMatch)}
        candidate = LayerMatch(layer, policy, frozenset(results) - missing.keys(), missing)
        if candidate:
            return candidate
        if best is None or len(candidate.found) > len(best.found):
            best = candidate
    assert best is not None, "no policies given"
    return best
