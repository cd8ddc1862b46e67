"""Weights that a graph makes whole itself, one layer after the other, while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from ..plan.records import Streamed
from .session import Timer


class Stream(Protocol):
    """The ``issue_gather`` and ``wait_gather`` operators of a runner, for sharded weights."""

    def begin(self, layers: Sequence[Sequence[Tensor]], timer: Timer) -> None:
        """Graphs will gather these weights, a layer at a time, in this order in each run."""

    def run(self, graph: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """What a graph returns; all ranks run one at the same time, or stand by."""

    def issue(self, parts: Sequence[Tensor]) -> Any:
        """Begin to make the weights of a layer whole."""

    def wait(self, pending: Any) -> Sequence[Tensor]:
        """The whole weights of the layer whose gather was issued."""


def by_layer(
    streamed: Sequence[Streamed], tensors: Mapping[str, Tensor]
) -> list[tuple[Tensor, ...]]:
    """The ``shards`` argument of a graph: the weights of each layer, in order."""
    rows: dict[int, list[Tensor]] = {}
    for weight in streamed:
        rows.setdefault(weight.layer, []).append(tensors[weight.name])
    return [tuple(rows[number]) for number in sorted(rows)]
