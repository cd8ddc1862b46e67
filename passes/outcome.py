"""What became of a layer, as plain data for reports: what was fused, what was not and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Missed:
    """A rewrite that did not happen.

    Attributes:
        what: The role or pass, e.g. ``fuse_mlp``.
        node: Name of the graph node where the match ended.
        expected: What is asked for there.
        found: What stands there.
    """

    what: str
    node: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.what} at {self.node}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer of a graph: its policy, and the outcome.

    Attributes:
        path: Its module path; "" for a graph that is itself a part of a layer.
        policy: The policy that fits it in full, if one does.
        fused: The operators that passes put into it.
        missed: Roles of the nearest policy that were not found, and passes that declined.
    """

    path: str
    policy: str | None
    fused: tuple[str, ...] = ()
    missed: tuple[Missed, ...] = ()
