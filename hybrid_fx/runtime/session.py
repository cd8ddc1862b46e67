"""A session: the rows of one generate, as they stand in the workspace.

Legend: B batch, T tokens in this call, S positions in use, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..passes.collectives import Group
from .moving import to_device
from .recorded import DecodeStep, RecordedDecode
from .workspace import KeyValue, Workspace

#: A generated prefill or decode function.
Graph = Callable[..., Tensor]
#: Opens a span of time by name, ``prefill`` or ``decode``; its object counts ``tokens``.
Timer = Callable[[str], AbstractContextManager[Any]]


class Spans:
    """The time and the tokens of one session: a span a prefill, one for all decode steps."""

    def __init__(self, timer: Timer) -> None:
        self._timer = timer
        self._decoding: AbstractContextManager[Any] | None = None
        self._span: Any = None

    @contextmanager
    def prefill(self, ids: Tensor, valid: Tensor | None) -> Iterator[None]:
        """One prefill of ids [B, T] runs; those where ``valid`` [B, T] is False do not count."""
        with self._timer("prefill") as span:
            yield
            span.tokens += ids.numel() - (0 if valid is None else int((~valid).sum()))

    def decode(self, rows: int) -> None:
        """A decode step of so many rows begins; the span lasts from the first to :meth:`close`."""
        if self._decoding is None:
            self._decoding = self._timer("decode")
            self._span = self._decoding.__enter__()
        self._span.tokens += rows

    def close(self) -> None:
        """The session ends."""
        if self._decoding is not None:
            self._decoding.__exit__(None, None, None)
            self._decoding = None


class PlanSession:
    """Rows of one batch on the graphs of a plan; every row has the same number of columns.

    Attributes:
        batch: B.
        length: S, the columns filled so far.
    """

    def __init__(
        self,
        workspace: Workspace,
        prefill: Graph,
        decode: Graph,
        prepared: Sequence[Tensor],
        *,
        batch: int,
        capacity: int,
        device: torch.device,
        limit: int | None,
        group: tuple[Group, ...] = (),
        timer: Timer,
        on_close: Callable[[], None],
        recorded: RecordedDecode | None = None,
    ) -> None:
        self.batch, self.length = batch, 0
        self._workspace = workspace
        self._graphs = (prefill, decode)
        self._prepared = prepared
        self._device = device
        self._limit = limit
        self._group = group
        self._valid: Tensor | None = None
        self._on_close = on_close
        self._spans = Spans(timer)
        self._recorded = recorded
        self._moved = True  # since the latest decode step: rows, memory or validity
        workspace.reserve(batch, max(1, capacity))
        self._lay_out()

    def _lay_out(self) -> None:
        """The slot table [B, pitch]; validity keeps its columns."""
        self._moved = True
        pitch = self._workspace.pitch
        start = torch.arange(self.batch, device=self._device)[:, None] * pitch
        self._slots = start + torch.arange(pitch, device=self._device)
        if self._valid is not None and self._valid.shape[1] < pitch:
            more = self._valid.new_ones(self.batch, pitch - self._valid.shape[1])
            self._valid = torch.cat((self._valid, more), 1)

    def _grow(self, length: int) -> None:
        pitch = max(length, self._workspace.pitch * 3 // 2)
        if self._limit is not None:
            pitch = max(length, min(pitch, self._limit))
        rows = torch.arange(self.batch, device=self._device)
        self._workspace.relay(rows, pitch, self.length)
        self._lay_out()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        key_valid: Tensor | None = None,
        *,
        keep: int = 1,
        embeds: Tensor | None = None,
    ) -> Tensor:
        """Append T columns and return the logits of the last ``keep`` of them.

        Args:
            input_ids, position_ids: [B, T] int64.
            key_valid: [B, T] bool, False for padding; ``None``: all are valid.
            keep: At most T.
            embeds: [B, T, E], in place of the ids, of which the shape alone counts then.

        Returns:
            [B, keep, V] in the model's logits dtype.
        """
        tokens = input_ids.shape[1]
        length = self.length + tokens
        self._claim(length, key_valid)
        inputs = (
            input_ids,
            position_ids,
            self._slots[:, :length],
            None if self._valid is None else self._valid[:, :length],
            self._workspace.pitch,
            keep,
            self._prepared,
            self._workspace.keys,
            self._workspace.values,
        )
        prefill, decode = self._graphs
        if tokens == 1 and self.length > 0 and embeds is None:
            self._spans.decode(self.batch)
            logits = self._decode(functools.partial(decode, *inputs, *self._group), *inputs[:2])
        else:
            with self._spans.prefill(input_ids, key_valid):
                logits = prefill(*inputs, embeds, *self._group)
        self.length = length
        return logits

    def _decode(self, eager: Callable[[], Tensor], ids: Tensor, positions: Tensor) -> Tensor:
        """One token a row, [B, 1]: by the graph as it stands, or a recording of it."""
        if self._recorded is None:
            return eager()
        moved, self._moved = self._moved, False
        step = DecodeStep(eager, ids, positions, self._valid, self.length)
        return self._recorded.step(step, moved=moved)

    def _claim(self, length: int, key_valid: Tensor | None) -> None:
        """Make room for the columns up to ``length`` and note which of them are valid."""
        if length > self._workspace.pitch:
            self._grow(length)
        if key_valid is not None and self._valid is None:
            shape = (self.batch, self._workspace.pitch)
            self._valid = torch.ones(shape, dtype=torch.bool, device=self._device)
        self._moved |= key_valid is not None
        if self._valid is not None:
            new = True if key_valid is None else key_valid
            self._valid[:, self.length : length] = new

    def load(self, prefix: Sequence[KeyValue], key_valid: Tensor) -> None:
        """Append P columns whose keys and values are known, one pair a layer.

        Args:
            prefix: Keys [B, K, P', D] and values, of the last P' columns; what a windowed
                layer no longer holds (P' < P) is never read.
            key_valid: [B, P] bool, False for padding.

        Raises:
            ValueError: where the pairs are not of this session's rows, layers, sizes and dtype.
        """
        self._workspace.check(prefix, self.batch)
        length = self.length + key_valid.shape[1]
        self._claim(length, None if bool(key_valid.all()) else key_valid)
        for index, pair in enumerate(prefix):
            self._workspace.write(index, pair, length)
        self.length = length

    def read(self, start: int) -> list[KeyValue]:
        """Keys and values [B, K, S - start, D] of the columns from ``start`` on, copies."""
        return self._workspace.read(self.batch, start, self.length)

    def reorder(self, rows: Tensor) -> None:
        """Row i of the new batch continues old row ``rows[i]`` (rows [B'] int64).

        Where they lie on the host, nobody waits for the device.
        """
        if self._valid is not None:
            self._valid = self._valid[to_device(rows, self._device)]
        self._workspace.relay(rows, self._workspace.pitch, self.length)
        self.batch = rows.shape[0]
        self._lay_out()

    def crop(self, length: int) -> None:
        """Forget the columns from ``length`` on."""
        if length < self.length and self._recorded is not None:
            self._workspace.forget(length, self.length)
            if self._valid is not None:
                self._valid[:, length:] = True  # as behind the end of any rows
            self._moved = True
        self.length = min(self.length, length)

    def close(self) -> None:
        """Hand the rows back; the workspace may be reused or released."""
        self._spans.close()
        self._on_close()
