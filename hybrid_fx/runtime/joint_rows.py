"""The rows of all ranks of a group in one workspace, and the forwards that all of them run.

Each rank holds keys and values of its own heads, for the rows of every rank. Rows lie one behind
the other in the order of the ranks; those of one rank begin at a column of their own, so that all
end at the same one wherever that can be: then rows of different lengths stand as left-padded ones
do, at one pitch. Where ends differ, the graphs are given a table that is aligned to the right.

Legend: B rows, T tokens in this call, S positions in use, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .runner import PlanRunner
from .turn import Turn


@dataclass(frozen=True)
class Block:
    """The rows of one rank: ``batch`` of them from ``first`` on, in ``length`` columns from
    ``offset`` on."""

    first: int
    batch: int
    offset: int
    length: int

    @property
    def end(self) -> int:
        """The column behind the last."""
        return self.offset + self.length

    @property
    def rows(self) -> slice:
        """Where they lie among all."""
        return slice(self.first, self.first + self.batch)


class JointRows:
    """The state that every rank of a group keeps alike, from the turns that all of them take."""

    def __init__(self, runner: PlanRunner) -> None:
        self._runner = runner
        self._workspace = runner.workspace
        self._blocks: dict[int, Block] = {}
        self._valid: Tensor | None = None

    def forward(self, turns: Sequence[Turn | None]) -> dict[int, Tensor]:
        """Let every rank's rows take their turn; ranks without one have left.

        Rows with equally many new columns run together.

        Returns:
            The logits ``[B, keep, V]`` of the rows of each rank.
        """
        self._settle({rank: turn for rank, turn in enumerate(turns) if turn is not None})
        widths = dict.fromkeys(turn.ids.shape[1] for turn in turns if turn is not None)
        found: dict[int, Tensor] = {}
        for width in widths:
            alike = {r: t for r, t in enumerate(turns) if t is not None and t.ids.shape[1] == width}
            found |= self._together(alike, width)
        return found

    def _settle(self, turns: dict[int, Turn]) -> None:
        """Give each row its place: rows move, leave, begin, and more columns are made."""
        before, blocks, sources = self._blocks, {}, []
        first = 0
        for rank, turn in turns.items():
            batch = turn.ids.shape[0]
            if turn.opens:
                blocks[rank] = Block(first, batch, 0, 0)
                sources.append(torch.zeros(batch, dtype=torch.int64, device=self._runner.device))
            else:
                held = before[rank]
                rows = turn.rows
                if rows is None:
                    rows = torch.arange(batch, device=self._runner.device)
                blocks[rank] = Block(first, batch, held.offset, turn.length)
                sources.append(rows + held.first)
            first += batch
        end = max(blocks[rank].end + turn.ids.shape[1] for rank, turn in turns.items())
        for rank, turn in turns.items():
            if turn.opens:
                blocks[rank] = replace(blocks[rank], offset=end - turn.ids.shape[1])
        needed = max(
            blocks[rank].offset + max(turn.capacity, turn.length + turn.ids.shape[1])
            for rank, turn in turns.items()
        )
        self._blocks = blocks
        if all(turn.opens for turn in turns.values()):
            self._workspace.reserve(first, needed)
            self._valid = None
        else:
            self._move(torch.cat(sources), needed)
        for rank, turn in turns.items():
            if turn.opens and blocks[rank].offset:
                self._leave_out(blocks[rank])

    def _move(self, sources: Tensor, needed: int) -> None:
        """Row i continues old row ``sources[i]``, with room for ``needed`` columns."""
        space, count = self._workspace, sources.shape[0]
        pitch = space.pitch if needed <= space.pitch else max(needed, space.pitch * 3 // 2)
        stays = torch.arange(count, device=sources.device)
        if pitch == space.pitch and count <= space.rows and torch.equal(sources, stays):
            return
        held = max((block.end for block in self._blocks.values() if block.length), default=0)
        space.relay(sources, pitch, held)
        if self._valid is not None:
            old = self._valid[sources]
            self._valid = old.new_ones(count, pitch)
            self._valid[:, : old.shape[1]] = old

    def _leave_out(self, block: Block) -> None:
        """Nobody looks at the columns before a block; what a former generate left there is gone."""
        self._validity()[block.rows] = True
        self._validity()[block.rows, : block.offset] = False
        self._workspace.clear(block.rows, block.offset)

    def _validity(self) -> Tensor:
        """bool ``[rows, pitch]``: which columns may be looked at."""
        if self._valid is None:
            shape = (self._workspace.rows, self._workspace.pitch)
            self._valid = torch.ones(shape, dtype=torch.bool, device=self._runner.device)
        return self._valid

    def _together(self, turns: dict[int, Turn], width: int) -> dict[int, Tensor]:
        """One forward of rows with ``width`` new columns each."""
        blocks = [self._blocks[rank] for rank in turns]
        for block, turn in zip(blocks, turns.values(), strict=True):
            if turn.valid is not None or self._valid is not None:
                new = True if turn.valid is None else turn.valid
                self._validity()[block.rows, block.end : block.end + width] = new
        dense = len({block.end for block in blocks}) == 1 and _one_behind_the_other(blocks)
        slots, valid = self._in_line(blocks, width) if dense else self._looked_up(blocks, width)
        decodes = width == 1 and any(block.length for block in blocks)
        logits = self._runner.run(
            "decode" if decodes else "prefill",
            torch.cat([turn.ids for turn in turns.values()]),
            torch.cat([turn.positions for turn in turns.values()]),
            slots,
            valid,
            self._workspace.pitch if dense else 0,
            max(turn.keep for turn in turns.values()),
        )
        found, first = {}, 0
        for (rank, turn), block in zip(turns.items(), blocks, strict=True):
            found[rank] = logits[first : first + block.batch, -turn.keep :]
            self._blocks[rank] = replace(block, length=block.length + width)
            first += block.batch
        return found

    def _in_line(self, blocks: Sequence[Block], width: int) -> tuple[Tensor, Tensor | None]:
        """The table and validity ``[B, S]`` of rows that lie at one pitch and end together."""
        count, end = sum(block.batch for block in blocks), blocks[0].end + width
        rows = torch.arange(count, device=self._runner.device)[:, None] * self._workspace.pitch
        slots = rows + torch.arange(end, device=self._runner.device)
        return slots, None if self._valid is None else self._valid[:count, :end]

    def _looked_up(self, blocks: Sequence[Block], width: int) -> tuple[Tensor, Tensor]:
        """Table and validity of any rows, aligned to the right.

        A column before a row's first stands for its last, which is written by this very call, and
        is not looked at.
        """
        device, pitch = self._runner.device, self._workspace.pitch
        longest = max(block.length for block in blocks) + width
        slots, valid = [], []
        for block in blocks:
            last = block.end + width - 1
            columns = torch.arange(last + 1 - longest, last + 1, device=device)
            there = columns >= block.offset
            columns = torch.where(there, columns, last)
            rows = torch.arange(block.first, block.first + block.batch, device=device)[:, None]
            slots.append(rows * pitch + columns)
            seen = there.expand(block.batch, -1)
            valid.append(seen if self._valid is None else seen & self._valid[rows, columns])
        return torch.cat(slots), torch.cat(valid)


def _one_behind_the_other(blocks: Sequence[Block]) -> bool:
    """Whether blocks lie from row 0 on without a gap."""
    firsts = [0]
    for block in blocks:
        firsts.append(firsts[-1] + block.batch)
    return [block.first for block in blocks] == firsts[:-1]
