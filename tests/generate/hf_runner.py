"""A reference runtime, and a runner that watches any other one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from upstream_names import CACHE


class HFRunner:
    """Sessions over the plain HF model and its own ``DynamicCache``."""

    takes_embeds: bool | None = None
    holds_keys = True
    rows_apart = True

    def __init__(self, model: Any) -> None:
        self.model = model

    def session(self, *, batch: int, capacity: int) -> HFSession:
        return HFSession(self.model, batch)


class HFSession:
    """Its graphs are the module's forward, called on the class: an instance-level ``forward``
    (which is what HF's loops get from us) never reaches it."""

    def __init__(self, model: Any, batch: int) -> None:
        self.model, self.batch = model, batch
        self.cache = DynamicCache()
        self.valid = torch.ones(batch, 0, dtype=torch.bool)

    @property
    def length(self) -> int:
        return self.valid.shape[1]

    def load(self, prefix: Any, key_valid: Tensor) -> None:
        wanted = (self.batch, self.model.dtype)
        if any((len(tensor), tensor.dtype) != wanted for pair in prefix for tensor in pair):
            raise ValueError("other rows or dtype")
        columns = key_valid.shape[1]
        for index, pair in enumerate(prefix):
            lost = columns - pair[0].shape[2]
            self.cache.update(*(F.pad(t, (0, 0, lost, 0)) for t in pair), index)
        self.valid = torch.cat([self.valid, key_valid], -1)

    def read(self, start: int) -> Any:
        return [(each.keys[:, :, start:], each.values[:, :, start:]) for each in self.cache.layers]

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        key_valid: Tensor | None = None,
        *,
        keep=1,
        embeds: Tensor | None = None,
    ) -> Tensor:
        new = torch.ones_like(input_ids, dtype=torch.bool) if key_valid is None else key_valid
        self.valid = torch.cat([self.valid, new], -1)
        out = type(self.model).forward(
            self.model,
            input_ids=input_ids if embeds is None else None,
            inputs_embeds=embeds,
            position_ids=position_ids,
            attention_mask=None if self.valid.all() else self.valid.long(),
            **{CACHE: self.cache},
            use_cache=True,
            logits_to_keep=keep,
        )
        return out.logits

    def reorder(self, rows: Tensor) -> None:
        self.cache.reorder_cache(rows)
        self.valid = self.valid[rows]
        self.batch = len(rows)

    def crop(self, length: int) -> None:
        self.cache.crop(length - self.length)
        self.valid = self.valid[:, :length]

    def close(self) -> None:
        self.cache = None


class Watched:
    """A runner that holds the calls of another one against the contract, and counts them.

    Attributes:
        calls: ``(B, T, keep)`` of each forward.
        sessions: Those opened.
        fail_at: Raise ``error`` in this forward (from 1); 0 is never.
    """

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.calls: list[tuple[int, int, int]] = []
        self.sessions: list[WatchedSession] = []
        self.fail_at = 0
        self.takes_embeds, self.holds_keys = runner.takes_embeds, runner.holds_keys
        self.rows_apart = runner.rows_apart
        self.error: BaseException = KeyboardInterrupt()

    def session(self, *, batch: int, capacity: int) -> WatchedSession:
        inner = self.runner.session(batch=batch, capacity=capacity)
        self.sessions.append(WatchedSession(self, inner, batch, capacity))
        return self.sessions[-1]


class WatchedSession:
    """``padded`` says whether any column was ever given as invalid."""

    def __init__(self, watch: Watched, inner: Any, batch: int, capacity: int) -> None:
        self.watch, self.inner, self.batch, self.capacity = watch, inner, batch, capacity
        self.length = 0
        self.padded = self.closed = False

    def load(self, prefix: Any, key_valid: Tensor) -> None:
        self.inner.load(prefix, key_valid)
        self.length += key_valid.shape[1]

    def read(self, start: int) -> Any:
        return self.inner.read(start)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        key_valid: Tensor | None = None,
        *,
        keep=1,
        embeds: Tensor | None = None,
    ) -> Tensor:
        batch, width = input_ids.shape
        assert not self.closed
        assert batch == self.batch
        assert input_ids.dtype == position_ids.dtype == torch.int64
        assert position_ids.shape == input_ids.shape
        assert 1 <= keep <= width
        if key_valid is not None:
            assert key_valid.dtype == torch.bool
            assert key_valid.shape == input_ids.shape
            self.padded |= not bool(key_valid.all())
        self.length += width
        self.watch.calls.append((batch, width, keep))
        if self.watch.fail_at == len(self.watch.calls):
            raise self.watch.error
        logits = self.inner.forward(input_ids, position_ids, key_valid, keep=keep, embeds=embeds)
        assert logits.shape[:2] == (batch, keep)
        return logits

    def reorder(self, rows: Tensor) -> None:
        assert rows.dtype == torch.int64
        assert 0 <= int(rows.min()) <= int(rows.max()) < self.batch
        self.inner.reorder(rows)
        self.batch = len(rows)

    def crop(self, length: int) -> None:
        assert 0 <= length <= self.length
        self.inner.crop(length)
        self.length = length

    def close(self) -> None:
        assert not self.closed
        self.closed = True
        self.inner.close()
