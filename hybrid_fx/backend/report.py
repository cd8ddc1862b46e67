"""What became of one graph: as data, and as a line of the log."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..passes.outcome import LayerReport, Missed

logger = logging.getLogger("hybrid_fx")


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphReport:
    """What the backend made of one graph that Dynamo handed over.

    Attributes:
        mode: ``training`` where autograd may record it, else ``inference``.
        nodes: How many it had.
        nodes_after: How many are handed on; where nothing was replaced, the graph is the same.
        replaced: How many values other operators compute now.
        layers: The layers found in it, their policy, what was fused and what was not, and why.
        passes: Name of each pass that ran -> in how many places it rewrote.
        declined: Rewrites that were found, and left out because they would not be sound here.
        failure: The error that ended the rewriting, if one did; the graph is handed on as it was.
        inner: What runs it.
        seconds: Time this took, without that of ``inner``.
    """

    mode: str
    nodes: int
    nodes_after: int
    replaced: int = 0
    layers: tuple[LayerReport, ...] = ()
    passes: Mapping[str, int] = field(default_factory=dict)
    declined: tuple[Missed, ...] = ()
    failure: str | None = None
    inner: str = "eager"
    seconds: float = 0.0

    def __str__(self) -> str:
        fitting = sum(layer.policy is not None for layer in self.layers)
        ran = ", ".join(f"{name} {count}" for name, count in self.passes.items() if count)
        return (
            f"{self.mode} graph of {self.nodes} nodes for {self.inner}: "
            f"{fitting} of {len(self.layers)} layers fit a policy; {ran or 'nothing rewritten'}; "
            f"{self.nodes_after} nodes left, {1000 * self.seconds:.0f} ms"
        )


def log(report: GraphReport) -> None:
    """One line at INFO; each thing that was not rewritten at DEBUG."""
    logger.info("%s", report)
    for layer in report.layers:
        for missed in layer.missed:
            logger.debug("%s: %s", layer.path or "the graph", missed)
    for missed in report.declined:
        logger.debug("left out: %s", missed)
