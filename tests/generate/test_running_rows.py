"""The rows of a session that goes on: who leaves is known on the host, and stays known there."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from hybrid_fx.generate.protocol import Session
from hybrid_fx.generate.running import Running


class Elsewhere:
    """A session on a device whose results nobody can look at."""

    def __init__(self) -> None:
        self.told: list[Tensor] = []

    def reorder(self, rows: Tensor) -> None:
        self.told.append(rows)


def test_rows_that_leave_ask_the_device_nothing() -> None:
    device, session = torch.device("meta"), Elsewhere()
    logits, last = torch.empty(4, 1, 7, device=device), torch.empty(4, 1, device=device).long()
    running = Running(cast(Session, session), logits, last, device)
    assert running.keep([True, False, True, True])
    (rows,) = session.told
    assert rows.device.type == "cpu"
    assert rows.tolist() == running.rows == [0, 3, 2]
    index: Any = running.index
    assert index.device == device
    assert running.take().shape == (3, 7)


def test_rows_that_leave_are_known_on_the_host_wherever_tensors_are_made() -> None:
    session, cpu = Elsewhere(), torch.device("cpu")
    logits, last = torch.zeros(3, 1, 7), torch.zeros(3, 1, dtype=torch.int64)
    running = Running(cast(Session, session), logits, last, cpu)
    with torch.device("meta"):
        assert running.keep([True, False, True])
    index: Any = running.index
    assert [session.told[0].tolist(), index.tolist()] == [[0, 2], [0, 2]]


def test_rows_of_tokens_on_the_host_are_found_there() -> None:
    logits, last = torch.empty(3, 1, 7, device="meta"), torch.empty(3, 1, device="meta").long()
    running = Running(cast(Session, Elsewhere()), logits, last, torch.device("cpu"))
    assert running.keep([True, False, True])
    assert running.of(torch.tensor([5, 6, 7])).tolist() == [5, 7]
