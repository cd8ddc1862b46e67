"""Tokens and training in every combination of stage, ranks, precision, pinning, adapters and teams.

The fast profile runs enough cells that each two values that can meet do so in one of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest

pytest.importorskip("deepspeed", reason="needs deepspeed: pip install 'hybrid_fx[deepspeed]'")
pytest.importorskip("peft", reason="needs peft: pip install 'hybrid_fx[peft]'")

from two_ranks import Ranks
from zero_checks import cell


class Cell(NamedTuple):
    """One combination; ``team`` is ``inference_tp_size``."""

    world: int
    stage: int
    bf16: bool
    pinned: bool
    lora: bool
    team: int

    @property
    def is_possible(self) -> bool:
        """Only ZeRO-3 has weights to pin, and one rank is no team."""
        return (self.pinned or self.stage == 3) and self.team <= self.world

    @property
    def pairs(self) -> set[tuple[tuple[str, object], ...]]:
        """Each two of its values."""
        return {*itertools.combinations(self._asdict().items(), 2)}


_BOTH = (False, True)
CELLS = [
    found
    for found in map(Cell._make, itertools.product((1, 2), range(4), _BOTH, _BOTH, _BOTH, (1, 2)))
    if found.is_possible
]


def pairwise(cells: Sequence[Cell]) -> Iterator[Cell]:
    """Of ``cells`` enough to show each pair of values, by the most pairs that are new."""
    left = {pair for found in cells for pair in found.pairs}
    while left:
        best = max(cells, key=lambda found: len(found.pairs & left))
        left -= best.pairs
        yield best


def run_all(ranks: Ranks, cells: Sequence[Cell], world: int) -> None:
    """Run the cells of this many ranks in one process group."""
    checks = []
    for found in cells:
        if found.world == world:
            block = {
                "enabled": True,
                "max_out_tokens": 32,
                "pin_parameters": found.pinned,
                "inference_tp_size": found.team,
            }
            checks.append(cell(found.stage, lora=found.lora, bf16=found.bf16, hybrid_engine=block))
    ranks.run(*checks, world=world)


def test_every_pair_of_values_is_in_a_cell() -> None:
    chosen = [*pairwise(CELLS)]
    assert {p for c in chosen for p in c.pairs} == {p for c in CELLS for p in c.pairs}
    assert len(chosen) < len(CELLS) / 3


@pytest.mark.parametrize("world", [1, 2])
def test_tokens_are_transformers_and_training_is_deepspeeds(ranks: Ranks, world: int) -> None:
    run_all(ranks, [*pairwise(CELLS)], world)


@pytest.mark.deep
@pytest.mark.parametrize("world", [1, 2])
def test_they_are_in_every_cell(ranks: Ranks, world: int) -> None:
    run_all(ranks, CELLS, world)
