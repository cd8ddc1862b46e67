"""Making sharded weights whole: a few large collectives, in an order that is the same on all ranks.

A weight of n elements lies over W ranks as W equal 1-D shards, the last ones padded. Shards of
several weights are put end to end, gathered by one all-gather into [W, sum], and
cut apart again. The shards themselves are only read. Shape legend: W ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .torch_collectives import all_gather_single

Timer = Callable[[str], AbstractContextManager[Any]]

#: Bytes of whole weights that one collective makes, unless a single weight is larger.
BUCKET_BYTES = 64 << 20


@dataclass(frozen=True)
class Shard:
    """This rank's part of a weight.

    Attributes:
        part: The elements, padded: 1-D, of the same size on every rank.
        shape: Of the whole weight.
        device: Where the whole weight belongs; the part may be elsewhere.
        group: The process group it is sharded over.
        layer: The path of the layer it belongs to; "" for none.
    """

    part: Tensor
    shape: torch.Size
    device: torch.device
    group: Any
    layer: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole weight."""
        return math.prod(self.shape) * self.part.element_size()


def _kind(shard: Shard) -> tuple[Any, ...]:
    return id(shard.group), shard.part.dtype, shard.device


def buckets(
    shards: Sequence[Shard], limit: float = BUCKET_BYTES, layers: int | None = None
) -> Iterator[list[Shard]]:
    """Cut ``shards`` into runs of one collective each: one group, dtype and device, near ``limit``.

    The order is kept within a kind; kinds follow each other as their first members stand.

    Args:
        limit: Bytes of whole weights.
        layers: How many layers a run may reach over; what stands outside of layers, which is
            asked for at other times, has runs of its own then. ``None``: any number.
    """
    kinds: dict[tuple[Any, ...], list[Shard]] = {}
    for shard in shards:
        outside = layers is not None and not shard.layer
        kinds.setdefault((outside, *_kind(shard)), []).append(shard)
    for members in kinds.values():
        bucket: list[Shard] = []
        size = 0
        for shard in members:
            reached = len({one.layer for one in (*bucket, shard)})
            if bucket and (size + shard.nbytes > limit or reached > (layers or reached)):
                yield bucket
                bucket, size = [], 0
            bucket.append(shard)
            size += shard.nbytes
        yield bucket


class Staging:
    """Memory that collectives read and write, kept from one to the next: new pages are slow."""

    def __init__(self) -> None:
        self._held: dict[tuple[Any, ...], Tensor] = {}

    def take(self, use: str, count: int, like: Shard) -> Tensor:
        """``count`` elements in the dtype and on the device of ``like``'s whole weight."""
        key = (use, like.part.dtype, like.device)
        held = self._held.get(key)
        if held is None or held.numel() < count:
            del held
            self._held.pop(key, None)  # gone before its successor comes
            held = self._held[key] = self.fresh(use, count, like)
        return held[:count]

    @staticmethod
    def fresh(use: str, count: int, like: Shard) -> Tensor:
        """As :meth:`take`, in memory that is not kept."""
        return torch.empty(count, dtype=like.part.dtype, device=like.device)

    def release(self) -> None:
        """Give the memory back."""
        self._held = {}


def gather(
    bucket: Sequence[Shard], staging: Staging, announce: Callable[[int], object]
) -> list[Tensor]:
    """The whole weights of one bucket, each contiguous and in memory of its own. Collective.

    Args:
        announce: Told the bytes, when nothing but the collective itself can fail any more.
    """
    first = bucket[0]
    ranks = dist.get_world_size(first.group)
    count = sum(shard.part.numel() for shard in bucket)
    # The rows of one weight alone are the whole weight.
    take = staging.take if len(bucket) > 1 else staging.fresh
    rows = take("rows", ranks * count, first).view(ranks, count)
    mine = rows[dist.get_rank(first.group)]
    fill(mine, bucket)
    if ranks > 1:
        announce(sum(shard.nbytes for shard in bucket))
        all_gather_single(rows.view(-1), mine, group=first.group)
    return cut(rows, bucket) if len(bucket) > 1 else [shaped(rows.view(-1), first)]


def fill(row: Tensor, bucket: Sequence[Shard]) -> None:
    """Put this rank's parts of a bucket end to end into ``row``."""
    places = torch.split(row, [shard.part.numel() for shard in bucket])
    for place, shard in zip(places, bucket, strict=True):
        place.copy_(shard.part.detach().reshape(-1))


def cut(rows: Tensor, bucket: Sequence[Shard]) -> list[Tensor]:
    """The whole weights out of the rows [W, sum] of all ranks, each in memory of its own."""
    whole = []
    sizes = [shard.part.numel() for shard in bucket]
    for shard, columns in zip(bucket, torch.split(rows, sizes, 1), strict=True):
        flat = Staging.fresh("whole", columns.numel(), shard)
        flat.view(columns.shape).copy_(columns)
        whole.append(shaped(flat, shard))
    return whole


def shaped(flat: Tensor, shard: Shard) -> Tensor:
    """The whole weight in its shape, without the padding behind it."""
    return flat[: math.prod(shard.shape)].view(shard.shape)


class ShardGather:
    """The ``gather`` operator of sharded weights.

    A bucket is gathered when the first of its weights is asked for; a whole weight is handed over
    once and not kept.

    Args:
        find: The shards by the identity of their parts, as they are now.
        lent: The addresses of the model's own storages, as they are now.
        announce: See :func:`gather`.
        limit: See :data:`BUCKET_BYTES`.
        layers: See :func:`buckets`.

    Attributes:
        change: What is made of a part and its whole weight before it is handed over.
        collectives: How many were issued so far.
        staging: Memory of the collectives.
    """

    def __init__(
        self,
        find: Callable[[], Mapping[int, Shard]],
        lent: Callable[[], frozenset[int]],
        *,
        announce: Callable[[int], object] = lambda nbytes: None,
        limit: int = BUCKET_BYTES,
        layers: int | None = None,
    ) -> None:
        self.change: Callable[[Tensor, Tensor], Tensor] | None = None
        self._find = find
        self._layers = layers
        self._announce = announce
        self._limit = limit
        self.staging = Staging()
        self._find_lent = lent
        self._lent: frozenset[int] = frozenset()
        self.collectives = 0
        self._bucket_of: dict[int, list[Shard]] = {}
        self._whole: dict[int, Tensor] = {}
        self._timer: Timer | None = None

    def begin(self, weights: Sequence[Tensor], timer: Timer) -> None:
        """See :class:`~hybrid_fx.runtime.prepared.Gather`."""
        known = self._find()
        wanted = {id(weight): known[id(weight)] for weight in weights if id(weight) in known}
        self._timer, self._lent = timer, self._find_lent()
        for bucket in buckets(list(wanted.values()), self._limit, self._layers):
            self._bucket_of |= dict.fromkeys((id(shard.part) for shard in bucket), bucket)

    def __call__(self, weight: Tensor) -> Tensor:
        """See :class:`~hybrid_fx.runtime.prepared.Gather`."""
        whole = self._gathered(weight)
        return whole if self.change is None else self.change(weight, whole)

    def _gathered(self, weight: Tensor) -> Tensor:
        bucket = self._bucket_of.get(id(weight))
        if bucket is None:
            return weight
        if id(weight) not in self._whole:
            assert self._timer is not None
            with self._timer("gather"):
                made = gather(bucket, self.staging, self._announce)
            self.collectives += 1
            self._whole |= {id(s.part): whole for s, whole in zip(bucket, made, strict=True)}
        return self._whole.pop(id(weight))

    def end(self) -> None:
        """See :class:`~hybrid_fx.runtime.prepared.Gather`."""
        self._bucket_of, self._whole, self._timer = {}, {}, None

    def lent(self, tensor: Tensor) -> bool:
        """See :class:`~hybrid_fx.runtime.prepared.Gather`."""
        return tensor.untyped_storage()._cdata in self._lent
