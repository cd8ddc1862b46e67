"""What passes did while a plan was built, as the plain values that its manifest keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..passes.contract import PassResult
from ..passes.driver import PassRecord
from ..passes.hoist import Hoisted


def logged(stage: str, records: Sequence[PassRecord]) -> list[dict[str, Any]]:
    """Records of one stage, in order."""
    return [
        {
            "stage": stage,
            "name": record.name,
            "count": record.result.count,
            "added": dict(record.added),
            "removed": dict(record.removed),
            "declined": len(record.result.misses),
            "seconds": record.seconds,
        }
        for record in records
    ]


def hoisted(staged: Hoisted, size: int, seconds: float) -> dict[str, Any]:
    """The row of hoisting, which is no pass: it makes two graphs of one of ``size`` nodes."""
    moved = size - (len(staged.body.nodes) - len(staged.names))
    result = PassResult(len(staged.names))
    added = {"placeholder": len(staged.names)}
    record = PassRecord("hoist", result, added, {"moved to prepare": moved}, seconds)
    return logged("layers", [record])[0]
