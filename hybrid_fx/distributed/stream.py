"""Gather, use, release: sharded weights made whole layer by layer, while a graph runs.

The gather of the next layer is under way while a layer computes. At any time there are at most the
whole weights of one layer and, in memory that is kept for the length of a generate, the rows of
another: what FSDP2 calls implicit prefetching, with the order written in the graph.

Every rank issues the same gathers in the same order in each forward, whatever it computes: one that
has nothing left to compute issues them for the others, and one that fails in the middle issues the
rest before it says so. Shape legend: W ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..errors import RankError
from .lockstep import Lockstep
from .shards import Shard, Staging, Timer, buckets, cut, fill, shaped
from .torch_collectives import all_gather_single

#: What a rank says before the gathers of a forward; all else that is said is not negative.
FORWARD = -1


class Pending:
    """The weights of one layer on their way.

    Attributes:
        parts: What of them this rank holds.
        gathers: Shards, their rows [W, sum] and the work under way; none where that is taken.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = tuple(parts)
        self.gathers: list[tuple[list[Shard], Tensor, Any]] = []

    def take(self) -> list[tuple[list[Shard], Tensor, Any]]:
        """The gathers, which are not held any more."""
        gathers, self.gathers = self.gathers, []
        return gathers


class ShardStream:
    """The ``issue_gather`` and ``wait_gather`` operators of sharded weights.

    Args:
        find: The shards by the identity of their parts, as they are now.
        ranks: Keeps the ranks in step.
        staging: Memory of the collectives; only the rows of one layer are in it.

    Attributes:
        change: What is made of a part and its whole weight before it is handed over.
    """

    def __init__(
        self, find: Callable[[], Mapping[int, Shard]], *, ranks: Lockstep, staging: Staging
    ) -> None:
        self.change: Callable[[Tensor, Tensor], Tensor] | None = None
        self._find = find
        self._ranks = ranks
        self._staging = staging
        self._known: Mapping[int, Shard] = {}
        self._layers: list[Sequence[Tensor]] = []
        self._timer: Timer | None = None
        self._flying: Pending | None = None
        self._issued = 0

    def begin(self, layers: Sequence[Sequence[Tensor]], timer: Timer) -> None:
        """See :class:`~hybrid_fx.runtime.streamed.Stream`."""
        self._known = self._find()
        self._layers, self._timer = list(layers), timer

    def run(self, graph: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """See :class:`~hybrid_fx.runtime.streamed.Stream`."""
        self._ranks.same(FORWARD, len(self._layers), finished=True)
        self._issued = 0
        try:
            return graph(*arguments)
        except Exception:
            self._drain()
            raise

    def issue(self, parts: Sequence[Tensor]) -> Pending:
        """Begin to make the weights of a layer whole. Collective, and does not wait."""
        pending = Pending(parts)
        self._flying = pending
        shards = [shard for part in parts if (shard := self._apart(part)) is not None]
        for number, bucket in enumerate(buckets(shards, math.inf)):
            first = bucket[0]
            ranks = dist.get_world_size(first.group)
            count = sum(shard.part.numel() for shard in bucket)
            rows = self._staging.take(f"rows {number}", ranks * count, first).view(ranks, count)
            fill(rows[dist.get_rank(first.group)], bucket)
            pending.gathers.append((bucket, rows, None))
        # All memory is there: from here on, this rank issues what the others do.
        pending.gathers = [(*row[:2], _all_gather(*row[:2])) for row in pending.gathers]
        self._issued += 1
        return pending

    def wait(self, pending: Pending) -> tuple[Tensor, ...]:
        """The whole weights, in memory of their own, which dies with them."""
        whole: dict[int, Tensor] = {}
        # An accelerator does not wait here, and a timer would make it.
        on_host = all(rows.device.type == "cpu" for _, rows, _ in pending.gathers)
        with self._timer("gather") if on_host and self._timer is not None else nullcontext():
            for bucket, rows in self._landed(pending):
                whole |= zip((id(shard.part) for shard in bucket), cut(rows, bucket), strict=True)
        found = (whole[id(p)] if id(p) in whole else self._here(p) for p in pending.parts)
        if self.change is None:
            return tuple(found)
        return tuple(map(self.change, pending.parts, found))

    def _landed(self, pending: Pending) -> Iterator[tuple[list[Shard], Tensor]]:
        """The gathers of a layer as they end."""
        self._flying = None
        for bucket, rows, work in pending.take():
            if work is not None:
                try:
                    work.wait()
                except RuntimeError as error:
                    raise self._ranks.lost(error) from error
            yield bucket, rows

    def serve(self) -> None:
        """Take part in a forward of other ranks, without computing. Collective."""
        self._issued = 0
        for layer in self._layers:
            self._skip(self.issue(layer))

    def _drain(self) -> None:
        """Issue what the graph that failed had still to issue: the other ranks wait for it."""
        try:
            if self._flying is not None:
                self._skip(self._flying)
            for layer in self._layers[self._issued :]:
                self._skip(self.issue(layer))
        except RankError:
            return  # nobody is left who waits; the graph's own error counts

    def _apart(self, part: Tensor) -> Shard | None:
        """The shard whose whole weight this rank does not hold."""
        shard = self._known.get(id(part))
        if shard is None or (dist.get_world_size(shard.group) == 1 and part.device == shard.device):
            return None
        return shard

    def _here(self, part: Tensor) -> Tensor:
        """A weight of which this rank holds all."""
        shard = self._known.get(id(part))
        return part if shard is None else shaped(part.detach().reshape(-1), shard)

    def _skip(self, pending: Pending) -> None:
        """Let a gather end that nobody here waits for."""
        for _ in self._landed(pending):
            pass


def _all_gather(bucket: Sequence[Shard], rows: Tensor) -> Any:
    """Fill the rows [W, sum] of the other ranks; the work under way, None where there are none."""
    group = bucket[0].group
    if len(rows) == 1:
        return None
    return all_gather_single(rows.view(-1), rows[dist.get_rank(group)], group=group, async_op=True)
