"""Decoding: tokens are chosen, rows that have finished leave the session, the others go on.

Processors and criteria are transformers' own callables. Criteria see the tokens of all rows; the
session, and processors that look at each row by itself, those that still run.

Legend: B rows of the call, N rows in the session, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .choose import Choose, Memory
from .lengths import RowLengths
from .protocol import Session
from .staying import looks_across, of_rows


@dataclass(frozen=True)
class Settings:
    """What HF resolved: processors and criteria are its own callables on ``(ids, scores)``.

    Attributes:
        rows_apart: Whether a row may be computed without those that have finished.
        limit: The model's positions; a row that has finished and stays may be past them.
    """

    process: Callable[[Tensor, Tensor], Tensor]
    stop: Any
    config: Any
    choose: Choose
    streamer: Any = None
    rows_apart: bool = False
    limit: int | None = None


@dataclass
class Record:
    """The sequences ``[B, T + new]``; scores and logits ``[B, V]`` a step, None where unasked.

    Attributes:
        stays: Why rows that have finished stay in the session, "" where they leave.
        waited: The tokens that were computed for rows that had finished and stayed.
    """

    ids: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    unfinished: Tensor = field(init=False)
    stays: str = ""
    waited: int = 0

    def __post_init__(self) -> None:
        self.unfinished = torch.ones(len(self.ids), dtype=torch.long, device=self.ids.device)

    def append(self, chosen: Tensor, rows: Tensor | None, pad: Tensor | None) -> Tensor:
        """Add the tokens of ``rows`` (all where None), padding for the finished; all, ``[B]``."""
        if rows is not None:
            assert pad is not None
            tokens = pad.expand(len(self.ids)).clone()
            tokens[rows] = chosen
        elif pad is not None:
            tokens = chosen * self.unfinished + pad * (1 - self.unfinished)
        else:
            tokens = chosen
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=-1)
        return tokens


def decode(
    session: Session,
    logits: Tensor,
    ids: Tensor,
    last: Tensor,
    settings: Settings,
) -> Record:
    """Choose tokens until the stopping criteria hold for every row.

    Args:
        session: Holds the columns of ``ids``.
        logits: ``[B, 1, V]`` of the last column.
        ids: The prompt, ``[B, T]``.
        last: The positions of the last column, int64 ``[B, 1]``.
        settings: HF's processors, criteria and generation config.
    """
    config, device = settings.config, ids.device
    keep = bool(config.return_dict_in_generate)
    record = Record(
        ids,
        scores=() if keep and config.output_scores else None,
        logits=() if keep and config.output_logits else None,
    )
    ends = any(hasattr(criterion, "eos_token_id") for criterion in settings.stop)
    pad = config._pad_token_tensor.to(device) if ends else None
    record.stays = _why_rows_stay(record, settings)
    numbers = None if record.stays else Memory()
    end = torch.iinfo(last.dtype).max if settings.limit is None else settings.limit - 1
    rows = list(range(len(ids)))  # those of the logits
    index: Tensor | None = None  # the same, unless these are all rows in order
    process = settings.process
    while True:
        raw = _numbers(logits[:, -1], device, numbers)
        scores = process(record.ids if index is None else record.ids[index], raw)
        if record.scores is not None:
            record.scores += (scores,)
        if record.logits is not None:
            record.logits += (raw,)
        tokens = record.append(settings.choose(scores, rows), index, pad)
        record.unfinished = record.unfinished & ~settings.stop(record.ids, record.scores)
        if settings.streamer is not None:
            settings.streamer.put(tokens.cpu())
        running = record.unfinished.tolist()
        if not any(running):
            break
        runs = [running[row] for row in rows]
        stay = list(range(len(rows))) if record.stays else closed_up(runs)
        record.waited += len(stay) - sum(runs)
        if len(stay) < len(rows):
            places = torch.tensor(stay, device=last.device)
            session.reorder(places)
            last = last[places]
            rows = [rows[place] for place in stay]
            index = torch.tensor(rows, device=device)
            process = of_rows(settings.process, index)
        last = (last + 1).clamp_max(end)
        fed = tokens if index is None else tokens[index]
        logits = session.forward(fed[:, None].to(last.device), last)
    if settings.streamer is not None:
        settings.streamer.end()
    return record


def _why_rows_stay(record: Record, settings: Settings) -> str:
    if record.scores is not None or record.logits is not None:
        return "scores or logits are returned"
    if not settings.rows_apart:
        return "a row's logits depend on the rows beside it"
    return looks_across(settings.process, settings.stop, (RowLengths,))


def closed_up(running: Sequence[object]) -> list[int]:
    """The rows that run, in such an order that few move: the last ones fill what others leave."""
    count = sum(map(bool, running))
    movers = iter([row for row in range(count, len(running)) if running[row]])
    return [row if running[row] else next(movers) for row in range(count)]


def _numbers(logits: Tensor, device: torch.device, memory: Memory | None) -> Tensor:
    """float32 ``[N, V]``; in ``memory``, where nobody keeps what a step computed."""
    if memory is None:
        return logits.to(copy=True, dtype=torch.float32, device=device)
    if logits.dtype == torch.float32 and logits.device == device:
        return logits
    rows, width = logits.shape
    return memory.take(rows, width, torch.float32, device).copy_(logits)
