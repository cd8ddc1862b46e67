"""A prompt as a session takes it: its columns, fed once for rows that are alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.moving import to_device
from .protocol import Session


@dataclass(frozen=True)
class Columns:
    """A prompt as a session takes it: ``ids``, ``positions`` and ``valid`` are ``[B, T]``."""

    ids: Tensor
    positions: Tensor
    valid: Tensor | None

    def rows(self, rows: Tensor) -> Columns:
        """Those of some rows (int64 ``[B']``)."""
        valid = None if self.valid is None else self.valid[rows]
        return Columns(self.ids[rows], self.positions[rows], valid)


def prompt_columns(ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Columns:
    """The columns of a prompt ``[B, T]``, with the positions HF gives where none are given."""
    batch, prompt = ids.shape
    if positions is None and mask is not None:
        positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
    elif positions is None:
        positions = torch.arange(prompt, device=ids.device)[None]
    positions = positions.to(device=ids.device, dtype=torch.int64).expand(batch, prompt)
    valid = None if mask is None or bool((mask == 1).all()) else mask.to(ids.device).bool()
    return Columns(ids.long(), positions, valid)


def distinct(columns: Columns) -> tuple[list[int], list[int]]:
    """The first row of each kind, and for each row which of these it is like.

    Rows are alike where ids, positions and validity are, padding included.
    """
    parts = [columns.ids, columns.positions]
    parts += [] if columns.valid is None else [columns.valid.long()]
    firsts: list[int] = []
    number: dict[tuple[int, ...], int] = {}
    alike = []
    for row, said in enumerate(map(tuple, torch.cat(parts, 1).tolist())):
        if said not in number:
            number[said] = len(firsts)
            firsts.append(row)
        alike.append(number[said])
    return firsts, alike


def prefill(
    session: Session,
    columns: Columns,
    *,
    shared: bool,
    chunk: int | None = None,
    keep: int = 1,
    embeds: Tensor | None = None,
) -> Tensor:
    """Run columns; the logits ``[B, keep, V]`` of the last.

    Args:
        session: Of B rows.
        columns: For each of them.
        shared: Whether rows that are alike are computed once; the session is empty then.
        chunk: How many columns to run at a time; None is all.
        keep: At most those of the last chunk.
        embeds: ``[B, T, E]`` in place of the ids; neither shared nor in chunks.
    """
    firsts, alike = distinct(columns) if shared else ([], [])
    again = len(firsts) < len(alike)
    if again:  # the memory stays: there is room for all rows later
        rows = torch.tensor(firsts, device="cpu")
        session.reorder(rows)
        columns = columns.rows(to_device(rows, columns.ids.device))
    prompt = columns.ids.shape[1]
    width = chunk or prompt
    for start in range(0, prompt, width):
        part = slice(start, start + width)
        logits = session.forward(
            columns.ids[:, part],
            columns.positions[:, part],
            None if columns.valid is None else columns.valid[:, part],
            keep=keep,
            embeds=embeds,
        )
    if again:
        rows = torch.tensor(alike, device="cpu")
        session.reorder(rows)
        logits = logits[to_device(rows, logits.device)]
    return logits
