"""Packed products of random numbers of rows: ``python row_memory.py``. Linux only.

Prints the resident memory, MiB, after products of all numbers of rows that kernels are made for,
and the most that it is during 100 random ones after that.
"""

from __future__ import annotations

import json
import random

from resident_memory import MIB, resident


def measure() -> tuple[float, float]:
    import torch

    from hybrid_fx.passes.packing import pack, packed_linear
    from hybrid_fx.passes.row_buckets import MOST, bucket

    rng = random.Random(0)
    weight = pack(torch.ones(64, 64))
    for rows in (*sorted({bucket(rows) for rows in range(1, MOST + 1)}), 1300):
        packed_linear(torch.ones(rows, 64), weight, None)
    before = resident() / MIB
    after = []
    for _ in range(100):
        packed_linear(torch.ones(rng.randint(1, 1300), 64), weight, None)
        after.append(resident() / MIB)
    return before, max(after)


if __name__ == "__main__":
    print(json.dumps(measure()))
