"""Decoding: tokens are chosen, rows that have finished leave the session, the others go on.

Processors and criteria are transformers' own callables. Criteria see the tokens of all rows; the
session, and processors that look at each row by itself, those that still run.

Legend: B rows of the call, N rows in the session, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .choose import Choose, Memory
from .host import ToHost
from .lengths import RowLengths
from .protocol import Session
from .running import Running
from .staying import looks_across, of_rows


@dataclass(frozen=True)
class Settings:
    """What HF resolved: processors and criteria are its own callables on ``(ids, scores)``.

    Attributes:
        rows_apart: Whether a row may be computed without those that have finished.
        limit: The model's positions; a row that has finished and stays may be past them.
        ahead: Whether forwards are queued before it is known who runs, which pays on a device
            that computes while the host goes on.
    """

    process: Callable[[Tensor, Tensor], Tensor]
    stop: Any
    config: Any
    choose: Choose
    streamer: Any = None
    rows_apart: bool = False
    limit: int | None = None
    ahead: bool = False


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

    With ``settings.ahead``, the next forward is queued before the host waits for the flags that
    say who runs; a row that has ended then leaves behind that forward, and one that nobody needed
    is dropped before anything is chosen of it. Behind the last possible step none is queued.

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
    running = Running(session, logits, last, device, settings.limit)
    process, told = settings.process, ToHost(len(ids), device)
    while True:
        raw = _numbers(running.take(), device, numbers)
        scores = process(running.of(record.ids), raw)
        if record.scores is not None:
            record.scores += (scores,)
        if record.logits is not None:
            record.logits += (raw,)
        tokens = record.append(settings.choose(scores, running.rows), running.index, pad)
        record.unfinished = record.unfinished & ~settings.stop(record.ids, record.scores)
        told.send(tokens, record.unfinished)
        queued = settings.ahead and record.ids.shape[1] < config.max_length
        if queued:
            running.feed(tokens)
        put, flags = told.read()
        if settings.streamer is not None:
            settings.streamer.put(put)
        if not any(flags):
            break
        runs = [flags[row] for row in running.rows]
        if record.stays:
            record.waited += len(runs) - sum(runs)
        elif running.keep(runs):
            assert running.index is not None
            process = of_rows(settings.process, running.index)
        if not queued:
            running.feed(tokens)
    if settings.streamer is not None:
        settings.streamer.end()
    return record


def _why_rows_stay(record: Record, settings: Settings) -> str:
    if record.scores is not None or record.logits is not None:
        return "scores or logits are returned"
    if not settings.rows_apart:
        return "a row's logits depend on the rows beside it"
    return looks_across(settings.process, settings.stop, (RowLengths,))


def _numbers(logits: Tensor, device: torch.device, memory: Memory | None) -> Tensor:
    """float32 ``[N, V]``; in ``memory``, where nobody keeps what a step computed."""
    if memory is None:
        return logits.to(copy=True, dtype=torch.float32, device=device)
    if logits.dtype == torch.float32 and logits.device == device:
        return logits
    rows, width = logits.shape
    return memory.take(rows, width, torch.float32, device).copy_(logits)
