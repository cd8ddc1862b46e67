"""Generating together: the ranks of a group run every forward on the rows of all of them.

Each rank decodes its own rows, with its own processors, criteria and random numbers. Where it
asks for a forward, all ranks say in a round which columns they append; then all run the same
forwards, and each takes the logits of its rows. So the tokens that one rank drew reach the others
with its next forward. A rank that has finished answers the rounds of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import EngineBusyError, EngineClosedError, InputError
from .joint_rows import JointRows
from .runner import BUSY, PlanRunner
from .session import Spans, Timer
from .turn import Turn, count_of
from .workspace import KeyValue

#: What each rank said in a round; ``None`` for one that has finished.
Said = Sequence[tuple[int, ...] | None]


class Rounds(Protocol):
    """What the ranks of a group say to each other between forwards."""

    def step(self, *words: int) -> Said:
        """Take part in the next round; what each rank said, in order."""

    def share(self, mine: Tensor, counts: Sequence[int]) -> Sequence[Tensor]:
        """What each rank holds: 1-D, of ``counts`` elements, which all ranks know."""


class JointRunner:
    """Sessions of one rank on a plan that the ranks of a group run together.

    Args:
        runner: Of this rank's share of the plan.
        rounds: Of the group.
        rank: Of this rank in the group.
        timer: Opens the spans in which this rank's own tokens are counted.
    """

    takes_embeds: bool | None = False
    holds_keys = False

    @property
    def rows_apart(self) -> bool:
        """As of the runner that computes."""
        return self.plan_runner.rows_apart

    def __init__(self, runner: PlanRunner, rounds: Rounds, rank: int, timer: Timer) -> None:
        self.plan_runner = runner
        self._rounds = rounds
        self._rank = rank
        self._timer = timer
        self._rows = JointRows(runner)
        self._open: JointSession | None = None

    def session(self, *, batch: int, capacity: int) -> JointSession:
        """Open a session of ``batch`` rows of this rank with ``capacity`` columns reserved.

        Raises:
            EngineClosedError: where nothing is prepared.
            EngineBusyError: where another session is open.
        """
        if not self.plan_runner.prepared.tensors:
            raise EngineClosedError("nothing is prepared; generate through the engine")
        if self._open is not None:
            raise EngineBusyError(BUSY)
        room = self.plan_runner.capacity(capacity)
        self._open = JointSession(self._take, self._close, self._timer, batch, room)
        return self._open

    def _close(self) -> None:
        self._open = None

    def serve(self, said: Said) -> None:
        """Run the forwards of a round in which this rank appends nothing."""
        self._play(said, None)

    def _take(self, turn: Turn) -> Tensor:
        """Say a turn, and run its round; the logits ``[B, keep, V]``."""
        return self._play(self._rounds.step(*turn.words), turn)[self._rank]

    def _play(self, said: Said, mine: Turn | None) -> dict[int, Tensor]:
        device = self.plan_runner.device
        empty = torch.empty(0, dtype=torch.int64, device=device)
        packed = empty if mine is None else mine.packed()
        counts = [count_of(words) for words in said]
        parts = self._rounds.share(packed.to(device), counts)
        turns = [
            None if words is None else Turn.unpacked(words, part)
            for words, part in zip(said, parts, strict=True)
        ]
        # What one rank computes under must not depend on who asked for the forward.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return self._rows.forward(turns)


class JointSession:
    """The rows of one rank; see :class:`~hybrid_fx.generate.protocol.Session`.

    Attributes:
        batch: B.
        length: S, the columns filled so far.
    """

    def __init__(
        self,
        take: Callable[[Turn], Tensor],
        on_close: Callable[[], None],
        timer: Timer,
        batch: int,
        capacity: int,
    ) -> None:
        self.batch, self.length = batch, 0
        self._take, self._on_close = take, on_close
        self._spans = Spans(timer)
        self._capacity = capacity
        self._opens = True
        self._rows: Tensor | None = None  # since the last forward

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        key_valid: Tensor | None = None,
        *,
        keep: int = 1,
        embeds: Tensor | None = None,
    ) -> Tensor:
        """Append T columns and return the logits ``[B, keep, V]`` of the last. Collective.

        Args:
            input_ids, position_ids: ``[B, T]`` int64.
            key_valid: ``[B, T]`` bool, False for padding; ``None``: all are valid.
            keep: At most T.
            embeds: Not taken.

        Raises:
            InputError: for embeddings.
            RankError: where another rank of the group raised, or is gone.
        """
        if embeds is not None:
            raise InputError("ranks that generate together take token ids, no embeddings")
        turn = Turn(
            ids=input_ids,
            positions=position_ids,
            valid=key_valid,
            keep=keep,
            length=self.length,
            capacity=self._capacity,
            rows=None if self._rows is None else self._rows.to(input_ids.device),
            opens=self._opens,
        )
        if input_ids.shape[1] == 1 and self.length:
            self._spans.decode(self.batch)
            logits = self._take(turn)
        else:
            with self._spans.prefill(input_ids, key_valid):
                logits = self._take(turn)
        self._opens, self._rows = False, None
        self.length += input_ids.shape[1]
        return logits

    def load(self, prefix: Sequence[KeyValue], key_valid: Tensor) -> None:
        """Not served.

        Raises:
            InputError: always.
        """
        raise InputError("ranks that generate together share no keys and values; give token ids")

    def read(self, start: int) -> list[KeyValue]:
        """Not served: a rank holds some of the heads.

        Raises:
            InputError: always.
        """
        raise InputError("ranks that generate together give no keys and values back")

    def reorder(self, rows: Tensor) -> None:
        """Row i of the new batch continues old row ``rows[i]`` (rows ``[B']`` int64)."""
        self._rows = rows if self._rows is None else self._rows[rows.to(self._rows.device)]
        self.batch = rows.shape[0]

    def crop(self, length: int) -> None:
        """Forget the columns from ``length`` on."""
        self.length = min(self.length, length)

    def close(self) -> None:
        """Hand the rows back; the others hear of it in the next round."""
        self._spans.close()
        self._on_close()
