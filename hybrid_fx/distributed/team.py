"""Teams: ranks that compute one model together, each with its share of the weights.

Legend: T ranks of a team.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError
from .lockstep import gone
from .torch_collectives import all_gather_single

#: Within a forward all ranks compute alike, so none waits long for another: one that is silent for
#: this many seconds has raised, or is gone.
FORWARD_SECONDS = 50


class Collectives:
    """What ranks say to each other within a forward, by torch.distributed.

    See :class:`~hybrid_fx.passes.collectives.Group`.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self._size = dist.get_world_size(group)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of what all ranks hold.

        Raises:
            RankError: where another rank is gone.
        """
        total = x.clone(memory_format=torch.contiguous_format)
        try:
            dist.all_reduce(total, group=self._group)
        except RuntimeError as error:
            raise gone(error) from error
        return total

    def all_gather(self, x: Tensor) -> Sequence[Tensor]:
        """What each rank holds, in order; all of one shape.

        Raises:
            RankError: where another rank is gone.
        """
        parts = x.new_empty(self._size * x.numel())
        try:
            all_gather_single(parts, x.contiguous().view(-1), group=self._group)
        except RuntimeError as error:
            raise gone(error) from error
        return parts.view(self._size, *x.shape).unbind(0)


@dataclass(frozen=True)
class Team:
    """The ranks that generate together with this one.

    Attributes:
        ranks: Their numbers in the whole job, in order.
        rank: Of this one among them.
        forward: Their collectives within a forward.
        rounds: Their process group between forwards, where a rank may be waited for.
    """

    ranks: tuple[int, ...]
    rank: int
    forward: Collectives
    rounds: Any

    @property
    def size(self) -> int:
        """T."""
        return len(self.ranks)


def world_size() -> int | None:
    """The ranks of the job; ``None`` where that is not known yet."""
    if dist.is_initialized():
        return int(dist.get_world_size())
    stated = os.environ.get("WORLD_SIZE", "")
    return int(stated) if stated.isdigit() else None


def degree_of(mpu: Any) -> int:
    """The degree of model parallelism that a model-parallel unit states; 1 without one."""
    names = ("get_model_parallel_world_size", "get_tensor_model_parallel_world_size")
    stated = [getattr(mpu, name, None) for name in names]
    return max([int(ask()) for ask in stated if ask is not None], default=1)


def check_degree(size: int, mpu: Any, world: int | None) -> None:
    """Refuse a degree that the job cannot be cut into, or that its unit contradicts.

    Args:
        size: ``inference_tp_size``.
        mpu: The model-parallel unit, or None.
        world: The ranks of the job; ``None`` where not known yet.

    Raises:
        ConfigError: with both numbers, and the remedy.
    """
    if mpu is not None and degree_of(mpu) != size:
        raise ConfigError(
            f"hybrid_engine.inference_tp_size={size}, and the mpu states a model-parallel degree "
            f"of {degree_of(mpu)}; make them equal, or leave the mpu out"
        )
    if world is not None and world % size:
        raise ConfigError(
            f"hybrid_engine.inference_tp_size={size} does not divide the {world} ranks of this "
            "job; choose a divisor, or another number of ranks"
        )


def make_team(size: int, mpu: Any) -> Team | None:
    """The team of this rank: of ``size`` consecutive ranks, or the unit's group. Collective.

    Returns:
        ``None`` where each rank generates alone.

    Raises:
        ConfigError: as :func:`check_degree`.
    """
    check_degree(size, mpu, world_size())
    if size == 1:
        return None
    if mpu is not None:
        ask = getattr(mpu, "get_model_parallel_group", None)
        group = mpu.get_tensor_model_parallel_group() if ask is None else ask()
        ranks = tuple(dist.get_process_group_ranks(group))
        return Team(ranks, ranks.index(dist.get_rank()), Collectives(group), group)
    found = None
    limit = datetime.timedelta(seconds=FORWARD_SECONDS)
    for first in range(0, dist.get_world_size(), size):  # each rank makes all groups, in order
        ranks = tuple(range(first, first + size))
        rounds, forward = dist.new_group(ranks), dist.new_group(ranks, timeout=limit)
        if dist.get_rank() in ranks:
            team = ranks.index(dist.get_rank())
            found = Team(ranks, team, Collectives(forward), rounds)
    return found
